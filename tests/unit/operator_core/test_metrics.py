"""Gauges computed from the cache, and the list of names that the module's docstring gives."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tuneloop_operator.cluster.cache import Cache
from tuneloop_operator.render.names import DEPLOYMENT_LABEL, EPISODE_LABEL
from tuneloop_operator.runtime import metrics


@pytest.fixture
def cache() -> Cache:
    return Cache()


def put(cache: Cache, kind: str, name: str, status: dict[str, Any], spec: dict[str, Any] | None = None, **labels: str) -> None:
    metadata = {"name": name, "namespace": "n", "uid": f"{kind}-{name}", "resourceVersion": "1", "labels": labels}
    cache.put(kind, {"metadata": metadata, "spec": spec or {}, "status": status})


def read(cache: Cache, name: str) -> dict[tuple[str, ...], float]:
    registry = CollectorRegistry()
    registry.register(metrics.Objects(cache, lambda: {"Job": 0.0}))
    return {
        tuple(s.labels.values()): s.value for family in registry.collect() for s in family.samples if s.name == f"tuneloop_operator_{name}"
    }


def test_jobs_are_counted_by_phase_and_progress_is_told_of_the_running(cache: Cache) -> None:
    progress = {"step": 120, "maxSteps": 480, "loss": "1.25", "tokensPerSecond": "900"}
    put(cache, "FineTuneJob", "a", {"phase": "Training", "progress": progress, "stepsLost": 7})
    put(cache, "FineTuneJob", "b", {"phase": "Succeeded", "progress": progress})
    put(cache, "FineTuneJob", "c", {})
    assert read(cache, "finetunejobs") == {("n", "Training"): 1, ("n", "Succeeded"): 1, ("n", "Pending"): 1}
    assert read(cache, "finetunejob_progress_ratio") == {("n", "a"): 0.25}
    assert read(cache, "finetunejob_loss") == {("n", "a"): 1.25}
    assert read(cache, "finetunejob_tokens_per_second") == {("n", "a"): 900}
    assert read(cache, "finetunejob_steps_lost") == {("n", "a"): 7}


def test_a_number_that_is_none_is_left_out(cache: Cache) -> None:
    put(cache, "FineTuneJob", "a", {"phase": "Training", "progress": {"loss": "n/a"}})
    assert read(cache, "finetunejob_loss") == read(cache, "finetunejob_progress_ratio") == {}


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        ({"Available": "True", "Ready": "True"}, "Ready"),
        ({"Available": "True", "Ready": "False"}, "Progressing"),
        ({"Available": "True", "Ready": "True", "Degraded": "True"}, "Degraded"),
        ({"Available": "True", "Ready": "False", "Stalled": "True"}, "Stalled"),
        ({"Available": "False", "Ready": "False"}, "Unavailable"),
        ({}, "Unavailable"),
    ],
)
def test_deployments_are_counted_by_the_worst_that_is_said_of_them(cache: Cache, conditions: dict[str, str], state: str) -> None:
    put(cache, "ModelDeployment", "d", {"conditions": [{"type": t, "status": s} for t, s in conditions.items()]})
    assert read(cache, "modeldeployments") == {("n", state): 1}


def test_drift_is_told_of_deployments_that_are_watched(cache: Cache) -> None:
    drift = {"logEvidence": "12.5", "logThreshold": "11.5", "effect": "0.2"}
    put(
        cache,
        "ModelDeployment",
        "d",
        {"drift": drift, "conditions": [{"type": "DriftDetected", "status": "True"}], "stable": {"version": 3}},
    )
    put(cache, "ModelDeployment", "e", {})
    assert read(cache, "drift_log_evidence") == {("n", "d"): 12.5}
    assert read(cache, "drift_log_threshold") == {("n", "d"): 11.5}
    assert read(cache, "drift_alarm") == {("n", "d"): 1}
    assert read(cache, "modeldeployment_version") == {("n", "d"): 3}


def test_retrainings_are_counted_by_what_became_of_their_versions(cache: Cache) -> None:
    labels = {DEPLOYMENT_LABEL: "d", EPISODE_LABEL: "1"}
    passed = {"phase": "Succeeded", "evaluation": {"verdict": "Pass"}}
    for number, approval in enumerate(("Approved", "Pending", "Rejected", "Withdrawn"), 1):
        put(cache, "FineTuneJob", f"made-{number}", passed | {"modelVersion": number}, {"output": {"model": "m"}}, **labels)
        put(cache, "ModelVersion", f"m-v{number}", {}, {"model": "m", "version": number, "approval": approval})
    put(cache, "FineTuneJob", "gone", passed | {"modelVersion": 9}, {"output": {"model": "m"}}, **labels)
    put(cache, "FineTuneJob", "trains", {"phase": "Training"}, **labels)
    put(cache, "FineTuneJob", "failed", {"phase": "Failed"}, **labels)
    put(cache, "FineTuneJob", "mine", {"phase": "Training"})
    outcomes = ("Approved", "Pending", "Rejected", "Withdrawn", "Deleted", "Running", "Failed")
    assert read(cache, "retrainings") == {("n", "d", outcome): 1 for outcome in outcomes}


def test_versions_are_counted_by_approval(cache: Cache) -> None:
    put(cache, "ModelVersion", "m-v1", {}, {"model": "m", "approval": "Approved"})
    put(cache, "ModelVersion", "m-v2", {}, {"model": "m"})
    assert read(cache, "modelversions") == {("n", "m", "Approved"): 1, ("n", "m", "Pending"): 1}


def test_the_docstring_names_every_metric_and_no_other(cache: Cache) -> None:
    counted = metrics.Metrics()
    counted.watch_number("queue_depth", "…", lambda: 0)
    counted.watch_number("queue_scheduled", "…", lambda: 0)
    families = [f for source in (counted.registry, metrics.Objects(cache)) for f in source.collect()]
    defined = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    documented = set(re.findall(r"^    (tuneloop_operator_\w+)", metrics.__doc__ or "", re.MULTILINE))
    assert defined == documented
