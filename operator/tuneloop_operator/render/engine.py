"""The vLLM engine of a revision: its pod template (pinned in the revision), Deployment, Service, guard and disruption budget.

A merged model is its engine's own. An adapter is not: versions with the same base, claims and rank share an engine, whose replicas load
their adapters when the gateway says so.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from tuneloop_gateway.contract import ENGINE_PORT, SECRETS_PATH, Adapter
from tuneloop_operator.api.engineoptions import option_arguments
from tuneloop_operator.api.modeldeployment import Engine, ModelDeployment
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.render import groups, names, pods
from tuneloop_operator.render.revisions import Group, Pinned
from tuneloop_operator.render.training import HUB_TOKEN
from tuneloop_operator.settings import Settings

Json = dict[str, Any]
COMPONENT = "engine"
GUARD_FILE = "engine_guard.py"
GUARD_PATH = "/etc/tuneloop/guard"
VERIFY = "verify"
"""Name of the init container that compares the model's files with their digest."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's; 1 is left out, since it saves nothing over 8."""
ADAPTERS_AT_ONCE = 2
"""In one batch: the stable one and a canary."""
ADAPTERS_KEPT = 4
"""In the host's memory; what drains stays, so that going back loads nothing."""
PRE_STOP_SECONDS = 5
"""Endpoints are taken out of rotation meanwhile."""
DRAIN_SECONDS = 45
"""Running requests may end; vLLM's own default would abort them."""
GRACE_SECONDS = PRE_STOP_SECONDS + DRAIN_SECONDS + 10


def engine_labels(deployment: str, engine_hash: str) -> dict[str, str]:
    return names.labels(COMPONENT, deployment, **{names.DEPLOYMENT_LABEL: deployment, names.ENGINE_LABEL: engine_hash})


def engine_selector(deployment: str, engine_hash: str) -> dict[str, str]:
    return {names.DEPLOYMENT_LABEL: deployment, names.ENGINE_LABEL: engine_hash}


def serving_selector(deployment: str, pinned: Pinned) -> dict[str, str]:
    """The pods that are asked: of a group, the leader."""
    leader = {"app.kubernetes.io/component": COMPONENT} if pinned.group is not None else {}
    return engine_selector(deployment, pinned.engine_hash) | leader


# --- the pod -----------------------------------------------------------------


def render_templates(deployment: ModelDeployment, version: ModelVersion, engine_hash: str, settings: Settings) -> tuple[Json, Group | None]:
    """The pod template of one engine; where a replica has several nodes, of its leader, and the rest of its group."""
    template, nodes = render_template(deployment, version, engine_hash, settings), deployment.spec.engine.nodes_per_replica
    return groups.divided(template, nodes) if nodes > 1 else (template, None)


def render_template(deployment: ModelDeployment, version: ModelVersion, engine_hash: str, settings: Settings) -> Json:
    """The model's files are verified before the engine may read them."""
    engine = deployment.spec.engine
    image = engine_image(engine, settings)
    claims = claims_of(version)
    volumes, mounts = pods.claim_mounts(written=(), read=claims)
    guard = pods.read_only_mount("guard", GUARD_PATH)
    caches = [] if engine.compile_cache is None else [names.parse_pvc(engine.compile_cache.uri)[0]]
    written = [pods.claim_mount(claim, read_only=False) for claim in caches]
    secret = names.gateway_secret(deployment.metadata.name)
    template: Json = {
        "metadata": {"labels": engine_labels(deployment.metadata.name, engine_hash)},
        "spec": {
            **pods.pod_defaults(settings, settings.engine_user),
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            **_verified(version, image, [*mounts, guard], settings),
            "containers": [_server(deployment, version, image, [*mounts, *written, guard], settings)],
            "volumes": [
                *volumes,
                *(pods.claim_volume(claim) for claim in caches),
                pods.config_volume("guard", names.engine(deployment.metadata.name, engine_hash)),
                pods.secret_volume("secrets", secret, ["engine-key"]),
                *pods.scratch_volumes(),
            ],
        },
    }
    return pods.with_overrides(template, engine.pod)


def engine_image(engine: Engine, settings: Settings) -> str:
    if engine.image is not None:
        return engine.image
    on_cpu = engine.accelerators_per_replica == 0
    return settings.engine_cpu_image if on_cpu and settings.engine_cpu_image else settings.engine_image


def is_adapter(version: ModelVersion) -> bool:
    return version.spec.artifact.format == "Adapter" and version.spec.base is not None


def claims_of(version: ModelVersion) -> list[str]:
    uris = [version.spec.artifact.uri, version.spec.probes_uri, version.spec.reference_uri, base_uri(version)]
    return sorted({names.parse_pvc(uri)[0] for uri in uris if uri is not None and uri.startswith("pvc://")})


def base_uri(version: ModelVersion) -> str | None:
    """Where the engine finds the base of an adapter: on a claim where it can, else on the hub. None for a model that is complete."""
    if not is_adapter(version) or version.spec.base is None:
        return None
    return version.spec.base.snapshot_uri or version.spec.base.source.uri


