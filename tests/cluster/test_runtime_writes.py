"""The runtime on a real API server: how little it writes, what it does to a status and a Job, and how it stops and starts."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest
from tests.cluster.conftest import Start
from tests.cluster.harness import Api, OperatorProcess, wait_for
from tests.cluster.toy import data, edit, settled, widget

Object = dict[str, Any]
TOY = "tests.cluster.toy"

pytestmark = [pytest.mark.usefixtures("widgets"), pytest.mark.xdist_group("widgets")]


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


def test_nothing_is_written_while_nothing_changes(api: Api, namespace: str, alone: OperatorProcess) -> None:
    api.create(widget("w", namespace, settings={"colour": "green"}, records=2, requeueAfter=0.2))
    settled(api, namespace)
    wait_for(lambda: api.get("ConfigMap", namespace, "w-record-2"))
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
    wait_for(lambda: writes(alone) > before)
    wait_for(lambda: (api.get("Widget", namespace, "w") or {})["status"]["records"] == 2)


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
