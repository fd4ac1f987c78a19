"""A FineTuneJob's children: the stages' Jobs, their configuration, and the policy that lets the operator see their progress."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import PurePosixPath

from tuneloop_operator.api.finetunejob import FineTuneJob, Resolved
from tuneloop_operator.render import names, pods, together
from tuneloop_operator.render.pods import Json
from tuneloop_operator.render.run_config import FEEDBACK_PATH, INTERNAL_TOKEN, MLFLOW_PATH, PUSH_PATH, SOURCES_PATH, row_sources
from tuneloop_operator.settings import Settings
from tuneloop_trainer.contract import CONFIG_PATH, MLFLOW_KEYS, PROGRESS_PORT, Baseline, Estimated, RunConfig, Stage

CONTAINER = "stage"
CONFIG_FILE = PurePosixPath(CONFIG_PATH).name
HUB_TOKEN = "token"
"""Key of the hub's token in a `secretRef`."""
REQUESTS = {
    Stage.PREPARE: {"cpu": "250m", "memory": "512Mi"},
    Stage.TRAIN: {"cpu": "500m", "memory": "1Gi"},
    Stage.PACKAGE: {"cpu": "250m", "memory": "1Gi"},
    Stage.EVALUATE: {"cpu": "500m", "memory": "1Gi"},
}
GRACE_SECONDS = {Stage.TRAIN: 120}
"""Time to save after SIGTERM."""
DEFAULT_GRACE_SECONDS = 30
SIZED_STAGES = (Stage.TRAIN, Stage.EVALUATE)
"""Stages that load the model onto devices; the user's resources are for these."""


def job_labels(job: FineTuneJob, component: str = "trainer") -> dict[str, str]:
    return names.labels(component, job.metadata.name, **{names.JOB_LABEL: job.metadata.name, names.MODEL_LABEL: job.spec.output.model})


# --- configuration -----------------------------------------------------------


def config_map(job: FineTuneJob, text: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": config_map_name(job, text), "namespace": job.metadata.namespace, "labels": job_labels(job)},
        "immutable": True,
        "data": {CONFIG_FILE: text},
    }


def config_map_name(job: FineTuneJob, text: str) -> str:
    return names.job_config(job.metadata.name, names.short_hash(text, 8))


def config_text(config: RunConfig) -> str:
    """With nulls: an absent field would be read as its default, and `checkpoint.everyMinutes` has one."""
    return config.model_dump_json(by_alias=True)


def edited_text(
    text: str, micro_batch: int | None, baseline: Baseline, estimate: Estimated | None = None, *, is_sharded: bool = False
) -> str:
    """The configuration that a run began with, but for what may differ between its attempts, and the first estimate.

    Edited as JSON: the run's image is pinned, and a trainer of then refuses fields that this operator's contract has gained since.
    """
    content = json.loads(text)
    training, parallelism = content["training"], "FSDP" if is_sharded else None
    lacks_estimate = estimate is not None and "estimate" in content and content["estimate"] is None
    is_same = training["microBatchSize"] == micro_batch and training.get("parallelism") == parallelism
    if is_same and content["evaluation"]["baseline"]["name"] == baseline.name and not lacks_estimate:
        return text
    if estimate is not None and lacks_estimate:
        content["estimate"] = estimate.model_dump(mode="json", by_alias=True)
    training["microBatchSize"] = micro_batch
    if training.get("parallelism") != parallelism:
        training["parallelism"] = parallelism
    if content["evaluation"]["baseline"]["name"] != baseline.name:
        content["evaluation"]["baseline"] = baseline.model_dump(mode="json", by_alias=True)
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


# --- network -----------------------------------------------------------------


def progress_policy(job: FineTuneJob, settings: Settings) -> Json:
    """Nobody reaches the job's pods but the operator, and a Prometheus, on the port of progress and metrics."""
    operator = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": settings.namespace}}}
    prometheus = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": names.job_policy(job.metadata.name), "namespace": job.metadata.namespace, "labels": job_labels(job)},
        "spec": {
            "podSelector": {"matchLabels": {names.JOB_LABEL: job.metadata.name}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [operator, prometheus], "ports": [{"protocol": "TCP", "port": PROGRESS_PORT}]},
                *together.ingress(job),
            ],
        },
    }


# --- Jobs --------------------------------------------------------------------


