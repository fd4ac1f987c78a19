"""Observes a FineTuneJob: its stages' Jobs and pods, its model's versions, its baseline, its claims, and the running pod's progress."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any

from tuneloop_operator.api import finetunejob as api
from tuneloop_operator.api import modeldeployment, modelversion
from tuneloop_operator.api.kubernetes import Job, Pod, WarningEvent, job_of_set
from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.cluster.cache import Cache
from tuneloop_operator.cluster.client import Cluster, Unreachable
from tuneloop_operator.cluster.registration import Registration
from tuneloop_operator.domain import times
from tuneloop_operator.domain.decision import Key, Target
from tuneloop_operator.domain.finetunejob import FineTuneJobSnapshot, StageRun, decide
from tuneloop_operator.domain.finetunejob.outcomes import Outcome, outcome
from tuneloop_operator.domain.finetunejob.results import parse_progress
from tuneloop_operator.render import names, training
from tuneloop_operator.render.run_config import run_config
from tuneloop_operator.settings import Settings
from tuneloop_trainer.contract import PROGRESS_LIMIT, PROGRESS_PORT, Progress, Stage

CHILDREN = ("JobSet", "Job", "Pod", "ConfigMap", "NetworkPolicy", "Service")
MUTE_SECONDS = 3.0
"""A Job without a pod, or a pod without a word for so long, is asked after in the events."""
MAX_EVENTS = 20
NEWS_SECONDS = 180.0
MESSAGE_LIMIT = 2000


async def observe(key: Key, cluster: Cluster, settings: Settings, now: datetime) -> FineTuneJobSnapshot | None:
    raw = cluster.cache.get(key.kind, key.namespace, key.name)
    if raw is None:
        return None
    job = api.FineTuneJob.model_validate(raw)
    runs = _stage_runs(cluster.cache, job)
    deployment = _deployment(cluster.cache, job)
    if job.status.finished_at is None:
        runs = [await _with_warnings(cluster, run, now) for run in runs]
    return FineTuneJobSnapshot(
        job=job,
        runs=tuple(runs),
        began_with=_began_with(cluster.cache, job, runs),
        versions=_versions(cluster.cache, job, deployment),
        deployment=deployment,
        missing_claims=await _missing_claims(cluster, job, runs),
        progress=await _progress(cluster, job, runs),
        conflicts=tuple(sorted(cluster.conflicts.get(job.metadata.uid, ()), key=lambda taken: (taken.kind, taken.name))),
        refusals=cluster.refused(job.metadata.uid),
        children=tuple(_children(cluster.cache, job)),
        has_job_sets="JobSet" not in cluster.unserved,
    )


# --- from the cache ----------------------------------------------------------


def _stage_runs(cache: Cache, job: api.FineTuneJob) -> list[StageRun]:
    owned = [raw for kind in ("Job", "JobSet") for raw in cache.owned(kind, job.metadata.namespace, job.metadata.uid)]
    runs = [run for raw in owned if (run := _stage_run(cache, raw)) is not None]
    order = list(Stage)
    return sorted(runs, key=lambda run: (order.index(run.stage), run.number))


def _stage_run(cache: Cache, raw: dict[str, Any]) -> StageRun | None:
    """None for a Job whose labels are not ours any more, or that is being deleted. A JobSet is taken for the one Job that it makes."""
    made = _made_by(cache, raw) if raw["kind"] == "JobSet" else raw
    job = job_of_set(raw, made) if raw["kind"] == "JobSet" else Job.model_validate(raw)
    labels = job.metadata.labels
    try:
        stage, number = Stage(labels.get(names.STAGE_LABEL, "")), int(labels.get(names.ATTEMPT_LABEL, ""))
        from_step = int(labels.get(names.FROM_STEP_LABEL, "0"))
    except ValueError:
        return None
    if job.metadata.deletion_timestamp is not None:
        return None
    owned = cache.owned("Pod", job.metadata.namespace, made["metadata"]["uid"]) if made is not None else []
    pods = [Pod.model_validate(pod) for pod in owned]
    return StageRun(
        stage=stage,
        number=number,
        input_hash=labels.get(names.INPUT_LABEL, ""),
        retry_hash=labels.get(names.RETRY_HASH_LABEL, ""),
        from_step=from_step,
        job=job,
        manifest=raw,
        made_uid=made["metadata"]["uid"] if made is not None else "",
        pods=tuple(sorted(pods, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name))),
    )


def _made_by(cache: Cache, job_set: dict[str, Any]) -> dict[str, Any] | None:
    """The Job of a JobSet, once its controller has made it."""
    metadata = job_set["metadata"]
    return next(iter(cache.owned("Job", metadata["namespace"], metadata["uid"])), None)


def _began_with(cache: Cache, job: api.FineTuneJob, runs: list[StageRun]) -> str | None:
    name = FineTuneJobSnapshot.first_configured(runs)
    if job.status.started_at is None or job.status.finished_at is not None or name is None:
        return None
    raw = cache.get("ConfigMap", job.metadata.namespace, name)
    return ((raw or {}).get("data") or {}).get(training.CONFIG_FILE)


def _deployment(cache: Cache, job: api.FineTuneJob) -> ModelDeployment | None:
    baseline = job.spec.evaluation.baseline
    if baseline.type != "Deployment" or baseline.name is None:
        return None
    raw = cache.get(modeldeployment.KIND, job.metadata.namespace, baseline.name)
    return ModelDeployment.model_validate(raw) if raw is not None else None


def _versions(cache: Cache, job: api.FineTuneJob, deployment: ModelDeployment | None) -> tuple[ModelVersion, ...]:
    """Versions of the job's own model, and those that its baseline may be."""
    found = [raw for raw in cache.list(modelversion.KIND, job.metadata.namespace) if _may_matter(raw, job, deployment)]
    return tuple(map(ModelVersion.model_validate, found))


