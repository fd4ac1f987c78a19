"""The runtime on bad days: an API server that is away, slow, overloaded or forgetful, and a network that loses answers."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from tests.cluster.conftest import Start
from tests.cluster.faults import FaultProxy, Write
from tests.cluster.harness import Api, OperatorProcess, wait_for
from tests.cluster.toy import widget

Object = dict[str, Any]
RECOVERY_SECONDS = 10.0
GONE: Object = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}}
BROKEN: Object = {"type": "ERROR", "object": {"kind": "Status", "code": 500, "reason": "InternalError", "message": "a fault of the test"}}


pytestmark = [pytest.mark.usefixtures("widgets"), pytest.mark.xdist_group("widgets")]


@pytest.fixture
def toy(api: Api, namespace: str, start_operator: Start, proxy: FaultProxy) -> OperatorProcess:
    """The operator behind the proxy, with one Widget made."""
    process = start_operator(kubeconfig=proxy.kubeconfig, module="tests.cluster.toy")
    api.create(widget("w", namespace, settings={"n": "0"}))
    wait_for(lambda: api.get("Job", namespace, "w-work-1"))
    return process


def follows(api: Api, namespace: str, n: int, timeout: float = RECOVERY_SECONDS) -> None:
    """The child follows an edit."""
    api.patch("Widget", namespace, "w", {"spec": {"settings": {"n": str(n)}}})
    wait_for(lambda: (api.get("ConfigMap", namespace, "w-settings") or {}).get("data") == {"n": str(n)}, timeout)


def test_an_outage_is_survived(api: Api, namespace: str, toy: OperatorProcess, proxy: FaultProxy) -> None:
    proxy.refuse(True)
    api.patch("Widget", namespace, "w", {"spec": {"settings": {"n": "1"}}})
    time.sleep(8)
    proxy.refuse(False)
    wait_for(lambda: (api.get("ConfigMap", namespace, "w-settings") or {}).get("data") == {"n": "1"}, RECOVERY_SECONDS)
    follows(api, namespace, 2)


@pytest.mark.parametrize("status", [503, pytest.param(403, marks=pytest.mark.long), pytest.param(401, marks=pytest.mark.long)])
def test_refusals_are_survived(api: Api, namespace: str, toy: OperatorProcess, proxy: FaultProxy, status: int) -> None:
    """503: the API server is overloaded; 403: its RBAC cache is cold, or the binding was revoked; 401: the token ran out."""
    proxy.faults.answer = lambda method, path: (status, {})
    proxy.send_to_watches(GONE)
    api.patch("Widget", namespace, "w", {"spec": {"settings": {"n": "1"}}})
    time.sleep(5)
    proxy.faults.answer = lambda method, path: None
    wait_for(lambda: (api.get("ConfigMap", namespace, "w-settings") or {}).get("data") == {"n": "1"}, RECOVERY_SECONDS)


def test_a_throttled_write_waits_as_long_as_it_is_told(api: Api, namespace: str, toy: OperatorProcess, proxy: FaultProxy) -> None:
    refused: list[float] = []

    def answer(method: str, path: str) -> tuple[int, dict[str, str]] | None:
        if method == "GET" or "/leases" in path or len(refused) >= 3:
            return None
        refused.append(time.monotonic())
        return 429, {"Retry-After": "1"}

    proxy.faults.answer = answer
    follows(api, namespace, 1)
    assert len(refused) == 3
    assert all(later - earlier > 0.9 for earlier, later in itertools.pairwise(refused))


def test_a_lost_answer_makes_nothing_twice(api: Api, namespace: str, toy: OperatorProcess, proxy: FaultProxy) -> None:
    lost: set[tuple[str, str]] = set()

    def lose_first(write: Write) -> bool:
        is_first = (write.method, write.path) not in lost
        lost.add((write.method, write.path))
        return not is_first

    proxy.faults.after_write = lose_first
    api.create(widget("v", namespace, settings={"n": "0"}, records=2))
    wait_for(lambda: api.get("ConfigMap", namespace, "v-record-2") and api.get("Job", namespace, "v-work-1"), RECOVERY_SECONDS)
    names = sorted(c["metadata"]["name"] for c in api.list("ConfigMap", namespace) if c["metadata"]["name"].startswith("v-"))
    assert names == ["v-record-1", "v-record-2", "v-settings"]
    follows(api, namespace, 1)


def test_a_watch_that_breaks_is_started_again_in_the_process(api: Api, namespace: str, toy: OperatorProcess, proxy: FaultProxy) -> None:
    for times in (1, 2, 3):
        proxy.send_to_watches(BROKEN)
        wait_for(lambda times=times: toy.metric("tuneloop_operator_watch_restarts_total") >= times)
        follows(api, namespace, times)
    assert toy.process is not None
    assert toy.process.poll() is None


SILENCE_SECONDS = 9.0
"""Instead of three minutes; watches end and begin anew after two thirds of it."""


@pytest.fixture
def impatient(start_operator: Start, proxy: FaultProxy) -> OperatorProcess:
    """An operator whose watches have been quiet for longer than it allows, with nothing wrong."""
    process = start_operator(kubeconfig=proxy.kubeconfig, module="tests.cluster.toy", TUNELOOP_SILENCE_SECONDS=str(SILENCE_SECONDS))
    healthy_for(process, SILENCE_SECONDS + 3)
    return process


def healthy_for(process: OperatorProcess, seconds: float) -> None:
    end = time.monotonic() + seconds
    wait_for(lambda: _is_healthy(process) and time.monotonic() > end, seconds + 10)


def _is_healthy(process: OperatorProcess) -> bool:
    status, text = process.probe("/healthz")
    if status != 200:
        pytest.fail(f"/healthz answered {status}: {text}")
    return True


@pytest.mark.long
def test_a_watch_that_hangs_while_the_api_server_answers_makes_the_operator_sick(impatient: OperatorProcess, proxy: FaultProxy) -> None:
    proxy.faults.hang_watches = True
    asked = time.monotonic()
    wait_for(lambda: impatient.probe("/healthz")[0] == 503, 3 * SILENCE_SECONDS, "a sick operator")
    assert time.monotonic() - asked > SILENCE_SECONDS / 4
    assert "no sign of life from the watch of " in impatient.probe("/healthz")[1]
    assert "Widget" in impatient.probe("/healthz")[1]


@pytest.mark.long
def test_an_api_server_that_is_away_makes_no_operator_sick(impatient: OperatorProcess, proxy: FaultProxy) -> None:
    proxy.refuse(True)
    healthy_for(impatient, 2.5 * SILENCE_SECONDS)
    proxy.refuse(False)
    healthy_for(impatient, 1.5 * SILENCE_SECONDS)


def test_what_went_while_no_watch_saw_it_is_swept_out(api: Api, namespace: str, toy: OperatorProcess, proxy: FaultProxy) -> None:
    proxy.faults.drop_events = True
    old = api.get("Job", namespace, "w-work-1")
    assert old is not None
    api.delete("Job", namespace, "w-work-1")
    wait_for(lambda: api.get("Job", namespace, "w-work-1") is None)
    proxy.send_to_watches(GONE)
    proxy.faults.drop_events = False
    wait_for(lambda: api.get("Job", namespace, "w-work-1"), RECOVERY_SECONDS, "the Job to be made again")
    assert toy.metric("tuneloop_operator_swept_objects_total", kind="Job") == 1


def test_what_came_while_no_watch_saw_it_is_found(api: Api, namespace: str, toy: OperatorProcess, proxy: FaultProxy) -> None:
    proxy.faults.drop_events = True
    api.patch("Widget", namespace, "w", {"spec": {"settings": {"n": "1"}}})
    api.create(widget("v", namespace))
    time.sleep(1)
    assert api.get("Job", namespace, "v-work-1") is None
    proxy.send_to_watches(GONE)
    proxy.faults.drop_events = False
    wait_for(lambda: api.get("Job", namespace, "v-work-1"), RECOVERY_SECONDS)
    wait_for(lambda: (api.get("ConfigMap", namespace, "w-settings") or {}).get("data") == {"n": "1"}, RECOVERY_SECONDS)


def test_an_event_that_comes_twice_or_late_changes_nothing(api: Api, namespace: str, toy: OperatorProcess, proxy: FaultProxy) -> None:
    stale = api.get("Widget", namespace, "w")
    follows(api, namespace, 1)
    before = len(proxy.faults.writes)
    for _ in range(3):
        proxy.send_to_watches({"type": "MODIFIED", "object": stale})
    time.sleep(2)
    assert len(proxy.faults.writes) == before
    assert (api.get("ConfigMap", namespace, "w-settings") or {})["data"] == {"n": "1"}


def test_every_second_write_that_meets_a_conflict_is_tried_again(api: Api, namespace: str, toy: OperatorProcess, proxy: FaultProxy) -> None:
    tries = iter(range(1000))

    def answer(method: str, path: str) -> tuple[int, dict[str, str]] | None:
        return (409, {}) if method != "GET" and "/leases" not in path and next(tries) % 2 == 0 else None

    proxy.faults.answer = answer
    for n in range(1, 4):
        follows(api, namespace, n)
