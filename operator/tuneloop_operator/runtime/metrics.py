"""The operator's metrics: every name, its labels, and what it says.

Counters and histograms are counted as things happen, by every replica:

    tuneloop_operator_passes_total{kind, outcome}                     outcome: unchanged, changed, gone, conflict, failed, fenced
    tuneloop_operator_pass_duration_seconds{kind}                     histogram
    tuneloop_operator_errors_total{kind, class}                       class: conflict, name_conflict, forbidden, refused, throttled,
                                                                      server, unreachable, unauthorized, not_leader, bug, event
    tuneloop_operator_api_requests_total{verb, code}                  verb: get, list, create, apply, patch, delete; code: HTTP status, or
                                                                      0 where no answer came. Watches are not in it
    tuneloop_operator_api_request_duration_seconds{verb}              histogram
    tuneloop_operator_watch_restarts_total                            the informer ended, and was started again
    tuneloop_operator_swept_objects_total{kind}                       objects that a re-list showed to be gone
    tuneloop_operator_queue_depth                                     keys that are due and not yet taken by a worker
    tuneloop_operator_queue_scheduled                                 keys that wait for their time (requeue or backoff)
    tuneloop_operator_leader                                          1 on the replica that holds the Lease
    tuneloop_operator_watch_age_seconds{kind}                         since the watch's last sign of life
    tuneloop_operator_cached_objects{kind}

Gauges of the objects themselves are computed from the cache when they are scraped. Every replica has them, the leader or not, so that a
failover leaves no gap: aggregate with `max by (...)`.

    tuneloop_operator_finetunejobs{namespace, phase}                  jobs by phase (status.phase; Pending where there is none yet)
    tuneloop_operator_finetunejob_progress_ratio{namespace, name}     0 to 1; only of jobs in phase Training
    tuneloop_operator_finetunejob_step{namespace, name}               optimiser steps done; only in phase Training
    tuneloop_operator_finetunejob_loss{namespace, name}               last training loss; only in phase Training
    tuneloop_operator_finetunejob_tokens_per_second{namespace, name}  only in phase Training
    tuneloop_operator_finetunejob_steps_lost{namespace, name}         steps that had to be done again; only in phase Training
    tuneloop_operator_modelversions{namespace, model, approval}       versions by approval
    tuneloop_operator_modeldeployments{namespace, state}              state: Ready, Progressing, Degraded, Stalled, Unavailable
    tuneloop_operator_modeldeployment_version{namespace, name}        number of the stable version
    tuneloop_operator_drift_log_evidence{namespace, name}             natural logarithm
    tuneloop_operator_drift_log_threshold{namespace, name}            the alarm is raised there
    tuneloop_operator_drift_effect{namespace, name}                   AUC - 0.5
    tuneloop_operator_drift_alarm{namespace, name}                    0 or 1, latched
    tuneloop_operator_retrainings{namespace, name, outcome}           retraining jobs of a deployment, by outcome:
                                                                      Running, Failed, or the approval of the version that it made:
                                                                      Approved, Pending, Rejected, Withdrawn; Deleted where it is gone

No label carries a user's text: names of objects, and words of enums.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tuneloop_operator.cluster.cache import Cache
from tuneloop_operator.render.names import DEPLOYMENT_LABEL, EPISODE_LABEL, model_version

PREFIX = "tuneloop_operator_"
FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0)


class Metrics:
    """Everything that is counted as it happens, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.passes = self._counter("passes", "Passes by outcome.", "kind", "outcome")
        self.pass_duration = self._histogram("pass_duration_seconds", "Duration of a pass.", "kind")
        self.errors = self._counter("errors", "Passes that ended in an error, by class.", "kind", "class")
        self.api_requests = self._counter("api_requests", "Requests to the API server, watches excluded.", "verb", "code")
        self.api_duration = self._histogram("api_request_duration_seconds", "Duration of a request to the API server.", "verb")
        self.watch_restarts = self._counter("watch_restarts", "Times that the informer ended and was started again.")
        self.swept = self._counter("swept_objects", "Objects that a re-list showed to be gone.", "kind")
        self.leader = Gauge(f"{PREFIX}leader", "1 on the replica that holds the Lease.", registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(PREFIX + name, text, labels, buckets=FAST, registry=self.registry)

    def watch_number(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        Gauge(PREFIX + name, text, registry=self.registry).set_function(read)

    def request_observed(self, verb: str, code: int, seconds: float) -> None:
        """Called by the client after each request; code 0 = no answer."""
        self.api_requests.labels(verb, str(code)).inc()
        self.api_duration.labels(verb).observe(seconds)


class Objects(Collector):
    """Gauges of jobs, versions, deployments and watches, computed from the cache at each scrape."""

    def __init__(self, cache: Cache, signs_of_life: Callable[[], Mapping[str, float]] = dict) -> None:
        self.cache = cache
        self.signs_of_life = signs_of_life

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield from self._of_watches()
        yield from self._of_jobs()
        yield from self._of_deployments()

    def _of_watches(self) -> Iterator[GaugeMetricFamily]:
        ages = GaugeMetricFamily(PREFIX + "watch_age_seconds", "Since the watch's last sign of life.", labels=("kind",))
        counts = GaugeMetricFamily(PREFIX + "cached_objects", "Objects in the cache.", labels=("kind",))
        for kind, seen in self.signs_of_life().items():
            ages.add_metric((kind,), time.monotonic() - seen)
            counts.add_metric((kind,), self.cache.count(kind))
        yield from (ages, counts)

    def _of_jobs(self) -> Iterator[GaugeMetricFamily]:
        jobs = self.cache.list("FineTuneJob")
        yield _tallied("finetunejobs", "Jobs by phase.", ("namespace", "phase"), ((_namespace(o), _phase(o)) for o in jobs))
        training = [o for o in jobs if _phase(o) == "Training"]
        yield _of_each("finetunejob_progress_ratio", "Share of the steps done.", training, _progress_ratio)
        yield _of_each("finetunejob_step", "Optimiser steps done.", training, _at("progress", "step"))
        yield _of_each("finetunejob_loss", "Last training loss.", training, _at("progress", "loss"))
        yield _of_each("finetunejob_tokens_per_second", "Training tokens a second.", training, _at("progress", "tokensPerSecond"))
        yield _of_each("finetunejob_steps_lost", "Steps that had to be done again.", training, _steps_lost)
        yield _tallied(
            "retrainings",
            "Retraining jobs of a deployment by outcome.",
            ("namespace", "name", "outcome"),
            ((_namespace(o), _label(o, DEPLOYMENT_LABEL), self._outcome(o)) for o in jobs if _label(o, EPISODE_LABEL)),
        )

    def _outcome(self, job: Object) -> str:
        """What became of a retraining: the version's approval, since the gates' verdict is not the last word (Manual, SuiteExhausted)."""
        phase = _phase(job)
        if phase != "Succeeded":
            return "Failed" if phase == "Failed" else "Running"
        model, number = str(job["spec"]["output"]["model"]), _status(job).get("modelVersion")
        version = self.cache.get("ModelVersion", _namespace(job), model_version(model, number)) if number is not None else None
        return _model_and_approval(version)[1] if version is not None else "Deleted"

    def _of_deployments(self) -> Iterator[GaugeMetricFamily]:
        versions = ((_namespace(o), *_model_and_approval(o)) for o in self.cache.list("ModelVersion"))
        yield _tallied("modelversions", "Versions by approval.", ("namespace", "model", "approval"), versions)
        deployments = self.cache.list("ModelDeployment")
        yield _tallied(
            "modeldeployments", "Deployments by state.", ("namespace", "state"), ((_namespace(o), _state(o)) for o in deployments)
        )
        yield _of_each("modeldeployment_version", "Number of the stable version.", deployments, _at("stable", "version"))
        watched = [o for o in deployments if isinstance(_status(o).get("drift"), dict)]
        yield _of_each("drift_log_evidence", "Logarithm of the evidence for drift.", watched, _at("drift", "logEvidence"))
        yield _of_each(
            "drift_log_threshold", "Logarithm of the evidence at which the alarm is raised.", watched, _at("drift", "logThreshold")
        )
        yield _of_each("drift_effect", "Size of the drift: AUC - 0.5.", watched, _at("drift", "effect"))
        yield _of_each(
            "drift_alarm", "1 while the drift alarm is latched.", watched, lambda o: float(_condition(o, "DriftDetected") == "True")
        )


Object = dict[str, Any]
"""A Kubernetes object as JSON."""


def _tallied(name: str, text: str, labels: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for row, count in Tally(rows).items():
        family.add_metric(row, count)
    return family


def _of_each(name: str, text: str, objects: Iterable[Object], read: Callable[[Object], float | None]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, text, labels=("namespace", "name"))
    for obj in objects:
        value = read(obj)
        if value is not None:
            family.add_metric((_namespace(obj), obj["metadata"]["name"]), value)
    return family


def _steps_lost(obj: Object) -> float:
    lost = _status(obj).get("stepsLost")
    return float(lost) if isinstance(lost, int) else 0.0


def _at(block: str, field: str) -> Callable[[Object], float | None]:
    """Reads a number of the status, absent where it is absent or no number."""

    def read(obj: Object) -> float | None:
        value = (_status(obj).get(block) or {}).get(field)
        try:
            return None if value is None else float(value)
        except (TypeError, ValueError):
            return None

    return read


def _progress_ratio(obj: Object) -> float | None:
    progress = _status(obj).get("progress") or {}
    return progress.get("step", 0) / progress["maxSteps"] if progress.get("maxSteps") else None


def _namespace(obj: Object) -> str:
    return str(obj["metadata"].get("namespace", ""))


def _label(obj: Object, name: str) -> str:
    return str((obj["metadata"].get("labels") or {}).get(name, ""))


def _status(obj: Object) -> Object:
    return obj.get("status") or {}


def _condition(obj: Object, type_: str) -> str | None:
    return next((c.get("status") for c in _status(obj).get("conditions") or () if c.get("type") == type_), None)


def _phase(obj: Object) -> str:
    return _status(obj).get("phase") or "Pending"


def _model_and_approval(obj: Object) -> tuple[str, str]:
    spec = obj.get("spec") or {}
    return str(spec.get("model", "")), str(spec.get("approval") or "Pending")


def _state(obj: Object) -> str:
    """The worst of what its conditions say."""
    if _condition(obj, "Stalled") == "True":
        return "Stalled"
    if _condition(obj, "Available") != "True":
        return "Unavailable"
    if _condition(obj, "Degraded") == "True":
        return "Degraded"
    return "Ready" if _condition(obj, "Ready") == "True" else "Progressing"