def _may_matter(raw: dict[str, Any], job: api.FineTuneJob, deployment: ModelDeployment | None) -> bool:
    models = {job.spec.output.model, deployment.spec.model.name if deployment is not None else None}
    return raw["spec"].get("model") in models or raw["metadata"]["name"] == job.spec.evaluation.baseline.name


def _children(cache: Cache, job: api.FineTuneJob) -> Iterator[Target]:
    for kind in CHILDREN:
        if kind != "Pod":
            for raw in cache.owned(kind, job.metadata.namespace, job.metadata.uid):
                yield Target(Key(kind, job.metadata.namespace, raw["metadata"]["name"]), raw["metadata"]["uid"])


# --- live --------------------------------------------------------------------


async def _with_warnings(cluster: Cluster, run: StageRun, now: datetime) -> StageRun:
    """Events of what is stuck and does not say why itself: a Job without a pod, a pod that is neither placed nor started."""
    subject = _mute_subject(run, now)
    if subject is None:
        return run
    raw = await cluster.list("Event", run.job.metadata.namespace, fields={"involvedObject.uid": subject, "type": "Warning"})
    events = [event for event in map(WarningEvent.model_validate, raw) if not run.pods or _is_news(event, now)]
    newest = sorted(events, key=lambda event: event.last_timestamp or "", reverse=True)[:MAX_EVENTS]
    return replace(run, warnings=tuple(event.model_copy(update={"message": event.message[:MESSAGE_LIMIT]}) for event in newest))


def _is_news(event: WarningEvent, now: datetime) -> bool:
    """Kubelet repeats what still holds; what it said of a volume that has long been mounted holds no longer."""
    return event.last_timestamp is None or times.seconds_between(event.last_timestamp, now) < NEWS_SECONDS


def _mute_subject(run: StageRun, now: datetime) -> str | None:
    if outcome(run) is not Outcome.PENDING or run.job.spec.suspend:
        return None
    pod = run.held_back or run.pod
    if pod is None:
        is_old = times.seconds_between(run.job.metadata.creation_timestamp, now) >= MUTE_SECONDS
        return (run.made_uid or run.job.metadata.uid) if is_old else None
    is_old = times.seconds_between(pod.metadata.creation_timestamp, now) >= MUTE_SECONDS
    states = [status.state.waiting for status in pod.status.container_statuses if status.state.waiting is not None]
    is_creating = pod.spec.node_name is not None and all(state.reason == "ContainerCreating" for state in states)
    return pod.metadata.uid if is_old and is_creating else None


async def _missing_claims(cluster: Cluster, job: api.FineTuneJob, runs: list[StageRun]) -> tuple[str, ...]:
    """Looked for before the first pod; later the scheduler says it."""
    if runs or job.status.started_at is not None or job.status.finished_at is not None or job.spec.run_policy.suspend:
        return ()
    claims = [claim for claim in training.all_claims(job, run_config(job, job.status.resolved)) if claim]
    found = [await cluster.get("PersistentVolumeClaim", job.metadata.namespace, claim) for claim in claims]
    return tuple(claim for claim, raw in zip(claims, found, strict=True) if raw is None)


async def _progress(cluster: Cluster, job: api.FineTuneJob, runs: list[StageRun]) -> Progress | None:
    """Of the training pod, if one runs. That it cannot be reached is no error: it may be starting or ending."""
    if job.status.finished_at is not None:
        return None
    for run in reversed(runs):
        pod = run.pod
        if run.stage is Stage.TRAIN and outcome(run) is Outcome.RUNNING and pod is not None and pod.status.pod_ip:
            host = f"[{pod.status.pod_ip}]" if ":" in pod.status.pod_ip else pod.status.pod_ip
            try:
                content = await cluster.http_get(f"http://{host}:{PROGRESS_PORT}/progress", PROGRESS_LIMIT)
            except Unreachable:
                return None
            return parse_progress(content, run.stage, pod.metadata.uid)
    return None


# --- what else wakes a job ---------------------------------------------------


def _new_job(raw: dict[str, Any], cache: Cache) -> Iterable[Key]:
    """A job that a ModelDeployment's pass has just made: an own write is no news to the queue."""
    return [] if raw.get("status") else [Key(api.KIND, raw["metadata"]["namespace"], raw["metadata"]["name"])]


def _jobs_of_version(raw: dict[str, Any], cache: Cache) -> Iterable[Key]:
    """The job that it was made by, so that it ends when its version is seen."""
    name = ((raw.get("spec") or {}).get("lineage") or {}).get("fineTuneJob")
    return [Key(api.KIND, raw["metadata"]["namespace"], name)] if name else []


def _jobs_of_deployment(raw: dict[str, Any], cache: Cache) -> Iterable[Key]:
    """Unfinished jobs whose baseline it is."""
    metadata = raw["metadata"]
    for job in cache.list(api.KIND, metadata["namespace"]):
        baseline = ((job.get("spec") or {}).get("evaluation") or {}).get("baseline") or {}
        is_unfinished = not (job.get("status") or {}).get("finishedAt")
        if baseline.get("type") == "Deployment" and baseline.get("name") == metadata["name"] and is_unfinished:
            yield Key(api.KIND, metadata["namespace"], job["metadata"]["name"])


REGISTRATION = Registration(
    kind=api.KIND,
    observe=observe,
    decide=decide,
    children=CHILDREN,
    watches={api.KIND: _new_job, modelversion.KIND: _jobs_of_version, modeldeployment.KIND: _jobs_of_deployment},
)
