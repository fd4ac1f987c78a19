"""The runtime on a real API server, with a kind of its own: fields and their owners, prune, conflicts, drift, restarts, writes."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest
from tests.cluster.conftest import Start, install
from tests.cluster.harness import Api, OperatorProcess, wait_for
from tests.cluster.toy import CRD, widget

from tuneloop_operator.render.names import HASH_LABEL

Object = dict[str, Any]
TOY = "tests.cluster.toy"
MANAGED = "app.kubernetes.io/managed-by"


@pytest.fixture(scope="module", autouse=True)
def widgets(api: Api) -> None:
    install(api, CRD)


@pytest.fixture(scope="module")
def toy(widgets: None, shared_operator: Start) -> OperatorProcess:
    return shared_operator(module=TOY)


@pytest.fixture
def alone(start_operator: Start) -> OperatorProcess:
    """An operator of the test's own, whose writes are counted."""
    return start_operator(module=TOY)


def writes(operator: OperatorProcess) -> float:
    """Requests that may write, the Lease's apart."""
    verbs = ("create", "apply", "patch", "delete")
    return sum(operator.metric("tuneloop_operator_api_requests_total", verb=verb) for verb in verbs)


def quiet(operator: OperatorProcess) -> float:
    """Waits until a second has passed without a write; returns the number of writes so far."""

    def unchanged() -> float:
        before = writes(operator)
        time.sleep(1.0)
        assert writes(operator) == before
        return before + 1

    return wait_for(unchanged) - 1


def edit(api: Api, namespace: str, **spec: Any) -> None:
    """Replaces the whole spec."""
    current = api.get("Widget", namespace, "w")
    assert current is not None
    api.call("PUT", f"/apis/tuneloop.dev/v1alpha1/namespaces/{namespace}/widgets/w", {**current, "spec": spec})


def settled(api: Api, namespace: str) -> Object:
    """Waits until the status speaks of the newest generation and all children are there."""

    def holds() -> Object:
        found = api.get("Widget", namespace, "w")
        assert found is not None
        assert found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"]
        assert found["status"]["conditions"][0]["reason"] == "Made", found["status"]
        assert api.get("ConfigMap", namespace, "w-settings")
        assert api.get("Job", namespace, "w-work-1")
        return found

    return wait_for(holds)


def data(api: Api, namespace: str) -> dict[str, str] | None:
    return (api.get("ConfigMap", namespace, "w-settings") or {}).get("data")


def test_a_registered_kind_is_reconciled(api: Api, namespace: str, toy: OperatorProcess) -> None:
    api.create(widget("w", namespace, settings={"colour": "green"}))
    found = settled(api, namespace)
    child = api.get("ConfigMap", namespace, "w-settings")
    assert child is not None
    assert child["data"] == {"colour": "green"}
    assert child["metadata"]["labels"][HASH_LABEL]
    owner = child["metadata"]["ownerReferences"][0]
    assert (owner["uid"], owner["controller"]) == (found["metadata"]["uid"], True)
    assert "nothing" not in found["status"]
    managers = {(m["manager"], m.get("subresource")) for m in found["metadata"]["managedFields"]}
    assert ("tuneloop-status", "status") in managers
    assert "annotations" not in found["metadata"]
    assert "finalizers" not in found["metadata"]


def test_an_edit_reaches_the_child_and_what_was_removed_goes(api: Api, namespace: str, toy: OperatorProcess) -> None:
    api.create(widget("w", namespace, settings={"colour": "green", "size": "2"}))
    settled(api, namespace)
    for settings in ({"colour": "red"}, {"shape": "round"}, {"shape": "flat", "size": "3"}):
        edit(api, namespace, settings=settings)
        wait_for(lambda wanted=settings: data(api, namespace) == wanted)  # type: ignore[misc]


def test_nothing_is_written_while_nothing_changes(api: Api, namespace: str, alone: OperatorProcess) -> None:
    api.create(widget("w", namespace, settings={"colour": "green"}, records=2, requeueAfter=0.2))
    settled(api, namespace)
    before = quiet(alone)
    passes = alone.metric("tuneloop_operator_passes_total")
    wait_for(lambda: alone.metric("tuneloop_operator_passes_total") >= passes + 2)
    assert writes(alone) == before


def test_a_restart_writes_nothing(api: Api, namespace: str, start_operator: Start) -> None:
    first = start_operator(module=TOY)
    api.create(widget("w", namespace, settings={"colour": "green"}, extras=["a"]))
    settled(api, namespace)
    edit(api, namespace, settings={"colour": "red"}, extras=["a"])
    wait_for(lambda: data(api, namespace) == {"colour": "red"})
    quiet(first)
    assert first.stop() == 0
    second = start_operator(module=TOY)
    wait_for(lambda: second.metric("tuneloop_operator_passes_total") >= 1)
    quiet(second)
    answered = second.metric("tuneloop_operator_api_requests_total", verb="create", code="409")
    assert writes(second) == answered == 1  # the Secret cannot be read: it is asked for once, and there


