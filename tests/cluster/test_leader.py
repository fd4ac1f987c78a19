"""Two operators, one Lease: who works, how soon the other takes over, and that a leader of yesterday changes nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster.conftest import Start
from tests.cluster.faults import FaultProxy, Write
from tests.cluster.harness import Api, OperatorProcess, wait_for
from tests.cluster.toy import widget

Object = dict[str, Any]
TOY = "tests.cluster.toy"
FAILOVER_SECONDS = 15.0


pytestmark = [pytest.mark.usefixtures("widgets"), pytest.mark.xdist_group("widgets")]


def children(api: Api, namespace: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Every object of the test with its UID and version; the Lease and the garbage of namespaces apart."""
    found = {}
    for kind in ("Widget", "ConfigMap", "Job"):
        for obj in api.list(kind, namespace):
            found[kind, obj["metadata"]["name"]] = (obj["metadata"]["uid"], obj["metadata"]["resourceVersion"])
    found.pop(("ConfigMap", "kube-root-ca.crt"), None)
    return found


def is_quiet(operator: OperatorProcess) -> bool:
    """No pass within a second: none is under way or about to follow another."""
    passes = operator.metric("tuneloop_operator_passes_total")
    time.sleep(1)
    return operator.metric("tuneloop_operator_queue_depth") == 0 and operator.metric("tuneloop_operator_passes_total") == passes


def made(api: Api, namespace: str, *names: str) -> bool:
    return all(api.get("Job", namespace, f"{name}-work-1") for name in names)


@pytest.mark.long
def test_only_the_leader_works_and_the_other_takes_over_when_it_dies(api: Api, namespace: str, start_operator: Start) -> None:
    first = start_operator("first", module=TOY)
    wait_for(lambda: first.metric("tuneloop_operator_leader") == 1)
    second = start_operator("second", module=TOY)
    api.create(widget("w", namespace))
    wait_for(lambda: made(api, namespace, "w"))
    assert second.metric("tuneloop_operator_leader") == second.metric("tuneloop_operator_passes_total") == 0
    first.kill()
    since = time.monotonic()
    api.create(widget("v", namespace))
    wait_for(lambda: made(api, namespace, "v"), FAILOVER_SECONDS)
    assert time.monotonic() - since <= FAILOVER_SECONDS


def test_a_leader_that_stops_properly_hands_over_at_once(api: Api, namespace: str, start_operator: Start) -> None:
    first = start_operator("first", module=TOY)
    wait_for(lambda: first.metric("tuneloop_operator_leader") == 1)
    second = start_operator("second", module=TOY)
    first.stop()
    wait_for(lambda: second.metric("tuneloop_operator_leader") == 1, 5)


def test_a_leader_without_an_api_server_steps_down_in_time_and_leads_again(
    api: Api, namespace: str, start_operator: Start, proxy: FaultProxy
) -> None:
    alone = start_operator("alone", kubeconfig=proxy.kubeconfig, module=TOY)
    wait_for(lambda: alone.metric("tuneloop_operator_leader") == 1)
    proxy.refuse(True)
    since = time.monotonic()
    wait_for(lambda: alone.metric("tuneloop_operator_leader") == 0, 9)
    assert time.monotonic() - since < 9, "before anybody else may lead"
    assert alone.probe("/healthz")[0] == 200, "an API server that is down is no reason to restart"
    proxy.refuse(False)
    wait_for(lambda: alone.metric("tuneloop_operator_leader") == 1, 10)
    api.create(widget("w", namespace))
    wait_for(lambda: made(api, namespace, "w"), 10)


class Hold:
    """Holds the first write of each kind that the leader sends after `begin`, between the look at its Lease and the API server."""

    def __init__(self, *wanted: tuple[str, str]) -> None:
        self.wanted = wanted
        self.held: dict[tuple[str, str], Write] = {}
        self.is_on = False
        self.release = threading.Event()

    def __call__(self, write: Write) -> None:
        if not self.is_on or self.release.is_set():
            return
        for method, part in self.wanted:
            if write.method == method and part in write.path and (method, part) not in self.held:
                self.held[method, part] = write
                self.release.wait()  # the test always ends it
                return


@pytest.fixture
def hold(proxy: FaultProxy) -> Iterator[Hold]:
    hold = Hold(("PATCH", "widgets/status-w"), ("PATCH", "configmaps/apply-w"), ("POST", "jobs"), ("DELETE", "configmaps/delete-w-extra-a"))
    proxy.faults.before_write = hold
    yield hold
    hold.release.set()


def have_settled(api: Api, namespace: str, *names: str) -> bool:
    """All children are there, and the Job controller has said its last word of each Job: it is suspended."""
    jobs = [api.get("Job", namespace, f"{name}-work-1") for name in names]
    assert all(job is not None and (job.get("status") or {}).get("conditions") for job in jobs)
    return all(api.get("ConfigMap", namespace, f"{name}-settings") for name in names)


def test_writes_of_a_stopped_leader_come_too_late_and_change_nothing(
    api: Api, namespace: str, start_operator: Start, proxy: FaultProxy, hold: Hold
) -> None:
    names = ("status-w", "apply-w", "create-w", "delete-w")
    old = start_operator("old", kubeconfig=proxy.kubeconfig, module=TOY)
    for name in names:
        api.create(widget(name, namespace, settings={"n": "0"}, extras=["a"]))
    wait_for(lambda: have_settled(api, namespace, *names) and all(api.get("ConfigMap", namespace, f"{name}-extra-a") for name in names))
    new = start_operator("new", module=TOY)
    wait_for(lambda: is_quiet(old))

    hold.is_on = True
    api.patch("Widget", namespace, "status-w", {"spec": {"records": 1}})
    api.patch("ConfigMap", namespace, "apply-w-settings", {"data": {"n": "by hand"}})
    api.delete("Job", namespace, "create-w-work-1")
    api.patch("Widget", namespace, "delete-w", {"spec": {"extras": []}})
    wait_for(lambda: len(hold.held) == 4, what="one write of each kind on its way")
    old.pause()
    held = list(hold.held.values())

    def taken_over() -> bool:
        assert new.metric("tuneloop_operator_leader") == 1
        assert (api.get("Widget", namespace, "status-w") or {})["status"]["records"] == 1
        assert (api.get("ConfigMap", namespace, "apply-w-settings") or {})["data"] == {"n": "0"}
        assert api.get("ConfigMap", namespace, "delete-w-extra-a") is None
        return have_settled(api, namespace, *names) and bool(api.get("ConfigMap", namespace, "status-w-record-1"))

    wait_for(taken_over, 60)
    wait_for(lambda: is_quiet(new))
    before = children(api, namespace)
    sent = len(proxy.faults.statuses)
    hold.release.set()
    old.resume()
    late = lambda: dict(proxy.faults.statuses[sent:])  # noqa: E731
    wait_for(lambda: all(write in late() for write in held), what="the answers to what was held")
    wait_for(lambda: old.metric("tuneloop_operator_leader") == 0)
    time.sleep(2)  # whatever else it might want to write
    gone = held.pop([write.method for write in held].index("DELETE"))
    assert late()[gone] in (404, 409)
    assert [late()[write] for write in held] == [409, 409, 409]
    assert set(late().values()) <= {404, 409}, "whatever else was on its way"
    assert children(api, namespace) == before
