"""A ModelDeployment with the cluster around it: decisions are carried out in memory, pods and gateways do as the test says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from tuneloop_gateway.contract import (
    DriftReport,
    DriftStatus,
    FeedbackReport,
    GatewayConfig,
    GatewayState,
    Outcomes,
    ProbeState,
    RevisionReport,
    RevisionState,
    SkewReport,
)  # fmt: skip
from tuneloop_operator.api.finetunejob import FineTuneJob
from tuneloop_operator.api.kubernetes import Deployment, Pod
from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.domain import times
from tuneloop_operator.domain.decision import Decision, Key, Refusal, Target
from tuneloop_operator.domain.modeldeployment import (
    EPOCH_ANNOTATION,
    REARMED_ANNOTATION,
    STABLE_ANNOTATION,
    GatewayPod,
    ObservedConfig,
    Snapshot,
    decide,
)
from tuneloop_operator.render import names
from tuneloop_operator.render.gateway import FreshKeys
from tuneloop_operator.render.revisions import IN_PLACE_SINCE, Pinned, Revision, decoded, parse_progress, parse_verdict
from tuneloop_operator.settings import Settings

Json = dict[str, Any]
NOW = datetime(2026, 1, 15, 12, 0, tzinfo=UTC)
WORKLOADS = ("Deployment", "LeaderWorkerSet")
DIGEST = "sha256:" + "0123456789abcdef" * 4
GATEWAY_UID = "gateway-pod"


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


TEMPLATE = {"prompt": "Sentiment of: {{ text }}", "completion": "{{ label }}"}
LINEAGE_SPEC: Json = {
    "baseModel": {"uri": "pvc://models/base"},
    "method": {"type": "LoRA", "lora": {"rank": 12}},
    "data": {"train": [{"source": {"uri": "pvc://datasets/tweets.jsonl"}, "columns": {"text": "tweet"}, "template": TEMPLATE}]},
    "training": {"maxSteps": 12},
    "evaluation": {
        "suites": [
            {
                "name": "held-out",
                "dataset": {"source": {"uri": "pvc://datasets/gate.jsonl"}, "template": TEMPLATE, "labels": ["good", "bad"]},
            }
        ],
        "gates": [{"suite": "held-out", "rule": "Superior", "minItems": 300}],
        "baseline": {"type": "Base"},
    },
    "output": {"model": "sentiment", "store": {"uri": "pvc://models/store"}, "format": "Merged"},
    "runPolicy": {"maxRestarts": 1},
}


def make_version(number: int = 1, *, approval: str = "Approved", verified: bool = True, **spec: Any) -> ModelVersion:
    """A merged model on the claim `models`, with probes, from the job `tune`."""
    fields: Json = {
        "model": "sentiment",
        "version": number,
        "artifact": {"uri": f"pvc://models/sentiment/v{number}", "manifestDigest": digest(number), "format": "Merged", "sizeBytes": 5},
        "base": {"source": {"uri": "pvc://models/base"}, "digest": DIGEST},
        "lineage": {"fineTuneJob": "tune", "fineTuneJobUid": "1", "spec": LINEAGE_SPEC, "configDigest": DIGEST},
        "probesUri": f"pvc://models/runs/{number}/probes.json",
        "prompt": {"format": "Chat", "template": "Sentiment of: {{ text }}"},
        "approval": approval,
    }
    condition = {"type": "Verified", "status": str(verified), "reason": "EvaluatedByDigest"}
    return ModelVersion.model_validate(
        {"metadata": {"name": f"sentiment-v{number}"}, "spec": fields | spec, "status": {"conditions": [condition]}}
    )


def make_adapter(number: int = 1, rank: int | None = None, uri: str = "", **spec: Any) -> ModelVersion:
    """An adapter on `models/base`, with probes and a sample of its training inputs."""
    artifact = {"uri": uri or f"pvc://models/sentiment/v{number}", "manifestDigest": digest(number), "format": "Adapter", "sizeBytes": 5}
    recorded = {"referenceUri": f"pvc://models/runs/{number}/reference.json"}
    return make_version(number, artifact=artifact | ({"rank": rank} if rank else {}), **(recorded | spec))


def make_job(name: str, *, succeeded: str | None = None, reason: str = "Training", uid: str = "job-uid", **status: Any) -> FineTuneJob:
    """A retraining job; `succeeded` is the status of its condition."""
    conditions = [{"type": "Succeeded", "status": succeeded or "Unknown", "reason": reason, "message": "Numbers."}]
    return FineTuneJob.model_validate(
        {"metadata": {"name": name, "uid": uid}, "spec": LINEAGE_SPEC | {"runPolicy": {}}, "status": {"conditions": conditions} | status}
    )


MONITORED: Json = {"monitoring": {"drift": {"size": 500}}}
RETRAINED: Json = MONITORED | {
    "retraining": {"triggers": [{"type": "Drift"}], "minNewExamples": 200, "cooldownSeconds": 3600, "maxRunsPerMonth": 3}
}


class Killed(Exception):
    """The operator ended between two writes."""


@dataclass
class World:
    """Mutable on purpose: a test changes what it likes between two passes."""

    spec: Json = field(default_factory=dict)
    versions: list[ModelVersion] = field(default_factory=lambda: [make_version(1)])
    jobs: list[FineTuneJob] = field(default_factory=list)
    annotations: dict[str, str] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)
    now: datetime = NOW
    name: str = "tweets"
    generation: int = 1
    status: Json = field(default_factory=dict)
    objects: dict[tuple[str, str], Json] = field(default_factory=dict)
    created: list[Json] = field(default_factory=list)
    born: dict[tuple[str, str], str] = field(default_factory=dict)
    conflicts: tuple[Key, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    guard_source: str = "GUARD = 1"
    # what pods do
    ready: dict[str, int] = field(default_factory=dict)
    """Ready pods by engineHash; an engine that is not named here has as many as it should."""
    pod_status: dict[str, Json] = field(default_factory=dict)
    """Status of an engine's pods that are not ready."""
    warnings: dict[str, str] = field(default_factory=dict)
    gateways: int = 1
    gateway_answers: bool = True
    applies: bool = True
    """The gateway takes up a new configuration at once."""
    applied: GatewayConfig | None = None
    warm: bool = True
    probe: ProbeState = field(default_factory=lambda: ProbeState(status="Done", asked=50, agreed=50))
    second_probe: ProbeState | None = None
    """What the second gateway says, where it is another."""
    prompt_digest: str = ""
    """Of the prompt that engines read, where the gateway is to tell it."""
    engine_versions: dict[int, str] = field(default_factory=dict)
    """Version of the model -> vLLM's, where engines are to tell it."""
    omitted: str = ""
    """A revision that the second gateway does not speak of."""
    loaded: dict[int, int] = field(default_factory=dict)
    """Version -> replicas that have loaded its adapter; all, where it is not named."""
    load_errors: dict[int, str] = field(default_factory=dict)
    """Version -> why a replica could not load its adapter."""
    in_flight: dict[str, int] = field(default_factory=dict)
    held: int = 0
    idle: float = 0.0
    """Seconds for which the gateways have had no request."""
    busy_second: bool = False
    """The second gateway has one."""
    silent_second: bool = False
    """The second gateway does not answer."""
    outcomes_of: dict[int, Outcomes] = field(default_factory=dict)
    """Version -> what each gateway counted of it in the window."""
    drift: DriftReport | None = None
    """None: monitoring, and nothing found."""
    skew: SkewReport | None = None
    drift_is_read: bool = True
    """The gateways have read their database."""
    feedback: FeedbackReport = field(default_factory=FeedbackReport)
    prometheus: Any = None
    reads_prometheus: bool = False
    has_keda: bool = False
    has_groups: bool = False
    worker_status: dict[str, Json] = field(default_factory=dict)
    """Status of an engine's workers that are not ready."""
    writes_left: int | None = None
    """Writes that the operator makes before it is killed; None = it lives."""

    # --- one pass ---

    def step(self, seconds: float = 1) -> Decision:
        """Observes, decides, and carries the decision out as the operator does: status first."""
        self.now += timedelta(seconds=seconds)
        decision = decide(self.snapshot(), self.settings, self.now)
        try:
            self.carry_out(decision)
        finally:
            if self.applies:
                self.apply_config()
        return decision

    def carry_out(self, decision: Decision) -> None:
        """Each write that changes something is one that `writes_left` allows, or the operator ends before it."""
        status = json.loads(json.dumps(decision.status))
        if status != self.status:
            self._count()
            self.status = status
        for manifest in decision.create:
            if not any(_name(manifest) == _name(known) for known in self.created):
                self._count()
                self.created.append(manifest)
        for manifest in decision.apply:
            if self.objects.get(_name(manifest)) != manifest:
                self._count()
                self.objects[_name(manifest)] = manifest
                self.born.setdefault(_name(manifest), times.to_text(self.now + timedelta(seconds=1)))
        for target in decision.delete:
            self._count()
            del self.objects[target.key.kind, target.key.name]
            del self.born[target.key.kind, target.key.name]

    def _count(self) -> None:
        if self.writes_left == 0:
            raise Killed
        if self.writes_left is not None:
            self.writes_left -= 1

    def settle(self, passes: int = 12) -> Decision:
        """Until a pass changes nothing; fails where that never comes."""
        for _ in range(passes):
            before = json.dumps([self.status, sorted(map(str, self.objects.items()))])
            decision = self.step()
            if json.dumps([self.status, sorted(map(str, self.objects.items()))]) == before:
                return decision
        raise AssertionError("The decisions do not come to rest.")

    def apply_config(self) -> None:
        text = self.config_text()
        self.applied = GatewayConfig.model_validate_json(text) if text else None

    # --- looking at it ---

    def condition(self, type_: str) -> tuple[str, str] | None:
        """(status, reason)"""
        return next(((c["status"], c["reason"]) for c in self.status["conditions"] if c["type"] == type_), None)

    def message(self, type_: str) -> str:
        return next(c["message"] for c in self.status["conditions"] if c["type"] == type_)

    def config_text(self) -> str:
        config_map = self.objects.get(("ConfigMap", names.gateway(self.name)))
        return config_map["data"]["config.json"] if config_map else ""

    @property
    def config(self) -> GatewayConfig:
        return GatewayConfig.model_validate_json(self.config_text())

    def weights(self) -> dict[int | None, int]:
        """Version -> weight."""
        return {revision.version: revision.weight for revision in self.config.revisions}

    def roles(self) -> dict[int | None, str]:
        return {revision.version: revision.state.value for revision in self.config.revisions}

    def engines(self) -> list[str]:
        """engineHashes that have a Deployment, or a LeaderWorkerSet."""
        found = (m["metadata"]["labels"].get(names.ENGINE_LABEL) for (kind, _), m in self.objects.items() if kind in WORKLOADS)
        return sorted(hashed for hashed in found if hashed)

    def engine_of(self, version: int) -> str:
        return next(r.pinned.engine_hash for r in self._revisions() if r.pinned.version == version)

    def outcomes(self) -> dict[int, str | None]:
        return {r.pinned.version: r.verdict.outcome.value if r.verdict else None for r in self._revisions()}

    # --- observing it ---

    @property
    def deployment(self) -> ModelDeployment:
        metadata = {
            "name": self.name,
            "namespace": "shop",
            "uid": "mdep-uid",
            "generation": self.generation,
            "annotations": self.annotations,
        }
        spec = {"model": {"name": "sentiment"}} | self.spec
        return ModelDeployment.model_validate({"metadata": metadata, "spec": spec, "status": self.status})

    def snapshot(self) -> Snapshot:
        deployments = {name: m for (kind, name), m in self.objects.items() if kind in WORKLOADS}
        engines = {h: self._made(m) for m in deployments.values() if (h := m["metadata"]["labels"].get(names.ENGINE_LABEL))}
        config_map = self.objects.get(("ConfigMap", names.gateway(self.name)))
        has_gateway = names.gateway(self.name) in deployments
        return Snapshot(
            deployment=self.deployment,
            versions=tuple(self.versions),
            revisions=tuple(self._revisions()),
            engines=engines,
            engine_pods={hashed: self._engine_pods(hashed, item.spec.replicas) for hashed, item in engines.items()},
            engine_workers={h: (make_pod(f"{h}-0-1", ready=False, **status),) for h, status in self.worker_status.items()},
            guards={m["metadata"]["labels"][names.ENGINE_LABEL]: m["data"]["engine_guard.py"] for m in self._guards()},
            guard_source=self.guard_source,
            gateway=Deployment.model_validate(deployments[names.gateway(self.name)]) if has_gateway else None,
            gateway_pods=tuple(self._gateway_pods()) if has_gateway else (),
            config=_observed(config_map) if config_map else None,
            jobs=tuple(self.jobs),
            evidence=self.prometheus,
            reads_prometheus=self.reads_prometheus,
            has_keda=self.has_keda,
            has_groups=self.has_groups,
            warnings=self.warnings,
            owned=tuple(Target(Key(kind, "shop", name), f"{kind}/{name}") for kind, name in self.objects),
            conflicts=self.conflicts,
            refusals=self.refusals,
            keys=None if has_gateway else FreshKeys("a", "b", "c"),
        )

    def _made(self, manifest: Json) -> Deployment:
        return Deployment.model_validate(manifest | {"metadata": manifest["metadata"] | {"creationTimestamp": self.born[_name(manifest)]}})

    def _guards(self) -> list[Json]:
        return [m for (kind, _), m in self.objects.items() if kind == "ConfigMap" and names.ENGINE_LABEL in m["metadata"]["labels"]]

    def _revisions(self) -> list[Revision]:
        return [
            Revision(
                name=name,
                number=m["revision"],
                created_at=self.born[kind, name],
                pinned=_pinned(m["data"]),
                data=m["data"],
                verdict=parse_verdict(m["metadata"]["annotations"]),
                progress=parse_progress(m["metadata"]["annotations"]),
                in_place=m["metadata"]["annotations"].get(IN_PLACE_SINCE, ""),
            )
            for (kind, name), m in self.objects.items()
            if kind == "ControllerRevision"
        ]

    def _engine_pods(self, hashed: str, replicas: int) -> tuple[Pod, ...]:
        ready = self.ready.get(hashed, replicas)
        return tuple(make_pod(f"{hashed}-{n}", ready=n < ready, **self.pod_status.get(hashed, {})) for n in range(replicas))

    def _gateway_pods(self) -> list[GatewayPod]:
        pods = [make_pod(f"{GATEWAY_UID}-{n}", ready=True) for n in range(self.gateways)]
        return [GatewayPod(pod, self._state(pod) if self.gateway_answers and not self._is_silent(pod) else None) for pod in pods]

    def _is_silent(self, pod: Pod) -> bool:
        return self.silent_second and pod.metadata.uid.endswith("-1")

    def _state(self, pod: Pod) -> GatewayState | None:
        config = self.applied
        if config is None:
            return None
        epoch = config.drift.epoch if config.drift else "0"
        drift = self.drift or DriftReport(status=DriftStatus.MONITORING, epoch=epoch, log_threshold=11.5)
        return GatewayState(
            pod_uid=pod.metadata.uid,
            started_at="2026-01-15T12:00:00Z",
            generation=config.generation,
            revisions=tuple(self._report(r.name, r.service, r.state, pod) for r in config.revisions if not self._omits(pod, r.name)),
            held=self.held,
            idle_seconds=0 if self.busy_second and pod.metadata.uid.endswith("-1") else self.idle,
            window=config.window,
            drift=drift if self.drift_is_read else None,
            skew=self.skew,
            feedback=self.feedback,
        )

    def _omits(self, pod: Pod, revision: str) -> bool:
        return pod.metadata.uid.endswith("-1") and revision == self.omitted

    def _report(self, name: str, service: str, state: RevisionState, pod: Pod) -> RevisionReport:
        hashed = service.rpartition("-")[2]
        made = self.objects.get(("Deployment", service)) or self.objects.get(("LeaderWorkerSet", service))
        replicas = made["spec"]["replicas"] if made else 0
        said = self.second_probe if self.second_probe and pod.metadata.uid.endswith("-1") else self.probe
        probe = said if state is RevisionState.CANDIDATE else ProbeState(status="Pending")
        version = next(r.version for r in self.applied.revisions if r.name == name) if self.applied else None
        refused = self.load_errors.get(version or 0, "")
        endpoints = 0 if refused else min(self.ready.get(hashed, replicas), self.loaded.get(version or 0, replicas))
        error = self._prompt_error(name)
        warm = self.warm and endpoints > 0 and not error
        asked = {r.name for r in self.applied.revisions if r.probe_text} if self.applied else set()
        told = self.prompt_digest if warm and name in asked else ""
        in_flight = self.in_flight.get(name, 0)
        counted = self.outcomes_of.get(version or 0, Outcomes()) if self.applied and self.applied.window else None
        return RevisionReport(
            name=name, endpoints=endpoints, warm=warm, prompt_error=error, probe=probe, prompt_digest=told, in_flight=in_flight,
            outcomes=counted, engine_version=self.engine_versions.get(version or 0, "") if warm else "", load_error=refused,
        )  # fmt: skip

    def _prompt_error(self, name: str) -> str:
        """As a gateway says it of a template with a filter that does not exist."""
        revision = next(r for r in self._revisions() if r.name == name)
        return "The prompt template is not valid Jinja: No filter." if "nonsense" in (revision.pinned.prompt.template or "") else ""