def adapter(version: ModelVersion) -> Adapter | None:
    """What the replicas of the shared engine load for it; None for a model that is its engine's own."""
    if not is_adapter(version):
        return None
    artifact, probes, reference = version.spec.artifact, version.spec.probes_uri, version.spec.reference_uri
    return Adapter(
        path=names.pvc_path(artifact.uri),
        digest=artifact.manifest_digest,
        probes=names.pvc_path(probes) if probes is not None else None,
        reference=names.pvc_path(reference) if reference is not None else None,
    )


def cache_problem(engine: Engine, version: ModelVersion) -> str | None:
    """A sentence where what compiles could write over the model."""
    claim = names.parse_pvc(engine.compile_cache.uri)[0] if engine.compile_cache is not None else None
    if claim not in claims_of(version):
        return None
    return f"Field engine.compileCache.uri cannot be on the claim '{claim}', where the model's files are: name another claim."


def _is_on_claim(uri: str | None) -> TypeGuard[str]:
    return uri is not None and uri.startswith("pvc://")


def _verified(version: ModelVersion, image: str, mounts: list[Json], settings: Settings) -> Json:
    """Fails closed: the engine starts only after every file was hashed and equals the manifest of this digest. Of an adapter's engine
    that is the base; adapters are verified when they are loaded."""
    artifact, base = version.spec.artifact, base_uri(version)
    if not is_adapter(version):
        command = ["verify", names.pvc_path(artifact.uri), artifact.manifest_digest]
    elif _is_on_claim(base) and version.spec.base is not None and version.spec.base.digest is not None:
        command = ["verify-base", names.pvc_path(base), version.spec.base.digest]
    else:
        return {}
    return {"initContainers": [_verifier(command, image, mounts, settings)]}


