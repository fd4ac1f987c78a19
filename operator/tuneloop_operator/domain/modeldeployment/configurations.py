"""The gateway's configuration: its revisions and their weights, and how it watches for drift. The generation grows with the content."""

from __future__ import annotations

from dataclasses import dataclass

from tuneloop_gateway.contract import Capture, Drift, GatewayConfig, Limits, RevisionState, Tracing
from tuneloop_gateway.contract import Revision as GatewayRevision
from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.domain.modeldeployment.drift import Epoch
from tuneloop_operator.domain.modeldeployment.rollouts import Rollout
from tuneloop_operator.domain.modeldeployment.scaling import hold_seconds
from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot
from tuneloop_operator.render import names
from tuneloop_operator.render.gateway import config_text
from tuneloop_operator.render.revisions import Revision
from tuneloop_trainer.contract import PROBE_TEXT

FULL = 100
"""Percent."""


@dataclass(frozen=True)
class Configured:
    """The configuration as it should be."""

    config: GatewayConfig
    text: str


def configure(snapshot: Snapshot, rollout: Rollout, epoch: Epoch) -> Configured:
    """The observed text where it says the same already, else a new one of the next generation."""
    observed = snapshot.config
    if observed is not None:
        same = _config(snapshot, rollout, epoch, observed.generation)
        if observed.config == same:
            return Configured(same, observed.text)
    config = _config(snapshot, rollout, epoch, _next_generation(snapshot))
    return Configured(config, config_text(config))


def _next_generation(snapshot: Snapshot) -> int:
    """Above all that was published. One that the status names, but nobody has seen, was decided by a pass that did not get to write it:
    it is taken, or a status that is written first would run away from a configuration that never follows."""
    published = [state.generation for state in snapshot.states]
    if snapshot.config is not None:
        published.append(snapshot.config.generation)
    return max([*(generation + 1 for generation in published), snapshot.deployment.status.config_generation, 1])


def _config(snapshot: Snapshot, rollout: Rollout, epoch: Epoch, generation: int) -> GatewayConfig:
    deployment = snapshot.deployment
    gateway = deployment.spec.gateway
    return GatewayConfig(
        generation=generation,
        namespace=deployment.metadata.namespace,
        deployment=deployment.metadata.name,
        model=deployment.spec.model.name,
        task=deployment.spec.task,
        revisions=_revisions(snapshot.name, rollout),
        affinity=deployment.spec.rollout.affinity if rollout.canary is not None else "Session",
        window=rollout.canary.window if rollout.canary is not None else "",
        require_key=gateway.auth.api_keys is not None,
        capture=Capture(
            sample_rate=float(gateway.capture.sample_rate),
            personal_data=gateway.capture.personal_data,
            retention_days=gateway.capture.retention_days,
        ),
        drift=_drift(deployment, rollout, epoch),
        max_share_of_one_subject=float(gateway.feedback.max_share_of_one_subject),
        limits=Limits(requests_per_minute=gateway.auth.requests_per_minute, tokens_per_minute=gateway.auth.tokens_per_minute),
        asleep=rollout.is_asleep,
        hold_seconds=hold_seconds(deployment),
        tracing=_tracing(deployment),
    )


def _revisions(deployment: str, rollout: Rollout) -> tuple[GatewayRevision, ...]:
    weight = rollout.canary.weight if rollout.canary is not None else 0
    stable = [_revision(deployment, rollout.stable, RevisionState.STABLE, FULL - weight)] if rollout.stable is not None else []
    candidate = [_revision(deployment, rollout.candidate, RevisionState.CANDIDATE, weight)] if rollout.candidate is not None else []
    return (*stable, *candidate, *(_revision(deployment, drained, RevisionState.DRAINING, 0) for drained in rollout.draining))


def _revision(deployment: str, revision: Revision, state: RevisionState, weight: int) -> GatewayRevision:
    pinned = revision.pinned
    return GatewayRevision(
        name=revision.name,
        version=pinned.version,
        service=names.engine(deployment, pinned.engine_hash),
        model_id=pinned.model_id,
        adapter=pinned.adapter,
        prompt=pinned.prompt,
        state=state,
        weight=weight,
        probe_text=PROBE_TEXT if pinned.prompt_probe is not None else None,
        reference=pinned.has_reference,
        probe=state is RevisionState.CANDIDATE and pinned.has_probes,
    )


def _tracing(deployment: ModelDeployment) -> Tracing | None:
    asked = deployment.spec.gateway.tracing
    return Tracing(endpoint=asked.endpoint, sample_rate=float(asked.sample_rate)) if asked is not None else None


def _drift(deployment: ModelDeployment, rollout: Rollout, epoch: Epoch) -> Drift | None:
    settings = deployment.spec.monitoring.drift
    if settings is None:
        return None
    return Drift(
        size=settings.size,
        false_alarm_every_requests=float(settings.false_alarm_every_requests),
        horizon_days=float(settings.horizon_days),
        mix_over_seconds=settings.mix_over_seconds,
        epoch=str(epoch.number),
        seed=epoch.seed,
        collect=rollout.stable is not None,
    )
