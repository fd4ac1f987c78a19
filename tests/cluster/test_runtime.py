"""The runtime on a real API server, with a kind of its own: fields and their owners, prune, conflicts, drift."""

from __future__ import annotations

from typing import Any

import pytest
from tests.cluster.conftest import Start
from tests.cluster.harness import Api, OperatorProcess, wait_for
from tests.cluster.toy import data, edit, settled, widget

from tuneloop_operator.render.names import HASH_LABEL

Object = dict[str, Any]
TOY = "tests.cluster.toy"
MANAGED = "app.kubernetes.io/managed-by"


pytestmark = [pytest.mark.usefixtures("widgets"), pytest.mark.xdist_group("widgets")]


@pytest.fixture(scope="module")
def toy(widgets: None, shared_operator: Start) -> OperatorProcess:
    return shared_operator(module=TOY)


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


def test_probes_and_metrics_answer(api: Api, namespace: str, toy: OperatorProcess) -> None:
    api.create(widget("w", namespace))
    settled(api, namespace)
    assert toy.probe("/healthz")[0] == toy.probe("/readyz")[0] == 200
    assert toy.metric("tuneloop_operator_leader") == 1
    assert toy.metric("tuneloop_operator_passes_total", kind="Widget", outcome="changed") >= 1
    assert toy.metric("tuneloop_operator_api_requests_total", verb="create", code="201") >= 3
    assert toy.metric("tuneloop_operator_cached_objects", kind="Widget") >= 1