def make_pod(uid: str, *, ready: bool, **status: Any) -> Pod:
    conditions = [{"type": "Ready", "status": str(ready), "lastTransitionTime": "2026-01-15T12:00:00Z"}]
    fields = {"phase": "Running", "podIP": "10.0.0.1", "conditions": conditions, "startTime": "2026-01-15T12:00:00Z"}
    if not ready:
        fields |= status | {"conditions": [*conditions, *status.get("conditions", [])]}
    return Pod.model_validate({"metadata": {"name": uid, "uid": uid}, "spec": {"nodeName": "n"}, "status": fields})


def _name(manifest: Json) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


def _pinned(data: Json) -> Pinned:
    pinned = decoded(data)
    assert pinned is not None
    return pinned


def _observed(config_map: Json) -> ObservedConfig:
    text = config_map["data"]["config.json"]
    config = GatewayConfig.model_validate_json(text)
    annotations = config_map["metadata"]["annotations"]
    return ObservedConfig(
        text=text,
        generation=config.generation,
        config=config,
        rearmed=annotations.get(REARMED_ANNOTATION, ""),
        stable_since=int(annotations[STABLE_ANNOTATION]),
        epoch_since=int(annotations[EPOCH_ANNOTATION]),
    )


def alarm(epoch: str = "0", effect: float = 0.3) -> DriftReport:
    """A latched alarm."""
    return DriftReport(
        status=DriftStatus.ALARM,
        epoch=epoch,
        log_evidence=15.2,
        log_threshold=11.5,
        effect=effect,
        pairs=321,
        detected_at="2026-01-15T12:30:00Z",
    )


def in_place() -> World:
    """Version 1 serves; version 2 is to take its place, and is not ready yet."""
    world = World(spec={"rollout": {"strategy": "Recreate"}})
    world.settle()
    world.versions.append(make_version(2))
    world.step()
    world.ready[world.engine_of(2)] = 0
    world.step()
    return world
