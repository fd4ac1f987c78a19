"""What a pass over a ModelDeployment has before it: the object, its children, its gateways' answers, the versions of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tuneloop_gateway.contract import GatewayConfig, GatewayState, RevisionReport, RevisionState
from tuneloop_operator.api.finetunejob import FineTuneJob
from tuneloop_operator.api.kubernetes import Deployment, Pod
from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.domain.decision import Key, Refusal, Target
from tuneloop_operator.render.gateway import FreshKeys
from tuneloop_operator.render.revisions import Revision


@dataclass(frozen=True)
class GatewayPod:
    """A pod of the gateway, and what it said of itself; None where it did not answer, or not sensibly."""

    pod: Pod
    state: GatewayState | None = None


@dataclass(frozen=True)
class ObservedConfig:
    """The gateway's ConfigMap as it stands in the cluster."""

    text: str
    generation: int
    """Also where the text is no configuration that this operator understands."""
    config: GatewayConfig | None
    rearmed: str
    """The value of the re-arming annotation that has been acted upon."""
    stable_since: int = 1
    """Generation from which on its stable revision has all traffic."""
    epoch_since: int = 1
    """Generation by which the detector's epoch began: what was measured under an earlier one is of an epoch that is over."""


@dataclass(frozen=True)
class Evidence:
    """What is known of drift and feedback, from the gateways' states or from Prometheus, of the current epoch only."""

    is_alarm: bool
    is_collecting: bool
    is_exhausted: bool
    log_evidence: float
    log_threshold: float
    effect: float
    pairs: int
    labelled_train: int
    labelled_gate: int
    up: int = 0
    down: int = 0
    corrections: int = 0
    detected_at: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """Everything is of one moment; None and empty mean absent."""

    deployment: ModelDeployment
    versions: tuple[ModelVersion, ...] = ()
    revisions: tuple[Revision, ...] = ()
    engines: Mapping[str, Deployment] = field(default_factory=dict)
    """By engineHash, as are the next three. A LeaderWorkerSet is taken for a Deployment of its leaders."""
    engine_pods: Mapping[str, tuple[Pod, ...]] = field(default_factory=dict)
    engine_workers: Mapping[str, tuple[Pod, ...]] = field(default_factory=dict)
    """The other pods of engines whose replicas are groups: a replica is its leader, which is ready when its group is."""
    guards: Mapping[str, str] = field(default_factory=dict)
    """Source of the guard that an engine was made with."""
    guard_source: str = ""
    """The one that new engines are made with."""
    gateway: Deployment | None = None
    gateway_pods: tuple[GatewayPod, ...] = ()
    config: ObservedConfig | None = None
    jobs: tuple[FineTuneJob, ...] = ()
    """Retraining jobs of this deployment."""
    evidence: Evidence | None = None
    """From Prometheus; None where the gateways are asked instead, or where there is no data."""
    reads_prometheus: bool = False
    has_keda: bool = False
    """A ScaledObject is followed: between zero and one it alone decides."""
    has_groups: bool = False
    """The API server serves LeaderWorkerSets."""
    warnings: Mapping[str, str] = field(default_factory=dict)
    """Pod UID -> its last warning event, where a pod makes no headway and its status does not say why."""
    owned: tuple[Target, ...] = ()
    """Children that this deployment controls: what is no longer wanted is removed."""
    conflicts: tuple[Key, ...] = ()
    """Names of children that somebody else has."""
    refusals: tuple[Refusal, ...] = ()
    """Children that the API server did not take."""
    keys: FreshKeys | None = None
    """Random values, where the Secret may have to be made."""

    # --- what decisions ask of it ---

    @property
    def configured_stable(self) -> str | None:
        """Name of the revision that the configuration in the cluster gives all traffic."""
        config = self.config.config if self.config is not None else None
        return next((r.name for r in config.revisions if r.state is RevisionState.STABLE), None) if config is not None else None

    @property
    def name(self) -> str:
        return self.deployment.metadata.name

    def revision(self, name: str) -> Revision | None:
        return next((revision for revision in self.revisions if revision.name == name), None)

    def version(self, number: int) -> ModelVersion | None:
        return next((version for version in self.versions if version.spec.version == number), None)

    def can_run(self, revision: Revision) -> bool:
        """The cluster has the kind that its engine is made of."""
        return revision.pinned.group is None or self.has_groups

    def ready_replicas(self, engine_hash: str) -> int:
        """Ready pods of an engine, counted from the pods: a Deployment's status lags behind them."""
        return sum(pod.is_ready for pod in self.engine_pods.get(engine_hash, ()))

    @property
    def ready_gateways(self) -> tuple[GatewayPod, ...]:
        return tuple(gateway for gateway in self.gateway_pods if gateway.pod.is_ready)

    @property
    def states(self) -> tuple[GatewayState, ...]:
        """Answers of the ready gateways."""
        return tuple(gateway.state for gateway in self.ready_gateways if gateway.state is not None)

    def applied_everywhere(self, generation: int) -> bool:
        """Every ready gateway works by this generation of the configuration, or a later one."""
        return all(gateway.state is not None and gateway.state.generation >= generation for gateway in self.ready_gateways)

    def reports(self, revision: str) -> tuple[RevisionReport, ...]:
        """What the gateways say of a revision, one report each; fewer where some do not speak of it."""
        return tuple(report for state in self.states for report in state.revisions if report.name == revision)