def stage_job(
    job: FineTuneJob,
    resolved: Resolved,
    config: RunConfig,
    settings: Settings,
    *,
    stage: Stage,
    number: int,
    input_hash: str,
    text: str,
    from_step: int = 0,
    nodes: int = 1,
    in_set: bool = False,
    with_devices: bool = True,
) -> Json:
    """One attempt of one stage, as a JobSet where that is asked for. It is never retried by Kubernetes but for disruptions, which are
    nobody's fault.

    `config` says which claims it needs; `text` is what it reads.
    """
    labels = job_labels(job) | {names.STAGE_LABEL: stage.value, names.ATTEMPT_LABEL: str(number)}
    spare = 0 if nodes == 1 else names.IN_SET_LENGTH if in_set else names.INDEX_LENGTH
    name = names.stage_job(job.metadata.name, stage.value, number, spare)
    template = _pod(job, resolved, config, settings, stage, labels, config_map_name(job, text), with_devices)
    if with_devices:
        first = together.first_host(job, name, nodes, in_set=in_set)
        template["spec"]["containers"][0]["env"] += together.environment(job, first, stage, nodes)
    if stage is Stage.TRAIN and nodes > 1 and not in_set:
        template["spec"]["subdomain"] = names.job_peers(job.metadata.name)
    job_only = {names.INPUT_LABEL: input_hash, names.RETRY_HASH_LABEL: retry_hash(job), names.FROM_STEP_LABEL: str(from_step)}
    manifest: Json = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": job.metadata.namespace,
            "labels": labels | job_only,
        },
        "spec": {
            "parallelism": nodes,
            "completions": nodes,
            # As one: what ends one pod ends the attempt, and the next one takes it up with as many. Parts of the rows that were made stay.
            **({"completionMode": "Indexed"} if nodes > 1 else {}),
            "backoffLimit": 0,
            "suspend": False,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    # Fails at the first exit anyway; by this rule the Job's condition names the exit code, which outlives the pod.
                    {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "NotIn", "values": [0]}},
                ]
            },
            "template": template,
        },
    }
    return together.job_set(manifest) if in_set else manifest


def suspended(manifest: Json, suspend: bool) -> Json:
    """An observed Job, or JobSet, with nothing changed but `suspend`: its template is immutable, and may have been made by another
    version of us."""
    metadata = manifest["metadata"]
    kept = {name: metadata[name] for name in ("name", "namespace", "labels") if name in metadata}
    return {
        "apiVersion": manifest["apiVersion"],
        "kind": manifest["kind"],
        "metadata": kept,
        "spec": manifest["spec"] | {"suspend": suspend},
    }


def retry_hash(job: FineTuneJob) -> str:
    """The retry annotation's value as a label: users may write anything into it."""
    return names.short_hash(job.metadata.annotations.get(names.RETRY_ANNOTATION, ""))


def _pod(
    job: FineTuneJob,
    resolved: Resolved,
    config: RunConfig,
    settings: Settings,
    stage: Stage,
    labels: dict[str, str],
    configuration: str,
    with_devices: bool,
) -> Json:
    compute = job.spec.compute
    sized = stage in SIZED_STAGES and with_devices
    volumes, mounts = _volumes(job, config, stage, configuration)
    container = {
        "name": CONTAINER,
        "image": resolved.image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": [stage.value],
        "env": _environment(job, stage),
        "ports": [{"name": "progress", "containerPort": PROGRESS_PORT, "protocol": "TCP"}],
        "resources": pods.resources(
            REQUESTS[stage],
            compute.pod.resources if sized else None,
            (compute.accelerator_resource, compute.accelerators_per_node) if sized else None,
        ),
        "securityContext": pods.container_security(),
        "terminationMessagePolicy": "File",
        "volumeMounts": mounts,
    }
    template: Json = {
        "metadata": {"labels": labels},
        "spec": pods.pod_defaults(settings, settings.pod_user)
        | {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE_SECONDS.get(stage, DEFAULT_GRACE_SECONDS),
            "containers": [container],
            "volumes": volumes,
        },
    }
    return pods.with_overrides(template, compute.pod)


