"""What a decision about a FineTuneJob rests on: the object, its stages' Jobs and pods, and what it refers to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuneloop_operator.api.finetunejob import FineTuneJob
from tuneloop_operator.api.kubernetes import Job, Pod, WarningEvent
from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.domain.decision import Key, Manifest, Refusal, Target
from tuneloop_operator.render import together
from tuneloop_trainer.contract import Progress, Stage


@dataclass(frozen=True)
class StageRun:
    """One attempt of one stage: a Job of ours, and its pods."""

    stage: Stage
    number: int
    input_hash: str
    """What it was asked to do."""
    retry_hash: str
    """The retry annotation that it was made under."""
    from_step: int
    """Step that training had reached when it was made."""
    job: Job
    manifest: Manifest
    """The Job, or JobSet, as it was observed, to be applied again where only `suspend` changes."""
    made_uid: str = ""
    """Of the Job that has the pods."""
    pods: tuple[Pod, ...] = ()
    """Oldest first; more than one where a disruption was made good for by Kubernetes."""
    warnings: tuple[WarningEvent, ...] = ()
    """Read only where the Job makes no headway and its pods do not say why."""

    @property
    def config_map(self) -> str | None:
        """Name of the ConfigMap that its pods read."""
        volumes = together.job_spec(self.manifest)["template"]["spec"].get("volumes") or ()
        return next((volume["configMap"]["name"] for volume in volumes if "configMap" in volume), None)

    @property
    def nodes(self) -> int:
        """Pods that share it."""
        return int(together.job_spec(self.manifest).get("parallelism", 1))

    @property
    def pod(self) -> Pod | None:
        """The newest; of several that train together, the newest of the first, which leads them."""
        leading = [pod for pod in self.pods if pod.index == 0]
        return leading[-1] if leading else None

    @property
    def held_back(self) -> Pod | None:
        """One of its pods that no node took, or whose container is not made: of several, the others wait for it."""
        unplaced = next((pod for pod in self.pods if pod.is_unschedulable), None)
        return unplaced or next((pod for pod in self.pods if pod.is_starting), None)

    @property
    def target(self) -> Target:
        metadata = self.job.metadata
        return Target(Key(self.manifest["kind"], metadata.namespace, metadata.name), metadata.uid)


@dataclass(frozen=True)
class FineTuneJobSnapshot:
    """Everything observed, at one moment."""

    job: FineTuneJob
    runs: tuple[StageRun, ...] = ()
    """Ordered by stage and number."""
    began_with: str | None = None
    """The configuration that training began with, once it has."""
    versions: tuple[ModelVersion, ...] = ()
    """Of the job's model, in its namespace."""
    deployment: ModelDeployment | None = None
    """The baseline's, where it has one."""
    missing_claims: tuple[str, ...] = ()
    """Looked for only before the first pod."""
    progress: Progress | None = None
    """Of the running pod."""
    conflicts: tuple[Key, ...] = ()
    """Children's names that somebody else has taken."""
    refusals: tuple[Refusal, ...] = ()
    """Children that the API server did not take."""
    children: tuple[Target, ...] = ()
    """Everything that the job controls."""
    has_job_sets: bool = False
    """Whether the API server serves JobSets."""

    @staticmethod
    def first_configured(runs: Sequence[StageRun]) -> str | None:
        """Name of the ConfigMap that training began with: its first attempt's, or that of the prepare before it."""
        latest_prepare = [run for run in runs if run.stage is Stage.PREPARE][-1:]
        return next((run.config_map for run in (*(run for run in runs if run.stage is Stage.TRAIN), *latest_prepare)), None)

    def of(self, stage: Stage) -> tuple[StageRun, ...]:
        return tuple(run for run in self.runs if run.stage is stage)