def test_a_hand_edited_child_is_put_right_and_foreign_fields_stay(api: Api, namespace: str, toy: OperatorProcess) -> None:
    api.create(widget("w", namespace, settings={"colour": "green"}))
    settled(api, namespace)
    for broken in (
        {"data": {"colour": "mauve"}},
        {"data": {"colour": None}},
        {"metadata": {"labels": {"app.kubernetes.io/component": "x"}}},
    ):
        api.patch(
            "ConfigMap", namespace, "w-settings", {**broken, "metadata": {**broken.get("metadata", {}), "annotations": {"theirs": "1"}}}
        )

        def restored() -> bool:
            child = api.get("ConfigMap", namespace, "w-settings")
            assert child is not None
            assert child["metadata"]["labels"]["app.kubernetes.io/component"] == "settings"
            return child.get("data") == {"colour": "green"} and child["metadata"]["annotations"] == {"theirs": "1"}

        wait_for(restored, 5)


def test_a_child_without_its_label_or_owner_is_taken_back(api: Api, namespace: str, toy: OperatorProcess) -> None:
    api.create(widget("w", namespace, settings={"colour": "green"}))
    uid = settled(api, namespace)["metadata"]["uid"]
    first = api.get("ConfigMap", namespace, "w-settings")
    assert first is not None
    for broken in ({"labels": {MANAGED: None}}, {"ownerReferences": None}, {"labels": {MANAGED: "helm"}}):
        api.patch("ConfigMap", namespace, "w-settings", {"metadata": broken})

        def restored() -> bool:
            child = api.get("ConfigMap", namespace, "w-settings")
            assert child is not None
            assert child["metadata"]["labels"].get(MANAGED) == "tuneloop"
            return [o["uid"] for o in child["metadata"].get("ownerReferences", [])] == [uid]

        wait_for(restored, 5)
    last = api.get("ConfigMap", namespace, "w-settings")
    assert last is not None
    assert last["metadata"]["uid"] == first["metadata"]["uid"]


def test_a_deleted_child_is_made_again(api: Api, namespace: str, toy: OperatorProcess) -> None:
    api.create(widget("w", namespace))
    settled(api, namespace)
    for kind, name in (("ConfigMap", "w-settings"), ("Job", "w-work-1")):
        old = api.get(kind, namespace, name)
        assert old is not None
        api.delete(kind, namespace, name)
        wait_for(lambda k=kind, n=name, o=old: (api.get(k, namespace, n) or o)["metadata"]["uid"] != o["metadata"]["uid"], 5)  # type: ignore[misc]


def test_what_is_no_longer_wanted_is_pruned(api: Api, namespace: str, toy: OperatorProcess) -> None:
    api.create(widget("w", namespace, extras=["a", "b"]))
    settled(api, namespace)
    wait_for(lambda: api.get("ConfigMap", namespace, "w-extra-a") and api.get("ConfigMap", namespace, "w-extra-b"))
    edit(api, namespace, extras=["b"])
    wait_for(lambda: api.get("ConfigMap", namespace, "w-extra-a") is None)
    assert api.get("ConfigMap", namespace, "w-extra-b")


def test_a_name_that_is_taken_is_a_condition_and_never_overwritten(api: Api, namespace: str, toy: OperatorProcess) -> None:
    theirs = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "w-settings", "namespace": namespace}, "data": {"theirs": "1"}}
    api.create(theirs)
    api.create(widget("w", namespace, settings={"colour": "green"}, requeueAfter=1))
    condition = api.wait_for_condition("Widget", namespace, "w", "Ready", "False", "NameConflict")
    assert condition["message"] == "w-settings"
    assert data(api, namespace) == {"theirs": "1"}
    assert api.get("Job", namespace, "w-work-1"), "its other children are made all the same"
    api.delete("ConfigMap", namespace, "w-settings")
    settled(api, namespace)
    assert data(api, namespace) == {"colour": "green"}


def test_what_must_exist_once_is_counted_first_and_outlives_its_maker(api: Api, namespace: str, toy: OperatorProcess) -> None:
    api.create(widget("w", namespace, records=3))
    settled(api, namespace)
    wait_for(lambda: api.get("ConfigMap", namespace, "w-record-3"))
    made = api.get("Secret", namespace, "w-key")
    assert made is not None
    assert made["metadata"]["ownerReferences"], "a Secret goes with its owner"
    api.delete("Widget", namespace, "w")
    wait_for(lambda: api.get("ConfigMap", namespace, "w-settings") is None and api.get("Job", namespace, "w-work-1") is None)
    assert [bool(api.get("ConfigMap", namespace, f"w-record-{n}")) for n in (1, 2, 3, 4)] == [True, True, True, False]


