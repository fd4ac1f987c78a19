"""The chart on a real API server: what it renders is accepted, grants no more than is needed, and guards approvals."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster.conftest import Start
from tests.cluster.harness import ROOT, Api, ApiAnswer, wait_for
from tests.cluster.manifests import FINE_TUNE_JOB, MODEL_VERSION, Manifest, changed

NOBODY = {"schedulerName": "nobody"}
SMALL_JOB: Manifest = {
    "apiVersion": "tuneloop.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "small"},
    "spec": {
        "baseModel": {"uri": "pvc://models/base"},
        "data": {"train": [{"source": {"uri": "pvc://data/train.jsonl"}}]},
        "compute": {"acceleratorsPerNode": 0, "pod": NOBODY},
        "output": {"model": "other", "store": {"uri": "pvc://models"}},
    },
}
MERGED = changed(changed(MODEL_VERSION, "spec.artifact.format", "Merged"), "spec.artifact.rank", ...)
SERVABLE = changed(MERGED, "spec.approval", "Approved")
SMALL_DEPLOYMENT: Manifest = {
    "apiVersion": "tuneloop.dev/v1alpha1",
    "kind": "ModelDeployment",
    "metadata": {"name": "sentiment"},
    "spec": {
        "model": {"name": "sentiment"},
        "engine": {"acceleratorsPerReplica": 0, "pod": NOBODY},
        "gateway": {"pod": NOBODY},
    },
}
CHART = str(ROOT / "charts" / "tuneloop")
MONITORING = ("--api-versions", "monitoring.coreos.com/v1")
OPERATOR = "tuneloop-operator"


@pytest.fixture(scope="session")
def helm_program() -> str:
    """Helm, built if it is not there yet."""
    if shutil.which("helm") is None:
        subprocess.run([ROOT / "dev" / "cluster" / "cluster", "tools"], check=True, capture_output=True)
    return shutil.which("helm") or "helm"


class Helm:
    """The program, and what it renders."""

    def __init__(self, program: str) -> None:
        self.program = program

    def run(self, *arguments: str, fails: bool = False) -> str:
        done = subprocess.run([self.program, *arguments], capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr if fails else done.stdout

    def render(self, *sets: str, namespace: str = "tuneloop-system", monitoring: bool = False) -> list[Manifest]:
        values = [part for pair in sets for part in ("--set-json", pair)]
        text = self.run("template", "tuneloop", CHART, "-n", namespace, *values, *(MONITORING if monitoring else ()))
        return [document for document in yaml.safe_load_all(text) if document]


@pytest.fixture(scope="session")
def helm(helm_program: str) -> Helm:
    return Helm(helm_program)


def of_kind(documents: list[Manifest], kind: str) -> list[Manifest]:
    return [document for document in documents if document["kind"] == kind]


VARIANTS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "namespaced": ('watchNamespaces=["team-a","team-b"]',),
    "everything": (
        "operator.replicas=2",
        'operator.podLabels={"a":"b"}',
        'operator.podAnnotations={"c":"d"}',
        'operator.nodeSelector={"e":"f"}',
        'operator.tolerations=[{"key":"g","operator":"Exists"}]',
        'operator.affinity={"podAntiAffinity":{}}',
        'operator.priorityClassName="high"',
        'images.engineCpu="vllm-cpu:1"',
        'images.pullSecrets=[{"name":"pull"}]',
        'prometheus={"url":"http://prometheus:9090","tokenSecret":{"name":"token","key":"token"}}',
        'monitoring.labels={"release":"x"}',
    ),
    "users of the platform": ("pods.user=null", "pods.fsGroup=null"),
    "little": ("crds.install=false", "monitoring.enabled=false", "approvalPolicy.enabled=false", "access.aggregate=false"),
}


def test_the_chart_passes_helms_strict_lint(helm: Helm) -> None:
    helm.run("lint", "--strict", CHART)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rendered_object_is_accepted(helm: Helm, api: Api, namespace: str, variant: str) -> None:
    for document in helm.render(*VARIANTS[variant], namespace=namespace):
        kind, place = document["kind"], document["metadata"].get("namespace")
        document["metadata"].pop("namespace", None)
        group = document["apiVersion"] if "/" in document["apiVersion"] else ""
        path = f"/apis/{group}" if group else "/api/v1"
        path += f"/namespaces/{namespace}" if place else ""
        name = document["metadata"]["name"]
        plural = {"ValidatingAdmissionPolicy": "validatingadmissionpolicies"}.get(kind, kind.lower() + "s")
        api.call(
            "PATCH",
            f"{path}/{plural}/{name}?dryRun=All&fieldManager=test&force=true&fieldValidation=Strict",
            document,
            "application/apply-patch+yaml",
        )


@pytest.mark.parametrize("variant", ["defaults", "everything"])
def test_the_operator_runs_under_the_restricted_profile(helm: Helm, api: Api, namespace: str, variant: str) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.call("PATCH", f"/api/v1/namespaces/{namespace}", {"metadata": {"labels": labels}}, "application/merge-patch+json")
    (deployment,) = of_kind(helm.render(*VARIANTS[variant]), "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    del spec["serviceAccountName"]
    spec.pop("priorityClassName", None)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator"}, "spec": spec}
    api.call("POST", f"/api/v1/namespaces/{namespace}/pods?dryRun=All", pod)
    spec["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(ApiAnswer, match="restricted"):
        api.call("POST", f"/api/v1/namespaces/{namespace}/pods?dryRun=All", pod)


def test_the_settings_of_values_reach_the_operator(helm: Helm) -> None:
    (deployment,) = of_kind(helm.render(*VARIANTS["everything"], 'watchNamespaces=["a","b"]', "pods.fsGroup=null"), "Deployment")
    env = {entry["name"]: entry.get("value") for entry in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["TUNELOOP_WATCH_NAMESPACES"] == "a,b"
    assert env["TUNELOOP_POD_USER"] == "65532"
    assert env["TUNELOOP_FS_GROUP"] == "none"
    assert env["TUNELOOP_PROMETHEUS_URL"] == "http://prometheus:9090"
    assert env["TUNELOOP_ENGINE_CPU_IMAGE"] == "vllm-cpu:1"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("operator.replica=2", "additional properties 'replica' not allowed"),
        ("operator.replicas=0", "minimum: got 0, want 1"),
        ("nonsense=1", "additional properties 'nonsense' not allowed"),
        ('images.pullPolicy="Sometimes"', "value must be one of 'Always', 'IfNotPresent', 'Never'"),
        ('prometheus.url="prometheus:9090"', "does not match pattern"),
    ],
)
def test_a_wrong_value_is_refused_by_name(helm: Helm, value: str, sentence: str) -> None:
    assert sentence in helm.run("template", "tuneloop", CHART, "--set-json", value, fails=True)


# --- rights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_right_is_a_wildcard_and_no_secret_can_be_read(helm: Helm, variant: str) -> None:
    documents = helm.render(*VARIANTS[variant])
    rules = [rule for kind in ("Role", "ClusterRole") for role in of_kind(documents, kind) for rule in role["rules"]]
    assert rules
    for rule in rules:
        assert "*" not in str(rule)
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
        if "secrets" in rule["resources"]:
            assert rule["verbs"] == ["create"]


def test_with_named_namespaces_the_operator_has_no_right_elsewhere(helm: Helm) -> None:
    documents = helm.render(*VARIANTS["namespaced"], "access.aggregate=false")
    assert of_kind(documents, "ClusterRole") == []
    assert of_kind(documents, "ClusterRoleBinding") == []
    places = {(role["metadata"]["namespace"], role["metadata"]["name"]) for role in of_kind(documents, "Role")}
    assert places == {("team-a", OPERATOR), ("team-b", OPERATOR), ("tuneloop-system", f"{OPERATOR}-lease")}


# --- CRDs and monitoring ----------------------------------------------------------------------------


def test_crds_are_kept_and_can_be_left_out(helm: Helm) -> None:
    crds = of_kind(helm.render(), "CustomResourceDefinition")
    assert len(crds) == 3
    for crd in crds:
        assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        assert crd == {
            **yaml.safe_load((ROOT / "crds" / f"{crd['spec']['names']['plural']}.yaml").read_text()),
            "metadata": crd["metadata"],
        }
    assert of_kind(helm.render("crds.install=false"), "CustomResourceDefinition") == []


def test_monitors_and_rules_are_made_where_their_kinds_exist(helm: Helm) -> None:
    without, with_kinds = helm.render(), helm.render(monitoring=True)
    assert not of_kind(without, "PodMonitor")
    assert not of_kind(without, "PrometheusRule")
    assert {monitor["metadata"]["name"] for monitor in of_kind(with_kinds, "PodMonitor")} == {
        OPERATOR,
        "tuneloop-gateway",
        "tuneloop-engine",
        "tuneloop-trainer",
    }
    (rules,) = of_kind(with_kinds, "PrometheusRule")
    assert rules["spec"] == yaml.safe_load((ROOT / "charts/tuneloop/rules/loop.yaml").read_text())
    (dashboard,) = [d for d in of_kind(without, "ConfigMap") if d["metadata"]["labels"].get("grafana_dashboard")]
    assert {name: json.loads(text)["uid"] for name, text in dashboard["data"].items()} == {
        f"tuneloop-{name}.json": f"tuneloop-{name}" for name in ("adapters", "canary", "feedback", "fleet", "loop", "model")
    }


def test_monitors_look_where_the_operator_looks(helm: Helm) -> None:
    monitors = of_kind(helm.render(*VARIANTS["namespaced"], monitoring=True), "PodMonitor")
    for monitor in monitors:
        if monitor["metadata"]["name"] != OPERATOR:
            assert monitor["spec"]["namespaceSelector"] == {"matchNames": ["team-a", "team-b"]}


def test_the_alerts_are_valid_promql(helm: Helm, tmp_path: Any) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool comes with Prometheus, which runs beside the whole cluster only")
    (rules,) = of_kind(helm.render(monitoring=True), "PrometheusRule")
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(rules["spec"]))
    done = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- a release --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(helm: Helm, api: Api) -> Iterator[tuple[str, str]]:
    """Name and namespace of an installed release, without the CRDs, which other tests have installed."""
    name = f"tuneloop-{uuid.uuid4().hex[:6]}"
    helm.run("install", name, CHART, "-n", name, "--create-namespace", "--set", "crds.install=false")
    yield name, name
    helm.run("uninstall", name, "-n", name)
    api.call("DELETE", f"/api/v1/namespaces/{name}")


def may(api: Api, user: str, namespace: str, verb: str, group: str, resource: str, name: str = "") -> bool:
    attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": resource, "name": name}
    resource, _, attributes["subresource"] = resource.partition("/")
    attributes["resource"] = resource
    review = {"spec": {"user": user, "resourceAttributes": attributes}}
    answer = api.call("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    return bool(answer["status"]["allowed"])


@pytest.mark.parametrize(
    ("verb", "group", "resource", "allowed"),
    [
        ("watch", "tuneloop.dev", "finetunejobs", True),
        ("patch", "tuneloop.dev", "modeldeployments/status", True),
        ("create", "tuneloop.dev", "modelversions", True),
        ("approve", "tuneloop.dev", "modelversions", True),
        ("create", "batch", "jobs", True),
        ("create", "", "secrets", True),
        ("get", "", "secrets", False),
        ("list", "", "secrets", False),
        ("watch", "", "secrets", False),
        ("delete", "", "secrets", False),
        ("delete", "tuneloop.dev", "finetunejobs", False),
        ("delete", "tuneloop.dev", "modelversions", False),
        ("update", "tuneloop.dev", "modeldeployments", False),
        ("create", "", "pods", False),
        ("create", "", "pods/exec", False),
        ("get", "", "nodes", False),
        ("update", "coordination.k8s.io", "leases", False),
    ],
)
def test_the_operator_may_what_it_needs_and_no_more(
    api: Api, release: tuple[str, str], namespace: str, verb: str, group: str, resource: str, allowed: bool
) -> None:
    name, home = release
    assert may(api, f"system:serviceaccount:{home}:{name}-operator", namespace, verb, group, resource) is allowed


def test_the_lease_is_the_operators_in_its_own_namespace(api: Api, release: tuple[str, str]) -> None:
    name, home = release
    assert may(api, f"system:serviceaccount:{home}:{name}-operator", home, "update", "coordination.k8s.io", "leases")


@pytest.fixture
def charted(helm: Helm, api: Api, namespace: str, tmp_path: Path) -> str:
    """A kubeconfig of the operator's ServiceAccount, with the rights that the chart gives it in the namespace, and no others."""
    documents = helm.render(f'watchNamespaces=["{namespace}"]', "access.aggregate=false", namespace=namespace)
    for kind in ("ServiceAccount", "Role", "RoleBinding"):
        for document in of_kind(documents, kind):
            api.create(document)
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = api.call("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{OPERATOR}/token", request)["status"]["token"]
    config = yaml.safe_load(Path(api.kubeconfig).read_text())
    name = next(c["context"]["user"] for c in config["contexts"] if c["name"] == config["current-context"])
    config["users"] = [{"name": name, "user": {"token": token}}]
    path = tmp_path / "operator.kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_the_charts_rights_are_enough_for_jobs_and_deployments(api: Api, namespace: str, start_operator: Start, charted: str) -> None:
    operator = start_operator(kubeconfig=charted)
    claims = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    for claim in ("models", "data"):
        metadata = {"name": claim, "namespace": namespace}
        api.create({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": claims})
    for manifest in (SMALL_JOB, SERVABLE, SMALL_DEPLOYMENT):
        api.create({**manifest, "metadata": {**manifest["metadata"], "namespace": namespace}})
    wait_for(lambda: api.list("Job", namespace), what="the first stage's Job")
    wait_for(lambda: len(api.list("Deployment", namespace)) == 2, what="engine and gateway")
    wait_for(lambda: api.get("Secret", namespace, "sentiment-keys"), what="the gateway's keys")
    wait_for(lambda: api.condition("ModelVersion", namespace, "sentiment-v3", "Verified"), what="the version's status")
    wait_for(lambda: api.list("Event", namespace), what="an event")
    api.delete("ModelDeployment", namespace, "sentiment")
    assert operator.metric("tuneloop_operator_api_requests_total", code="403") == 0
    assert operator.metric("tuneloop_operator_errors_total", **{"class": "forbidden"}) == 0
    assert operator.metric("tuneloop_operator_api_requests_total", verb="create", code="201") > 5


# --- approvals --------------------------------------------------------------------------------------


class Someone:
    """Requests in the name of a user who has a cluster role in the namespace."""

    def __init__(self, api: Api, namespace: str, user: str, role: str | None) -> None:
        self.namespace = namespace
        self.pool, self.server, self.user = api._pool, api.server, user
        if role is not None:
            binding = {
                "metadata": {"name": user},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
                "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
            }
            api.call("POST", f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings", binding)
            wait_for(lambda: may(api, user, namespace, "create", "tuneloop.dev", "modelversions"), what="the binding to be in force")

    def send(self, method: str, manifest: Manifest, query: str = "") -> str:
        """What the refusal says; "" where there is none."""
        path = f"/apis/tuneloop.dev/v1alpha1/namespaces/{self.namespace}/modelversions"
        path += "" if method == "POST" else f"/{MODEL_VERSION['metadata']['name']}"
        kind = "application/json" if method == "POST" else "application/merge-patch+json"
        answer = self.pool.request(
            method, self.server + path + query, body=json.dumps(manifest), headers={"Content-Type": kind, "Impersonate-User": self.user}
        )
        return "" if answer.status < 300 else str(json.loads(answer.data)["message"])


def with_approval(approval: str) -> Manifest:
    manifest = copy.deepcopy(MODEL_VERSION)
    manifest["spec"]["approval"] = approval
    return manifest


def approve(approval: str = "Approved") -> Manifest:
    return {"spec": {"approval": approval}}


@pytest.fixture
def guarded(api: Api, release: tuple[str, str], namespace: str) -> Manifest:
    """A pending version in a namespace where the policy is in force."""
    editor = Someone(api, namespace, "first-editor", "edit")
    refused = lambda: "only by who has the verb approve" in editor.send("POST", with_approval("Approved"), "?dryRun=All")  # noqa: E731
    wait_for(refused, what="the policy to be in force")
    path = f"/apis/tuneloop.dev/v1alpha1/namespaces/{namespace}/modelversions"
    return api.call("POST", path, MODEL_VERSION)


@pytest.mark.usefixtures("guarded")
def test_who_may_edit_may_not_approve_and_reads_why(api: Api, namespace: str) -> None:
    editor = Someone(api, namespace, "editor", "edit")
    for approval in ("Approved", "Rejected", "Withdrawn"):
        refused = editor.send("PATCH", approve(approval))
        assert (
            f"spec.approval may be changed to {approval} only by who has the verb approve on modelversions in namespace {namespace}"
            in refused
        )
        assert "editor has not" in refused
    assert editor.send("PATCH", {"metadata": {"labels": {"a": "b"}}}) == ""
    assert editor.send("PATCH", approve("Pending")) == ""


@pytest.mark.usefixtures("guarded")
def test_admins_of_the_namespace_approve(api: Api, namespace: str) -> None:
    assert wait_for(lambda: Someone.send(_admin(api, namespace), "PATCH", approve()) == "", what="the aggregated role")


def _admin(api: Api, namespace: str) -> Someone:
    try:
        return Someone(api, namespace, "admin-of-one", "admin")
    except ApiAnswer:
        return Someone(api, namespace, "admin-of-one", None)


@pytest.mark.usefixtures("guarded")
def test_the_operator_approves_and_creates_approved_versions(api: Api, release: tuple[str, str], namespace: str) -> None:
    name, home = release
    operator = Someone(api, namespace, f"system:serviceaccount:{home}:{name}-operator", None)
    second = with_approval("Approved")
    second["metadata"]["name"], second["spec"]["version"] = "sentiment-v4", 4
    assert operator.send("POST", second) == ""


@pytest.mark.usefixtures("guarded")
def test_who_may_edit_creates_pending_versions(api: Api, namespace: str) -> None:
    editor = Someone(api, namespace, "importer", "edit")
    second = with_approval("Pending")
    second["metadata"]["name"], second["spec"]["version"] = "sentiment-v5", 5
    assert editor.send("POST", second) == ""


# --- life of a release ------------------------------------------------------------------------------


def test_upgrade_takes_new_crds_and_uninstall_keeps_them_and_their_objects(helm: Helm, api: Api, namespace: str) -> None:
    name = f"tuneloop-{uuid.uuid4().hex[:6]}"
    where = (name, CHART, "-n", namespace)
    helm.run("install", *where, "--take-ownership")
    job = {**FINE_TUNE_JOB, "metadata": {"name": "kept", "namespace": namespace}}
    api.create(job)
    crd = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.tuneloop.dev"
    api.call("PATCH", crd, {"spec": {"names": {"shortNames": ["old"]}}}, "application/merge-patch+json")
    helm.run("upgrade", *where, "--set", "operator.workers=4", "--force")
    assert api.call("GET", crd)["spec"]["names"]["shortNames"] == ["ftj"]
    helm.run("uninstall", name, "-n", namespace)
    assert api.get("Deployment", namespace, f"{name}-operator") is None
    assert api.get("FineTuneJob", namespace, "kept") is not None