def _environment(job: FineTuneJob, stage: Stage) -> list[Json]:
    env = [*pods.scratch_environment(), pods.from_field("POD_UID", "metadata.uid")]
    files = job.spec.base_model.files
    token = files.secret_ref if files is not None else None
    # Only prepare talks to the hub; the other stages read what it put into the cache.
    if token is not None and stage is Stage.PREPARE:
        env.append(pods.from_secret("HF_TOKEN", token.name, HUB_TOKEN))
    return env


def _volumes(job: FineTuneJob, config: RunConfig, stage: Stage, configuration: str) -> tuple[list[Json], list[Json]]:
    folder = str(PurePosixPath(CONFIG_PATH).parent)
    volumes = [*pods.scratch_volumes(), pods.config_volume("config", configuration)]
    mounts = [*pods.scratch_mounts(), pods.read_only_mount("config", folder)]
    claim_volumes, claim_mounts = pods.claim_mounts(written=[store_claim(job)], read=read_claims(job, config, stage))
    if stage is Stage.PREPARE:
        for deployment in feedback_deployments(config):
            name = f"feedback-{names.short_hash(deployment)}"
            volumes.append(pods.secret_volume(name, names.gateway_secret(deployment), [INTERNAL_TOKEN]))
            mounts.append(pods.read_only_mount(name, f"{FEEDBACK_PATH}/{deployment}"))
        for secret in source_secrets(job):
            name = f"source-{names.short_hash(secret)}"
            volumes.append(pods.secret_volume(name, secret))
            mounts.append(pods.read_only_mount(name, f"{SOURCES_PATH}/{secret}"))
    for place in job.spec.training.reporting if stage is Stage.TRAIN else ():
        if place.mlflow is not None and place.mlflow.secret_ref is not None:
            volumes.append(pods.secret_volume("mlflow", place.mlflow.secret_ref.name, MLFLOW_KEYS, optional=True))
            mounts.append(pods.read_only_mount("mlflow", MLFLOW_PATH))
    if stage is Stage.EVALUATE:
        for index, target in enumerate(job.spec.output.push):
            if target.secret_ref is not None:
                volumes.append(pods.secret_volume(f"push-{index}", target.secret_ref.name))
                mounts.append(pods.read_only_mount(f"push-{index}", f"{PUSH_PATH}/{index}"))
    return [*volumes, *claim_volumes], [*mounts, *claim_mounts]


# --- what a stage reads ------------------------------------------------------


def store_claim(job: FineTuneJob) -> str:
    return names.parse_pvc(job.spec.output.store.uri)[0]


def read_claims(job: FineTuneJob, config: RunConfig, stage: Stage) -> list[str]:
    """Claims that the stage only reads: the base model in all stages, reward models in all but package, the data in prepare, the
    baseline in evaluate."""
    uris = [files.uri] if (files := job.spec.base_model.files) is not None else []
    if stage is Stage.PREPARE:
        uris += [source.uri for source in config.train]
        uris += [suite.source.uri for suite in config.evaluation.suites if suite.source is not None]
    if stage is not Stage.PACKAGE and config.rollouts is not None:
        uris += [reward.model.uri for reward in config.rollouts.rewards if reward.model is not None]
    if stage is Stage.EVALUATE:
        uris += _baseline_uris(config)
    return _claims(uris)


def all_claims(job: FineTuneJob, config: RunConfig) -> tuple[str, ...]:
    """Every claim that some stage mounts."""
    return tuple(sorted({store_claim(job), *(claim for stage in Stage for claim in read_claims(job, config, stage))}))


def feedback_deployments(config: RunConfig) -> list[str]:
    sources = [*config.train, *(suite.source for suite in config.evaluation.suites if suite.source is not None)]
    return sorted({source.feedback.deployment for source in sources if source.feedback is not None})


def source_secrets(job: FineTuneJob) -> list[str]:
    """Secrets of what rows are read from."""
    return sorted({source.secret_ref.name for source in row_sources(job.spec) if source.secret_ref is not None})


def _baseline_uris(config: RunConfig) -> list[str]:
    artifact = config.evaluation.baseline.artifact
    if artifact is None:
        return []
    claim = PurePosixPath(artifact.path).relative_to(names.claim_mount("")).parts[0]
    return [f"pvc://{claim}", *([artifact.base.uri] if artifact.base is not None else [])]


def _claims(uris: Iterable[str]) -> list[str]:
    return sorted({names.parse_pvc(uri)[0] for uri in uris if uri.startswith("pvc://")})
