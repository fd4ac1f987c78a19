"""One job's case while it is decided: what was observed, what was resolved, what each stage came to, and the status as it will be."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tuneloop_operator.api.conditions import JobReason
from tuneloop_operator.api.finetunejob import FineTuneJob, FineTuneJobStatus, Resolved
from tuneloop_operator.domain.decision import Manifest, Target
from tuneloop_operator.domain.finetunejob import findings
from tuneloop_operator.domain.finetunejob.attempts import Done, Verdict, judge, out_of_memory_attempts
from tuneloop_operator.domain.finetunejob.snapshot import FineTuneJobSnapshot, StageRun
from tuneloop_operator.render import names, together, training
from tuneloop_operator.render.run_config import run_config
from tuneloop_operator.settings import Settings
from tuneloop_trainer.contract import TOKENS_PER_MICRO_BATCH, RunConfig, Stage

STAGES = (Stage.PREPARE, Stage.TRAIN, Stage.PACKAGE, Stage.EVALUATE)


@dataclass(frozen=True)
class Standing:
    """Where a job stands, in words and as what follows from it."""

    phase: str
    reason: JobReason
    message: str
    is_stalled: bool = False
    """The user must do something; or, with `ended`, it failed for good."""
    succeeded: bool | None = None
    """True or False ends the job, but for a stalled one that has not ended."""
    ended: bool = False
    is_problem: bool = False
    """What it waits for is worth a warning."""
    requeue_after: float | None = None


@dataclass
class Case:
    """Policies read it, add what should be made, and write what they learnt into `status`."""

    snapshot: FineTuneJobSnapshot
    settings: Settings
    now: datetime
    status: FineTuneJobStatus
    apply: list[Manifest] = field(default_factory=list)
    create: list[Manifest] = field(default_factory=list)
    delete: list[Target] = field(default_factory=list)
    _config: RunConfig | None = None
    _hashes: dict[Stage, str] = field(default_factory=dict)

    @property
    def job(self) -> FineTuneJob:
        return self.snapshot.job

    @property
    def resolved(self) -> Resolved:
        return self.status.resolved

    def learn(self, **changes: Any) -> None:
        if changes.keys() & {"resolved", "artifact"}:
            self._config = None
            self._hashes.clear()
        self.status = self.status.model_copy(update=changes)

    # --- configuration ---

    def config(self) -> RunConfig:
        """As it would be rendered now; what a run reads is `config_text`."""
        if self._config is None:
            self._config = run_config(self.job, self.resolved)
        return self._config

    def config_text(self, micro_batch: int | None = None, *, is_sharded: bool = False) -> str:
        """What a stage reads: once training has begun, what it began with, whatever this version of the operator would render."""
        began_with = self.snapshot.began_with or training.config_text(self.config())
        estimate = findings.estimated(self.status.estimate) if self.status.started_at is not None else None
        return training.edited_text(began_with, micro_batch, self.config().evaluation.baseline, estimate, is_sharded=is_sharded)

    def input_hash(self, stage: Stage) -> str:
        """What an attempt of the stage is asked to do. Training and packaging cannot be asked for anything else once they have begun."""
        if stage not in self._hashes:
            self._hashes[stage] = names.short_hash(self._input(stage))
        return self._hashes[stage]

    def _input(self, stage: Stage) -> object:
        match stage:
            case Stage.PREPARE:
                asked = self.config().model_dump(mode="json")
                return asked if self.job.spec.data.workers == 1 else [asked, self.job.spec.data.workers]
            case Stage.EVALUATE:
                pinned, artifact = self.resolved.baseline, self.status.artifact
                baseline = [pinned.name, pinned.manifest_digest] if pinned is not None else None
                return [baseline, artifact.manifest_digest if artifact is not None else None]
        return stage.value

    def is_sharded(self) -> bool:
        """As estimated, or as asked for where nothing could be."""
        asked = self.job.spec.compute.parallelism == "FSDP" and together.processes(self.job) > 1
        return self.status.estimate.parallelism == "FSDP" if self.status.estimate is not None else asked

    def micro_batch(self) -> int | None:
        """What was estimated to fit; half of it, or of what the trainer would take itself, after an attempt that was out of memory."""
        estimated = self.status.estimate.micro_batch_size if self.status.estimate is not None else None
        if not out_of_memory_attempts(self.snapshot.of(Stage.TRAIN)):
            return estimated
        if estimated is not None:
            return max(1, estimated // 2)
        asked = self.job.spec.training
        tokens = TOKENS_PER_MICRO_BATCH["cuda" if self.job.spec.compute.accelerators_per_node else "cpu"]
        own_choice = min(asked.global_batch_size // together.processes(self.job), max(1, tokens // asked.max_sequence_length))
        return max(1, own_choice // 2)

    # --- stages ---

    def runs(self, stage: Stage) -> tuple[StageRun, ...]:
        """Attempts that were asked for what is asked for now."""
        runs = self.snapshot.of(stage)
        if stage is Stage.PREPARE:
            retry = training.retry_hash(self.job)
            runs = tuple(run for run in runs if run.retry_hash == retry)
        if stage in (Stage.PREPARE, Stage.EVALUATE):
            wanted = self.input_hash(stage)
            runs = tuple(run for run in runs if run.input_hash == wanted)
        return runs

    def verdict(self, stage: Stage) -> Verdict:
        return judge(stage, self.runs(stage), self.job.spec.run_policy.max_restarts, self.reached_step)

    def is_settled(self, stage: Stage) -> bool:
        """Whether a stage's result is in the status already, so that its pod is no longer needed."""
        match stage:
            case Stage.PREPARE:
                return self.status.started_at is not None and self.resolved.base_digest is not None
            case Stage.TRAIN:
                return self.status.artifact is not None or bool(self.snapshot.of(Stage.PACKAGE))
            case Stage.PACKAGE:
                return self.status.artifact is not None
        return False

    def is_done(self, stage: Stage) -> bool:
        return self.is_settled(stage) or isinstance(self.verdict(stage), Done)

    @property
    def stage(self) -> Stage | None:
        """The first that is not done; None where all are."""
        return next((stage for stage in STAGES if not self.is_done(stage)), None)

    @property
    def reached_step(self) -> int:
        return max(self.status.progress.step if self.status.progress is not None else 0, self.status.checkpoint_step or 0)

    def next_number(self, stage: Stage) -> int:
        """The number is written before the Job is made: one that was written and not made is taken up again."""
        written = {Stage.PREPARE: self.status.prepare_runs, Stage.TRAIN: self.status.attempts}.get(stage, 0)
        made = max((run.number for run in self.snapshot.of(stage)), default=0)
        return max(made + 1, written)

    def start(self, stage: Stage, *, nodes: int | None = None, with_devices: bool = True) -> None:
        """Make the next attempt of a stage, on as many nodes as the spec says where nothing else is."""
        nodes = nodes or together.nodes(self.job, stage, with_devices=with_devices)
        number = self.next_number(stage)
        text = self.config_text(self.micro_batch(), is_sharded=self.is_sharded()) if stage is Stage.TRAIN else self.config_text()
        in_set = stage is Stage.TRAIN and nodes > 1 and self.snapshot.has_job_sets
        manifest = training.stage_job(
            self.job,
            self.resolved,
            self.config(),
            self.settings,
            stage=stage,
            number=number,
            input_hash=self.input_hash(stage),
            text=text,
            from_step=self.reached_step if stage is Stage.TRAIN else 0,
            nodes=nodes,
            in_set=in_set,
            with_devices=with_devices,
        )
        if stage is Stage.TRAIN and nodes > 1 and not in_set:
            self.apply.append(together.service(self.job, training.job_labels(self.job)))
        self.apply += [training.progress_policy(self.job, self.settings), training.config_map(self.job, text), manifest]
        if stage is Stage.PREPARE:
            self.learn(prepare_runs=number)
        if stage is Stage.TRAIN:
            self.learn(attempts=number)
