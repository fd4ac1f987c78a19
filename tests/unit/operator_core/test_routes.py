"""Which objects an event wakes."""

from __future__ import annotations

from typing import Any

import pytest

from tuneloop_operator.cluster.cache import Cache
from tuneloop_operator.cluster.registration import Registration
from tuneloop_operator.domain.decision import Key
from tuneloop_operator.runtime.routes import Routes


def obj(name: str, owner: tuple[str, str] | None = None, **labels: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "namespace": "n", "uid": f"uid-{name}", "resourceVersion": "1", "labels": labels}
    if owner:
        metadata["ownerReferences"] = [{"kind": owner[0], "name": owner[1], "uid": f"uid-{owner[1]}", "controller": True}]
    return {"metadata": metadata}


async def nothing(*_: Any) -> None:
    return None


@pytest.fixture
def cache() -> Cache:
    return Cache()


@pytest.fixture
def routes(cache: Cache) -> Routes:
    to_all = lambda raw, cache: [Key("Shop", "n", s["metadata"]["name"]) for s in cache.list("Shop", "n")]  # noqa: E731
    widgets: Registration[Any] = Registration("Widget", nothing, nothing, children=("Job", "Pod"))  # type: ignore[arg-type]
    shops: Registration[Any] = Registration("Shop", nothing, nothing, children=("Deployment", "Pod"), watches={"Widget": to_all})  # type: ignore[arg-type]
    return Routes([widgets, shops], cache)


def test_every_kind_is_watched_once(routes: Routes) -> None:
    assert routes.kinds == ("Widget", "Shop", "Job", "Pod", "Deployment")


def test_an_object_of_ours_wakes_itself_and_who_watches_its_kind(routes: Routes, cache: Cache) -> None:
    cache.put("Shop", obj("s"))
    assert routes.targets("Widget", obj("w")) == {Key("Widget", "n", "w"), Key("Shop", "n", "s")}


def test_a_child_wakes_its_controller(routes: Routes) -> None:
    assert routes.targets("Job", obj("j", ("Widget", "w"))) == {Key("Widget", "n", "w")}


def test_a_child_of_a_child_wakes_the_first_of_the_line(routes: Routes, cache: Cache) -> None:
    cache.put("Job", obj("j", ("Widget", "w")))
    assert routes.targets("Pod", obj("p", ("Job", "j"))) == {Key("Widget", "n", "w")}


def test_where_the_line_is_unknown_the_label_says_it(routes: Routes) -> None:
    pod = obj("p", ("ReplicaSet", "r"), **{"tuneloop.dev/shop": "s"})
    assert routes.targets("Pod", pod) == {Key("Shop", "n", "s")}


def test_an_object_of_ours_with_a_label_of_another_wakes_only_itself(routes: Routes) -> None:
    assert routes.targets("Shop", obj("s", **{"tuneloop.dev/widget": "w"})) == {Key("Shop", "n", "s")}


def test_foreign_objects_wake_nobody(routes: Routes) -> None:
    assert routes.targets("Pod", obj("p", ("ReplicaSet", "r"))) == set()
