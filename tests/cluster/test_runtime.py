"""The runtime on a real API server, with a kind of its own: fields and their owners, prune, conflicts, drift, restarts, writes."""

from __future__ import annotations

from typing import Any

import pytest
from tests.cluster.conftest import Start, install
from tests.cluster.harness import Api, OperatorProcess, wait_for
from tests.cluster.toy import CRD, widget

from tuneloop_operator.render.names import HASH_LABEL

Object = dict[str, Any]
TOY = "tests.cluster.toy"
WRITES = ("create", "apply", "patch", "delete")


@pytest.fixture(scope="module", autouse=True)
def widgets(api: Api) -> None:
    install(api, CRD)


@pytest.fixture
def toy(start_operator: Start) -> OperatorProcess:
    return start_operator(module=TOY)


def written(operator: OperatorProcess) -> float:
    """Requests that may write, the Lease's apart."""
    return sum(operator.metric("tuneloop_operator_api_requests_total", verb=verb) for verb in WRITES)


def quiet(operator: OperatorProcess) -> float:
    """Waits until a second has passed without a write; returns the number of writes so far."""
    import time

    while True:
        before = written(operator)
        time.sleep(1.0)
        if written(operator) == before and operator.metric("tuneloop_operator_queue_depth") == 0:
            return before


def settled(api: Api, namespace: str, name: str = "w") -> Object:
    """Waits until the status speaks of the newest generation, and the children are there."""

    def holds() -> Object | None:
        found = api.get("Widget", namespace, name)
        assert found is not None
        assert found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"]
        assert api.get("ConfigMap", namespace, f"{name}-settings")
        assert api.get("Job", namespace, f"{name}-work-1")
        return found

    return wait_for(holds)  # type: ignore[return-value]


def test_a_registered_kind_is_reconciled(api: Api, namespace: str, toy: OperatorProcess) -> None:
    api.create(widget("w", namespace, settings={"colour": "green"}))
    found = settled(api, namespace)
    child = api.get("ConfigMap", namespace, "w-settings")
    assert child is not None
    assert child["data"] == {"colour": "green"}
    assert child["metadata"]["labels"][HASH_LABEL]
    owner = child["metadata"]["ownerReferences"][0]
    assert (owner["uid"], owner["controller"]) == (found["metadata"]["uid"], True)
    assert found["status"]["conditions"][0]["reason"] == "Made"
    assert "nothing" not in found["status"]


def test_an_edit_reaches_the_child_and_what_was_removed_goes(api: Api, namespace: str, toy: OperatorProcess) -> None:
    api.create(widget("w", namespace, settings={"colour": "green", "size": "2"}))
    settled(api, namespace)
    for settings in ({"colour": "red"}, {"shape": "round"}):
        manifest = widget("w", namespace, settings=settings)
        current = api.get("Widget", namespace, "w")
        assert current is not None
        api.call("PUT", f"/apis/tuneloop.dev/v1alpha1/namespaces/{namespace}/widgets/w", {**current, "spec": manifest["spec"]})
        wait_for(lambda wanted=settings: (api.get("ConfigMap", namespace, "w-settings") or {})["data"] == wanted)  # type: ignore[misc]