def _verifier(command: list[str], image: str, mounts: list[Json], settings: Settings) -> Json:
    return {
        "name": VERIFY,
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python3", f"{GUARD_PATH}/{GUARD_FILE}", *command],
        "resources": pods.resources({"cpu": "100m", "memory": "128Mi"}, None),
        "securityContext": pods.container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def _server(deployment: ModelDeployment, version: ModelVersion, image: str, mounts: list[Json], settings: Settings) -> Json:
    engine = deployment.spec.engine
    on_cpu = engine.accelerators_per_replica == 0
    devices = (engine.accelerator_resource, engine.accelerators_per_replica)
    return {
        "name": COMPONENT,
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": list(settings.engine_command),
        # `python3 -m` imports from here; PYTHONPATH is the image's own business.
        "workingDir": GUARD_PATH,
        "args": _arguments(engine, version),
        "env": [*_environment(engine, version, on_cpu=on_cpu), *_compilation(engine, on_cpu=on_cpu)],
        "ports": [{"name": "http", "containerPort": ENGINE_PORT}],
        "resources": pods.resources({"cpu": "500m", "memory": "4Gi"}, engine.pod.resources, devices),
        "securityContext": pods.container_security(),
        "startupProbe": pods.http_probe("/health", ENGINE_PORT, period=2, timeout=5, failures=engine.startup_timeout_seconds // 2),
        # A busy engine answers late: 100 s of silence. The guard's 503, of one that stands still, counts every 5 s, and is not drained.
        "livenessProbe": {
            **pods.http_probe("/health", ENGINE_PORT, period=5, timeout=25, failures=4),
            "terminationGracePeriodSeconds": PRE_STOP_SECONDS + 5,
        },
        "readinessProbe": pods.http_probe("/health", ENGINE_PORT, period=2, timeout=2, failures=3),
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [*mounts, pods.read_only_mount("secrets", SECRETS_PATH), *pods.scratch_mounts()],
    }


def model_id(version: ModelVersion) -> str:
    """What the engine calls it. An adapter's bytes have a name of their own: an engine holds several, and caches by name."""
    if not is_adapter(version):
        return version.spec.model
    artifact = version.spec.artifact
    return f"{version.spec.model}-v{version.spec.version}-{artifact.manifest_digest.removeprefix('sha256:')[:12]}"


def _arguments(engine: Engine, version: ModelVersion) -> list[str]:
    arguments = [
        *_model_arguments(version),
        "--port", str(ENGINE_PORT),
        "--middleware", "engine_guard.Guard",
        "--shutdown-timeout", str(DRAIN_SECONDS),
        "--disable-access-log-for-endpoints", "/health,/metrics",
    ]  # fmt: skip
    if engine.max_model_length is not None:
        arguments += ["--max-model-len", str(engine.max_model_length)]
    return arguments + option_arguments(groups.parallel_options(engine) | engine.options)


def _model_arguments(version: ModelVersion) -> list[str]:
    """Merged: the artifact is the model. Adapter: the base is, with room for adapters that come later."""
    name = version.spec.model
    if not is_adapter(version) or version.spec.base is None:
        return ["--model", names.pvc_path(version.spec.artifact.uri), "--served-model-name", name]
    base = base_uri(version) or ""
    model = ["--model", names.pvc_path(base) if _is_on_claim(base) else base.removeprefix("hf://")]
    revision = version.spec.base.source.revision
    if revision is not None and not _is_on_claim(base):
        model += ["--revision", revision]
    return [
        *model,
        "--served-model-name", f"{name}-base",
        "--enable-lora",
        "--max-lora-rank", str(lora_rank(version)),
        "--max-loras", str(ADAPTERS_AT_ONCE),
        "--max-cpu-loras", str(ADAPTERS_KEPT),
    ]  # fmt: skip


def lora_rank(version: ModelVersion) -> int:
    """The adapter's rank rounded up to one that vLLM takes; 32, the job's default, where neither version nor lineage says."""
    if version.spec.artifact.rank is not None:
        return _rounded_rank(version.spec.artifact.rank)
    lineage = version.spec.lineage
    method = lineage.spec.get("method") if lineage is not None else None
    lora = method.get("lora") if isinstance(method, dict) else None
    rank = lora.get("rank") if isinstance(lora, dict) else None
    return _rounded_rank(rank if isinstance(rank, int) else 32)


def _rounded_rank(rank: int) -> int:
    return next((size for size in LORA_RANKS if size >= rank), LORA_RANKS[-1])


def _environment(engine: Engine, version: ModelVersion, *, on_cpu: bool) -> list[Json]:
    base = base_uri(version)
    from_hub, cache = base is not None and not _is_on_claim(base), engine.compile_cache
    variables = [
        *(pods.scratch_environment(names.pvc_path(cache.uri)) if cache is not None else pods.scratch_environment()),
        pods.value("VLLM_ENGINE_READY_TIMEOUT_S", str(engine.startup_timeout_seconds)),
        pods.value("PYTHONDONTWRITEBYTECODE", "1"),
        pods.value("TUNELOOP_ENGINE_KEY_FILE", f"{SECRETS_PATH}/engine-key"),
        pods.value("VLLM_NO_USAGE_STATS", "1"),
        pods.value("VLLM_MAX_N_SEQUENCES", "64"),
    ]
    if is_adapter(version):  # the guard alone reaches the endpoints that this opens
        variables.append(pods.value("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1"))
    if version.spec.probes_uri is not None and not is_adapter(version):
        variables.append(pods.value("TUNELOOP_PROBES_FILE", names.pvc_path(version.spec.probes_uri)))
    if version.spec.reference_uri is not None and not is_adapter(version):
        variables.append(pods.value("TUNELOOP_REFERENCE_FILE", names.pvc_path(version.spec.reference_uri)))
    if not from_hub:
        variables.append(pods.value("HF_HUB_OFFLINE", "1"))
    elif version.spec.base is not None and version.spec.base.source.secret_ref is not None:
        variables.append(pods.from_secret("HF_TOKEN", version.spec.base.source.secret_ref.name, HUB_TOKEN))
    if on_cpu:
        variables.append(pods.value("VLLM_CPU_KVCACHE_SPACE", "1"))
    return variables


def _compilation(engine: Engine, *, on_cpu: bool) -> list[Json]:
    """`enforce-eager` leaves what a request for logprobs compiles: on a CPU image without a compiler it would end the engine."""
    is_eager = on_cpu and engine.options.get("enforce-eager") == "true"
    return [pods.value("TORCHDYNAMO_DISABLE", "1")] if is_eager else []


# --- what runs it ------------------------------------------------------------


def render_engine(deployment: ModelDeployment, pinned: Pinned, replicas: int) -> Json:
    """The Deployment of an engine, or its LeaderWorkerSet. Its template never changes: another one has another hash, hence another name."""
    name = deployment.metadata.name
    if pinned.group is not None:
        return groups.render_group(_metadata(deployment, pinned.engine_hash), pinned.template, pinned.group, replicas)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(deployment, pinned.engine_hash),
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": engine_selector(name, pinned.engine_hash)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": pinned.startup_timeout_seconds + 300,
            "template": pinned.template,
        },
    }


def render_engine_service(deployment: ModelDeployment, pinned: Pinned) -> Json:
    """Its EndpointSlices are what the gateway routes over."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(deployment, pinned.engine_hash),
        "spec": {
            "type": "ClusterIP",
            "selector": serving_selector(deployment.metadata.name, pinned),
            "ports": [{"name": "http", "port": ENGINE_PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def render_guard(deployment: ModelDeployment, engine_hash: str, source: str) -> Json:
    """The middleware that keeps everybody but the gateway out. Written once for an engine: an upgrade of ours leaves it as it is."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(deployment, engine_hash), "data": {GUARD_FILE: source}}


def render_engine_budget(deployment: ModelDeployment, engine_hash: str) -> Json:
    """Workers are counted, too: whoever evicts one ends its group."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(deployment, engine_hash),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": engine_selector(deployment.metadata.name, engine_hash)}},
    }


def _metadata(deployment: ModelDeployment, engine_hash: str) -> Json:
    return {
        "name": names.engine(deployment.metadata.name, engine_hash),
        "namespace": deployment.metadata.namespace,
        "labels": engine_labels(deployment.metadata.name, engine_hash),
    }
