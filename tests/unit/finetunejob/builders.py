"""Builds FineTuneJobs and plays the cluster: applies decisions to a store, and lets pods say what a test wants them to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from tuneloop_operator.api.finetunejob import FineTuneJob
from tuneloop_operator.api.kubernetes import Job, Pod, WarningEvent
from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.domain import times
from tuneloop_operator.domain.decision import Decision, Key, Refusal, Target
from tuneloop_operator.domain.finetunejob import FineTuneJobSnapshot, StageRun, decide
from tuneloop_operator.render import names
from tuneloop_operator.settings import Settings
from tuneloop_trainer.contract import (
    EvaluateSummary,
    GateResult,
    PackageSummary,
    PrepareSummary,
    Progress,
    Reason,
    Stage,
    StageResult,
    TrainSummary,
)

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SETTINGS = Settings(trainer_image="registry.example/trainer:1")
UID = "0f0e0d0c-1111-2222-3333-444455556666"
DIGEST = "sha256:" + "a" * 64
BASE_DIGEST = "sha256:" + "b" * 64


def make_spec(**changes: Any) -> dict[str, Any]:
    """A spec as users write it; `changes` replace top-level fields."""
    spec: dict[str, Any] = {
        "baseModel": {"uri": "pvc://models/bases/smol"},
        "data": {"train": [{"source": {"uri": "pvc://datasets/tweets.jsonl"}}]},
        "evaluation": {
            "suites": [{"name": "held-out", "dataset": {"source": {"uri": "pvc://datasets/gate.jsonl"}, "labels": ["good", "bad"]}}],
            "gates": [{"suite": "held-out", "rule": "Superior"}],
        },
        "output": {"model": "sentiment", "store": {"uri": "pvc://models"}},
    }
    return spec | changes


def make_job(spec: dict[str, Any] | None = None, status: dict[str, Any] | None = None, **metadata: Any) -> FineTuneJob:
    given = {
        "metadata": {"name": "tweets", "namespace": "team", "uid": UID, "generation": 1, "resourceVersion": "1"} | metadata,
        "spec": spec if spec is not None else make_spec(),
        "status": status or {},
    }
    return FineTuneJob.model_validate(given)


# --- what stages say ---------------------------------------------------------


def prepared(**changes: Any) -> StageResult:
    summary = PrepareSummary(
        rows_in=1200,
        rows_kept=1100,
        dropped={"Duplicate": 100},
        tokens=50_000,
        supervised_share=0.1,
        warnings=("The run has 12 steps only.",),
        rows_per_second=35120.04,
        peak_memory_bytes=1 << 30,
        max_steps=12,
        base_digest=BASE_DIGEST,
        dataset_digests={"pvc://datasets/tweets.jsonl": "c" * 64},
        shards_digest="d" * 64,
        prompt_probe_sha256="sha256:" + "e" * 64,
    )
    summary = summary.model_copy(update=changes)
    return StageResult(stage=Stage.PREPARE, exit_code=0, uri="/volumes/models/runs/x/prepare/card.json", prepare=summary)


def trained(step: int = 12) -> StageResult:
    return StageResult(stage=Stage.TRAIN, exit_code=0, train=TrainSummary(step=step, max_steps=12, samples=step * 16, loss=0.5, seconds=70))


def packaged() -> StageResult:
    summary = PackageSummary(path="/volumes/models/elsewhere", manifest_digest=DIGEST, format="Adapter", size_bytes=1000)
    return StageResult(stage=Stage.PACKAGE, exit_code=0, package=summary)


def evaluated(verdict: Any = "Pass", digest: str = DIGEST) -> StageResult:
    gate = GateResult(
        suite="held-out",
        metric="Accuracy",
        rule="Superior",
        verdict="Pass" if verdict == "NoGates" else verdict,
        candidate=0.91,
        baseline=0.6,
        difference=0.31,
        lower=0.25,
        upper=0.37,
        n=400,
        p=1e-9,
    )
    gates = () if verdict == "NoGates" else (gate,)
    probes = f"/volumes/models/runs/tweets-{UID[:8]}/evaluate/probes.json"
    summary = EvaluateSummary(verdict=verdict, artifact_digest=digest, gates=gates, probes=probes, has_reference=True)
    return StageResult(stage=Stage.EVALUATE, exit_code=0, uri=probes.replace("probes", "results"), evaluate=summary)


def failed(stage: Stage, code: int, reason: Reason | None = None, message: str = "") -> StageResult:
    return StageResult(stage=stage, exit_code=code, reason=reason, message=message)


RESULTS = {Stage.PREPARE: prepared, Stage.TRAIN: trained, Stage.PACKAGE: packaged, Stage.EVALUATE: evaluated}


def make_pod(job: Job, state: dict[str, Any] | None = None, **status: Any) -> Pod:
    statuses = [{"name": "stage", "state": state}] if state is not None else []
    given = {
        "metadata": {
            "name": f"{job.metadata.name}-x",
            "namespace": "team",
            "uid": f"pod-{job.metadata.uid}",
            "creationTimestamp": job.metadata.creation_timestamp,
        },
        "status": {"phase": "Pending", "containerStatuses": statuses} | status,
    }
    return Pod.model_validate(given)


# --- the cluster -------------------------------------------------------------


@dataclass
class World:
    """One job and its surroundings. `step` is a pass: observe, decide, apply."""

    job: FineTuneJob = field(default_factory=make_job)
    runs: dict[str, StageRun] = field(default_factory=dict)
    versions: dict[str, ModelVersion] = field(default_factory=dict)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Children that are no Jobs, by kind/name."""
    deployment: ModelDeployment | None = None
    missing_claims: tuple[str, ...] = ()
    progress: Progress | None = None
    conflicts: tuple[Key, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    now: datetime = NOW
    writes: int = 0
    settings: Settings = SETTINGS
    has_job_sets: bool = False
    events: list[Any] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    """Names of everything that was ever made, in order."""

    # --- passes ---

    def snapshot(self) -> FineTuneJobSnapshot:
        order = list(Stage)
        runs = sorted(self.runs.values(), key=lambda run: (order.index(run.stage), run.number))
        first = FineTuneJobSnapshot.first_configured(runs) if self.job.status.started_at is not None else None
        children = [run.target for run in runs]
        children += [Target(Key(kind, "team", name), f"uid-{name}") for kind, _, name in (place.partition("/") for place in self.others)]
        return FineTuneJobSnapshot(
            job=self.job,
            runs=tuple(runs),
            began_with=self.others[f"ConfigMap/{first}"]["data"]["config.json"] if first is not None else None,
            versions=tuple(self.versions.values()),
            deployment=self.deployment,
            missing_claims=self.missing_claims if not runs else (),
            progress=self.progress,
            conflicts=self.conflicts,
            refusals=self.refusals,
            children=tuple(children),
            has_job_sets=self.has_job_sets,
        )

    def decide(self) -> Decision:
        return decide(self.snapshot(), self.settings, self.now)

    def step(self) -> Decision:
        decision = self.decide()
        self.write_status(decision)
        self.write_objects(decision)
        self.events += decision.events
        return decision

    def write_status(self, decision: Decision) -> None:
        raw = {"metadata": self.job.metadata.model_dump(), "spec": self.job.spec.model_dump(), "status": decision.status}
        fresh = FineTuneJob.model_validate(raw)
        if fresh.status != self.job.status:
            self.writes += 1
        self.job = fresh

    def write_objects(self, decision: Decision) -> None:
        for manifest in decision.create:
            self.create_version(manifest)
        for manifest in decision.apply:
            self.apply(manifest)
        for target in decision.delete:
            self.runs.pop(target.key.name, None)
            self.others.pop(f"{target.key.kind}/{target.key.name}", None)

    def apply(self, manifest: dict[str, Any]) -> None:
        name = manifest["metadata"]["name"]
        if manifest["kind"] not in ("Job", "JobSet"):
            place = f"{manifest['kind']}/{name}"
            if self.others.get(place) != manifest:
                self.writes += 1
                self.others[place] = manifest
                self.made.append(place)
            return
        self.writes += 1
        known = self.runs.get(name)
        if known is not None:
            spec = known.job.spec.model_copy(update={"suspend": manifest["spec"]["suspend"]})
            job = known.job.model_copy(update={"spec": spec})
            self.runs[name] = replace(known, job=job, manifest=known.manifest | {"spec": manifest["spec"]})
            return
        labels = manifest["metadata"]["labels"]
        metadata = manifest["metadata"] | {"uid": f"uid-{name}", "creationTimestamp": times.to_text(self.now)}
        self.made.append(f"Job/{name}")
        self.runs[name] = StageRun(
            stage=Stage(labels[names.STAGE_LABEL]),
            number=int(labels[names.ATTEMPT_LABEL]),
            input_hash=labels[names.INPUT_LABEL],
            retry_hash=labels[names.RETRY_HASH_LABEL],
            from_step=int(labels[names.FROM_STEP_LABEL]),
            job=Job.model_validate({"metadata": metadata, "spec": {"suspend": manifest["spec"]["suspend"]}}),
            manifest=manifest,
        )

    def create_version(self, manifest: dict[str, Any]) -> None:
        name = manifest["metadata"]["name"]
        if name not in self.versions:
            self.writes += 1
            self.made.append(f"ModelVersion/{name}")
            self.versions[name] = ModelVersion.model_validate(manifest)

    # --- what happens in the cluster ---

    def current(self) -> StageRun:
        """The one Job that has not ended."""
        active = [run for run in self.runs.values() if not run.job.is_finished]
        assert len(active) == 1, f"active: {[run.job.metadata.name for run in active]}"
        return active[0]

    def replace_run(self, run: StageRun, **changes: Any) -> None:
        self.runs[run.job.metadata.name] = replace(run, **changes)

    def pod_is(self, state: dict[str, Any] | None = None, **status: Any) -> None:
        run = self.current()
        self.replace_run(run, pods=(make_pod(run.job, state, **status),))

    def pod_runs(self) -> None:
        self.pod_is({"running": {"startedAt": times.to_text(self.now)}}, phase="Running", podIP="10.0.0.9")

    def warn(self, reason: str, message: str) -> None:
        event = WarningEvent.model_validate({"metadata": {"name": "e"}, "reason": reason, "message": message})
        run = self.current()
        self.replace_run(run, warnings=(event,))

    def ends(self, result: StageResult | None, code: int | None = None, *, keep_pod: bool = True, started: datetime | None = None) -> None:
        """The current Job ends with what its pod said; without one only the code is known."""
        run = self.current()
        exit_code = result.exit_code if result is not None else code
        message = result.model_dump_json(by_alias=True, exclude_none=True) if result is not None else ""
        pods: tuple[Pod, ...] = ()
        if keep_pod and exit_code is not None:
            span = {"startedAt": times.to_text(started or self.now), "finishedAt": times.to_text(self.now)}
            pods = (make_pod(run.job, {"terminated": {"exitCode": exit_code, "message": message, **span}}),)
        kind = "Complete" if exit_code == 0 else "Failed"
        text = f"Container stage for pod team/x failed with exit code {exit_code} matching FailJob rule at index 1" if exit_code else ""
        condition = {"type": kind, "status": "True", "message": text, "lastTransitionTime": times.to_text(self.now)}
        status = run.job.status.model_validate({"conditions": [condition]})
        self.replace_run(run, job=run.job.model_copy(update={"status": status}), pods=pods)

    def edit(self, spec: dict[str, Any] | None = None, annotations: dict[str, str] | None = None) -> None:
        """The user edits the object."""
        metadata = self.job.metadata.model_dump()
        metadata["generation"] += spec is not None
        metadata["annotations"] = annotations if annotations is not None else metadata["annotations"]
        raw = {"metadata": metadata, "spec": spec or self.job.spec.model_dump(), "status": self.job.status.model_dump()}
        self.job = FineTuneJob.model_validate(raw)

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    # --- shortcuts ---

    def settle(self, limit: int = 10) -> Decision:
        """Passes until one changes nothing."""
        for _ in range(limit):
            before = self.writes
            decision = self.step()
            if self.writes == before:
                return decision
        raise AssertionError(f"not settled after {limit} passes: {self.job.status.phase} {self.job.status.message}")

    def up_to(self, stage: Stage) -> World:
        """Runs the stages before `stage`, and starts it."""
        self.settle()
        for earlier in list(Stage)[: list(Stage).index(stage)]:
            self.ends(RESULTS[earlier]())
            self.settle()
        assert self.current().stage is stage
        return self

    # --- what tests look at ---

    def condition(self, type_: str) -> tuple[str, str] | None:
        found = next((c for c in self.job.status.conditions if c.type == type_), None)
        return None if found is None else (found.status.value, found.reason)

    def message(self) -> str:
        return self.job.status.message

    def config(self, run: StageRun) -> dict[str, Any]:
        volumes = run.manifest["spec"]["template"]["spec"]["volumes"]
        name = next(volume["configMap"]["name"] for volume in volumes if "configMap" in volume)
        config: dict[str, Any] = json.loads(self.others[f"ConfigMap/{name}"]["data"]["config.json"])
        return config