def test_conditions_of_others_stay(api: Api, namespace: str, alone: OperatorProcess) -> None:
    api.create(widget("w", namespace))
    settled(api, namespace)
    foreign = {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "Widget", "metadata": {"name": "w", "namespace": namespace}}
    foreign["status"] = {"conditions": [{"type": "Audited", "status": "True"}]}  # type: ignore[assignment]
    path = f"/apis/tuneloop.dev/v1alpha1/namespaces/{namespace}/widgets/w/status?fieldManager=auditor"
    api.call("PATCH", path, foreign, "application/apply-patch+yaml")
    edit(api, namespace, records=2)
    wait_for(lambda: (api.get("Widget", namespace, "w") or {})["status"]["records"] == 2)
    assert api.condition("Widget", namespace, "w", "Audited") == {"type": "Audited", "status": "True"}
    before = quiet(alone)
    api.patch_status("Widget", namespace, "w", {"records": 7})  # ours, set by somebody else
    wait_for(lambda: (api.get("Widget", namespace, "w") or {})["status"]["records"] == 2)
    assert quiet(alone) > before


def test_of_a_job_only_suspend_is_changed(api: Api, namespace: str, alone: OperatorProcess) -> None:
    api.create(widget("w", namespace, image="example.invalid/one"))
    settled(api, namespace)
    uid = (api.get("Job", namespace, "w-work-1") or {})["metadata"]["uid"]
    edit(api, namespace, image="example.invalid/two", suspend=False)
    wait_for(lambda: (api.get("Job", namespace, "w-work-1") or {})["spec"]["suspend"] is False)
    job = api.get("Job", namespace, "w-work-1")
    assert job is not None
    assert job["metadata"]["uid"] == uid
    assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "example.invalid/one"
    quiet(alone)
    assert alone.metric("tuneloop_operator_errors_total", **{"class": "refused"}) == 0


def test_an_event_is_written_once_per_change_of_state(api: Api, namespace: str, toy: OperatorProcess) -> None:
    api.create(widget("w", namespace))
    settled(api, namespace)
    for records in (1, 2):
        edit(api, namespace, records=records)
        wait_for(lambda n=records: (api.get("Widget", namespace, "w") or {})["status"]["records"] == n)  # type: ignore[misc]

    def ours() -> list[Object]:
        return [e for e in api.list("Event", namespace) if e["involvedObject"]["kind"] == "Widget"]

    events = wait_for(ours)
    assert [(e["reason"], e["message"], e["type"]) for e in events] == [("Made", "w is now Made", "Normal")]


def test_a_burst_of_edits_ends_in_the_last_one(api: Api, namespace: str, toy: OperatorProcess) -> None:
    api.create(widget("w", namespace, settings={"n": "0"}))
    settled(api, namespace)
    for n in (1, 2, 1, 3, 2, 4):
        api.patch("Widget", namespace, "w", {"spec": {"settings": {"n": str(n)}}})
    wait_for(lambda: data(api, namespace) == {"n": "4"})
    settled(api, namespace)
    assert data(api, namespace) == {"n": "4"}


def test_changes_made_while_the_operator_was_away_are_seen(api: Api, namespace: str, start_operator: Start) -> None:
    first = start_operator(module=TOY)
    api.create(widget("w", namespace, settings={"n": "0"}))
    settled(api, namespace)
    first.kill()
    edit(api, namespace, settings={"n": "1"})
    api.delete("Job", namespace, "w-work-1")
    api.create({**widget("v", namespace), "spec": {"settings": {"n": "2"}}})
    wait_for(lambda: api.get("Job", namespace, "w-work-1") is None)
    start_operator(module=TOY)
    wait_for(
        lambda: (
            data(api, namespace) == {"n": "1"} and api.get("Job", namespace, "w-work-1") and api.get("ConfigMap", namespace, "v-settings")
        )
    )


def test_it_stops_on_sigterm_and_hands_the_lease_over(api: Api, namespace: str, start_operator: Start) -> None:
    first = start_operator(module=TOY)
    api.create(widget("w", namespace))
    settled(api, namespace)
    first.send(signal.SIGTERM)
    assert first.wait(10) == 0
    lease = api.get("Lease", namespace, "tuneloop-operator")
    assert lease is not None
    assert lease["spec"].get("holderIdentity", "") == ""


def test_probes_and_metrics_answer(api: Api, namespace: str, toy: OperatorProcess) -> None:
    api.create(widget("w", namespace))
    settled(api, namespace)
    assert toy.probe("/healthz")[0] == toy.probe("/readyz")[0] == 200
    assert toy.metric("tuneloop_operator_leader") == 1
    assert toy.metric("tuneloop_operator_passes_total", kind="Widget", outcome="changed") >= 1
    assert toy.metric("tuneloop_operator_api_requests_total", verb="create", code="201") >= 3
    assert toy.metric("tuneloop_operator_cached_objects", kind="Widget") >= 1
