"""What the API server refuses of a decision: remembered for the next pass, and no obstacle to the rest."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from tuneloop_operator.cluster.apply import Applier
from tuneloop_operator.cluster.client import Cluster, key_of
from tuneloop_operator.cluster.credentials import Credentials
from tuneloop_operator.cluster.errors import ApiError, ChildRefused, Forbidden, Refused
from tuneloop_operator.cluster.transport import Transport
from tuneloop_operator.domain.decision import Decision, Manifest
from tuneloop_operator.settings import Settings

OWNER = {"apiVersion": "v1", "kind": "Widget", "metadata": {"name": "w", "namespace": "n", "uid": "u", "generation": 3}, "status": {}}
NOW = datetime(2026, 1, 1, tzinfo=UTC)
QUOTA = Forbidden(403, "Forbidden", 'jobs.batch "a" is forbidden: exceeded quota: small')
NO_RIGHT = Forbidden(403, "Forbidden", 'jobs.batch is forbidden: User "system:serviceaccount:x:y" cannot create resource "jobs"')


def child(name: str, kind: str = "ConfigMap") -> Manifest:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": "n", "labels": {}}}


class Server(Cluster):
    """Takes everything but what the test names."""

    def __init__(self) -> None:
        super().__init__(Transport(Credentials("http://127.0.0.1:1")), Settings())
        self.errors: dict[str, ApiError] = {}
        self.made: list[str] = []

    async def create(self, manifest: Any) -> Any:
        name = manifest["metadata"]["name"]
        if name in self.errors:
            raise self.errors[name]
        self.made.append(name)
        made = {**manifest, "metadata": {**manifest["metadata"], "uid": name, "resourceVersion": "1"}}
        self.cache.put(manifest["kind"], made)
        return made


@pytest.fixture
async def server() -> Server:
    return Server()


async def carry_out(server: Server, *names: str, create: tuple[Manifest, ...] = ()) -> None:
    decision = Decision(status={}, create=create, apply=tuple(child(name) for name in names))
    await Applier(server).carry_out(OWNER, decision, NOW)


@pytest.mark.parametrize("error", [Refused(422, "Invalid", "a: Invalid value"), QUOTA])
async def test_a_refused_child_is_remembered_with_the_words_and_the_others_are_made(server: Server, error: ApiError) -> None:
    server.errors["a"] = error
    with pytest.raises(ChildRefused):
        await carry_out(server, "a", "b", create=(child("c"),))
    assert server.made == ["c", "b"]
    assert [(refusal.key, refusal.message, refusal.generation) for refusal in server.refused("u")] == [
        (key_of(child("a")), error.message, 3)
    ]


async def test_a_refused_child_that_is_made_once_does_not_keep_the_others(server: Server) -> None:
    server.errors["c"] = Refused(422, "Invalid", "no.")
    with pytest.raises(ChildRefused):
        await carry_out(server, "a", create=(child("c"),))
    assert server.made == ["a"]
    assert [refusal.key.name for refusal in server.refused("u")] == ["c"]


async def test_a_write_that_goes_through_ends_the_refusal(server: Server) -> None:
    server.errors["a"] = Refused(422, "Invalid", "no.")
    with pytest.raises(ChildRefused):
        await carry_out(server, "a")
    server.errors.clear()
    await carry_out(server, "a")
    assert server.refused("u") == ()
    assert server.refusals == {}


async def test_a_right_that_the_operator_lacks_is_no_refusal_of_the_object(server: Server) -> None:
    server.errors["a"] = NO_RIGHT
    with pytest.raises(Forbidden):
        await carry_out(server, "a")
    assert server.refused("u") == ()


@pytest.mark.parametrize(("version", "is_changed"), [("2", True), ("1", False)])
async def test_a_status_that_the_crd_drops_is_no_change(server: Server, version: str, is_changed: bool) -> None:
    async def apply_status(manifest: Any) -> Any:
        return {**OWNER, "metadata": {**manifest["metadata"], "resourceVersion": version}}

    server.apply_status = apply_status  # type: ignore[method-assign]
    owner = {**OWNER, "metadata": {**OWNER["metadata"], "resourceVersion": "1"}}
    outcome = await Applier(server).carry_out(owner, Decision(status={"field": "of a newer release"}), NOW)
    assert outcome.is_changed == is_changed
