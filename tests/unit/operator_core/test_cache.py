"""The cache: newest wins, the dead stay dead, indices follow."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneloop_operator.cluster.cache import Cache, Sharing
from tuneloop_operator.domain.decision import Key
from tuneloop_operator.render.names import DEPLOYMENT_LABEL


def make(name: str, version: int, uid: str = "", namespace: str = "n", owner: str | None = None, **labels: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "uid": uid or f"uid-{name}",
        "resourceVersion": str(version),
        "labels": labels,
    }
    if owner:
        metadata["ownerReferences"] = [{"kind": "Widget", "name": "w", "uid": owner, "controller": True}]
    return {"metadata": metadata}


@pytest.fixture
def cache() -> Cache:
    return Cache()


def names(objects: list[dict[str, Any]]) -> list[str]:
    return [obj["metadata"]["name"] for obj in objects]


def test_only_newer_news_are_taken(cache: Cache) -> None:
    assert cache.put("Job", make("a", 5))
    assert not cache.put("Job", make("a", 5))
    assert not cache.put("Job", make("a", 4))
    assert cache.put("Job", make("a", 10)), "10 is newer than 5: numbers, not text"


def test_late_news_do_not_raise_the_dead(cache: Cache) -> None:
    cache.put("Job", make("a", 5))
    assert cache.remove("Job", make("a", 9))
    assert not cache.put("Job", make("a", 6)), "the answer of a write that was carried out before the deletion"
    assert cache.get("Job", "n", "a") is None


def test_a_name_can_be_born_again(cache: Cache) -> None:
    cache.put("Job", make("a", 5))
    cache.put("Job", make("a", 12, uid="second"))
    assert not cache.remove("Job", make("a", 9)), "the late news of the first one's end"
    assert cache.get("Job", "n", "a")


def test_objects_are_found_by_owner_and_by_label(cache: Cache) -> None:
    cache.put("Job", make("b", 1, owner="u1", **{DEPLOYMENT_LABEL: "train", "colour": "red"}))
    cache.put("Job", make("a", 2, owner="u1", **{DEPLOYMENT_LABEL: "train", "colour": "blue"}))
    cache.put("Job", make("c", 3, owner="u2", **{DEPLOYMENT_LABEL: "prepare"}))
    cache.put("Job", make("d", 4, namespace="m", owner="u1", **{DEPLOYMENT_LABEL: "train"}))
    assert names(cache.owned("Job", "n", "u1")) == ["a", "b"]
    assert names(cache.list("Job", "n", {DEPLOYMENT_LABEL: "train"})) == ["a", "b"]
    assert names(cache.list("Job", "n", {DEPLOYMENT_LABEL: "train", "colour": "red"})) == ["b"]
    assert names(cache.list("Job", None, {DEPLOYMENT_LABEL: "train"})) == ["d", "a", "b"], "ordered by namespace and name"
    assert names(cache.list("Job", "n", {"colour": "blue"})) == ["a"]
    assert cache.list("Job", "n", {DEPLOYMENT_LABEL: "package"}) == []
    assert names(cache.list("Job")) == ["d", "a", "b", "c"]


def test_indices_follow_changes(cache: Cache) -> None:
    cache.put("Job", make("a", 1, owner="u1", **{DEPLOYMENT_LABEL: "train"}))
    cache.put("Job", make("a", 2, owner="u2", **{DEPLOYMENT_LABEL: "package"}))
    assert cache.owned("Job", "n", "u1") == cache.list("Job", "n", {DEPLOYMENT_LABEL: "train"}) == []
    assert names(cache.owned("Job", "n", "u2")) == ["a"]
    cache.remove("Job", make("a", 3))
    assert cache.owned("Job", "n", "u2") == cache.list("Job", "n", {DEPLOYMENT_LABEL: "package"}) == []


def test_a_sweep_takes_what_the_list_lacks_and_spares_what_came_after_it(cache: Cache) -> None:
    for name, version in (("gone", 3), ("there", 4), ("new", 9)):
        cache.put("Job", make(name, version))
    cache.put("Job", make("elsewhere", 2, namespace="m"))
    swept = cache.sweep("Job", [("n", "there")], version=7, namespaces=("n",))
    assert names(swept) == ["gone"]
    assert names(cache.list("Job")) == ["elsewhere", "new", "there"]


def test_managed_fields_are_kept_where_somebody_reads_them(cache: Cache) -> None:
    obj = make("a", 1)
    obj["metadata"]["managedFields"] = [
        {"manager": "tuneloop", "operation": "Update", "fieldsV1": {"f:data": {}}, "time": "…"},
        {"manager": "kubectl", "operation": "Update", "fieldsV1": {"f:data": {"f:x": {}}}},
        {"manager": "kube-controller-manager", "operation": "Update", "subresource": "status", "fieldsV1": {"f:status": {}}},
        {"manager": "tuneloop-status", "operation": "Apply", "subresource": "status", "fieldsV1": {"f:status": {"f:phase": {}}}},
    ]
    cache.put("Job", obj)
    kept = (cache.get("Job", "n", "a") or {})["metadata"]["managedFields"]
    assert [entry["manager"] for entry in kept] == ["tuneloop", "kubectl", "kube-controller-manager", "tuneloop-status"], "places are kept"
    assert [("fieldsV1" in entry) for entry in kept] == [False, True, False, True]


def test_keys_name_every_object(cache: Cache) -> None:
    cache.put("Widget", make("a", 1))
    assert list(cache.keys("Widget")) == [Key("Widget", "n", "a")]
    assert list(cache.keys("Job")) == []


def test_equal_parts_of_objects_are_one(cache: Cache) -> None:
    for name in ("a", "b"):
        cache.put("Job", {**make(name, 1), "spec": {"tolerations": [{"key": "gpu", "seconds": 3}], "suspend": name == "a"}})
    a, b = cache.get("Job", "n", "a"), cache.get("Job", "n", "b")
    assert a is not None
    assert b is not None
    assert a["spec"]["tolerations"][0] is b["spec"]["tolerations"][0]
    assert (a["spec"]["suspend"], b["spec"]["suspend"]) == (True, False)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["", "a", "b", "x" * 70]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "0"]), inner, max_size=3),
)


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b"]), VALUES), max_size=12), st.integers(0, 20))
def test_sharing_changes_no_object(objects: list[dict[str, Any]], limit: int) -> None:
    sharing = Sharing(limit)
    texts = [json.dumps(obj) for obj in objects]
    assert [json.dumps(shared) for shared in [sharing.of(json.loads(text)) for text in texts]] == texts
