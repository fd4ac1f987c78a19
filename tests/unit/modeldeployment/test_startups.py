from dataclasses import replace
from typing import Any

import pytest

from tuneloop_operator.api.kubernetes import Pod
from tuneloop_operator.domain.modeldeployment.rollouts import stable_of
from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot
from tuneloop_operator.domain.modeldeployment.startups import startup_status
from tuneloop_operator.render.revisions import Revision

from .world import World


def at(second: int) -> str:
    return f"2026-01-15T12:{second // 60:02d}:{second % 60:02d}Z"


def pod(made: int, scheduled: int, verifying: int, verified: int, ready: int) -> Pod:
    """A ready engine pod, by the seconds of its marks."""
    status: dict[str, Any] = {
        "conditions": [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": at(scheduled)},
            {"type": "Ready", "status": "True", "lastTransitionTime": at(ready)},
        ],
        "initContainerStatuses": [{"name": "verify", "state": {"terminated": {"startedAt": at(verifying), "finishedAt": at(verified)}}}],
        "containerStatuses": [{"name": "engine", "state": {"running": {"startedAt": at(verified)}}}],
    }
    metadata = {"name": "e", "uid": "e", "creationTimestamp": at(made)}
    return Pod.model_validate({"metadata": metadata, "spec": {"nodeName": "n"}, "status": status})


def started(*pods: Pod, warm_up: float = 0.25, warm: bool = True) -> tuple[Snapshot, Revision]:
    world = World(warm=warm)
    world.settle()
    snapshot = world.snapshot()
    revision = stable_of(snapshot.revisions) or snapshot.revisions[-1]
    gateways = tuple(
        replace(gateway, state=gateway.state.model_copy(update={"revisions": tuple(
            report.model_copy(update={"warm_up_seconds": warm_up}) for report in gateway.state.revisions
        )})) if gateway.state is not None else gateway
        for gateway in snapshot.gateway_pods
    )  # fmt: skip
    return replace(snapshot, engine_pods={revision.pinned.engine_hash: pods}, gateway_pods=gateways), revision


def told(snapshot: Snapshot, revision: Revision) -> dict[str, Any]:
    found = startup_status(snapshot, revision)
    assert found is not None
    return found.model_dump(by_alias=True)


def test_the_phases_are_those_of_the_replica_that_took_longest() -> None:
    snapshot, revision = started(pod(0, 1, 3, 5, 60), pod(0, 10, 40, 47, 107))
    assert told(snapshot, revision) == {
        "scheduleSeconds": 10,
        "pullSeconds": 30,
        "fetchSeconds": 7,
        "loadSeconds": 60,
        "firstTokenSeconds": "0.25",
    }


def test_nothing_is_told_before_the_engine_answered() -> None:
    snapshot, revision = started(pod(0, 1, 3, 5, 60), warm=False)
    assert startup_status(snapshot, revision) is None


def test_a_base_from_the_hub_has_nothing_verified_and_takes_no_time_for_it() -> None:
    found = pod(0, 1, 3, 5, 60)
    unverified = found.model_copy(update={"status": found.status.model_copy(update={"init_container_statuses": []})})
    phases = told(*started(unverified))
    assert [phases[f"{phase}Seconds"] for phase in ("schedule", "pull", "fetch", "load")] == [1, 4, 0, 55]


def test_a_pod_that_does_not_say_all_its_times_is_left_out() -> None:
    silent = Pod.model_validate({"metadata": {"name": "s", "uid": "s"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}})
    snapshot, revision = started(silent, pod(0, 1, 3, 5, 60))
    assert told(snapshot, revision)["loadSeconds"] == 55
    assert startup_status(*started(silent)) is None


@pytest.mark.parametrize("role", ["stable", "canary"])
def test_what_was_told_of_a_revision_stays(role: str) -> None:
    snapshot, revision = started(pod(0, 1, 3, 5, 60))
    first = startup_status(snapshot, revision)
    status = snapshot.deployment.status
    assert status.stable is not None
    now = status.model_copy(update={"stable": None, role: status.stable.model_copy(update={"startup": first})})
    deployment = snapshot.deployment.model_copy(update={"status": now})
    later = replace(snapshot, deployment=deployment, engine_pods={revision.pinned.engine_hash: (pod(0, 1, 3, 5, 900),)})
    assert startup_status(later, revision) == first
