"""One pass over a ModelDeployment: roles, the detector's epoch, retraining, the objects that follow from them, and the status."""

from __future__ import annotations

from datetime import datetime

from tuneloop_operator.domain.decision import Decision, Key, Manifest, Target, refusal_of
from tuneloop_operator.domain.modeldeployment import canaries
from tuneloop_operator.domain.modeldeployment.configurations import Configured, configure
from tuneloop_operator.domain.modeldeployment.drift import Epoch, evidence_of, is_latched, next_epoch
from tuneloop_operator.domain.modeldeployment.news import events
from tuneloop_operator.domain.modeldeployment.retraining import plan_retraining
from tuneloop_operator.domain.modeldeployment.rollouts import Rollout, is_released, plan
from tuneloop_operator.domain.modeldeployment.runtimes import vulnerability
from tuneloop_operator.domain.modeldeployment.scaling import may_stop, replicas_at, wanted_replicas
from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot
from tuneloop_operator.domain.modeldeployment.statuses import Findings, render_status
from tuneloop_operator.render import access, engine, gateway, names
from tuneloop_operator.render.revisions import Revision, render_revision
from tuneloop_operator.render.scaling import render_scaled_object
from tuneloop_operator.settings import Settings

ROLLING_SECONDS = 1.0
REARMED_ANNOTATION = "tuneloop.dev/rearmed"
"""On the gateway's ConfigMap: the wish that was followed last."""
STABLE_ANNOTATION = "tuneloop.dev/stable-since"
"""On the gateway's ConfigMap: the generation from which on its stable revision has all traffic."""
EPOCH_ANNOTATION = "tuneloop.dev/epoch-since"
"""On the gateway's ConfigMap: the generation by which the detector's epoch began."""
NEVER_PRUNED = ("PersistentVolumeClaim", "Secret")
"""Captured data and keys go with their owner, or not at all."""


def decide(snapshot: Snapshot, settings: Settings, now: datetime) -> Decision:
    rollout = plan(snapshot, settings, now)
    evidence = evidence_of(snapshot)
    epoch = next_epoch(snapshot, rollout, is_alarm=is_latched(snapshot, evidence))
    retraining = plan_retraining(snapshot, rollout, evidence, epoch, now)
    has_gateway = bool(rollout.live) or snapshot.gateway is not None
    configured = configure(snapshot, rollout, epoch) if has_gateway else None
    objects = _objects(snapshot, rollout, epoch, configured, settings)
    generation = configured.config.generation if configured is not None else snapshot.deployment.status.config_generation
    secret = (gateway.render_keys(snapshot.deployment, snapshot.keys),) if has_gateway and snapshot.keys is not None else ()
    refusal = refusal_of(snapshot.refusals, (*secret, *objects))
    flaws = vulnerability(snapshot, rollout.stable, settings) if rollout.stable is not None else ""
    status = render_status(Findings(snapshot, rollout, evidence, epoch, retraining, generation, flaws, refusal), now)
    return Decision(
        status=status,
        create=(*secret, *retraining.create),
        apply=objects,
        delete=_unwanted(snapshot, rollout, objects),
        events=events(snapshot, rollout, status),
        requeue_after=_next_look(snapshot, rollout, configured, retraining.again_in, settings),
    )


# --- objects -----------------------------------------------------------------


def _objects(snapshot: Snapshot, rollout: Rollout, epoch: Epoch, configured: Configured | None, settings: Settings) -> tuple[Manifest, ...]:
    """Records first: what became of a revision is written before traffic follows it."""
    deployment = snapshot.deployment
    records = [render_revision(revision, snapshot.name, deployment.metadata.namespace) for revision in rollout.revisions]
    if configured is None:
        return tuple(records)
    engines = [manifest for revision in _by_engine(rollout) for manifest in _engine(snapshot, rollout, revision)]
    return (*records, *engines, *_gateway(snapshot, rollout, epoch, configured, settings))


def _by_engine(rollout: Rollout) -> list[Revision]:
    """One revision for each engine: several may share one."""
    return list({revision.pinned.engine_hash: revision for revision in reversed(rollout.live)}.values())


def _engine(snapshot: Snapshot, rollout: Rollout, revision: Revision) -> list[Manifest]:
    deployment, hashed = snapshot.deployment, revision.pinned.engine_hash
    is_stopped = rollout.gives_way(revision) or (rollout.is_asleep and may_stop(snapshot, hashed))
    replicas = 0 if is_stopped else _replicas(snapshot, rollout, revision)
    budget = [engine.render_engine_budget(deployment, hashed)] if replicas > 1 else []
    return [
        engine.render_guard(deployment, hashed, snapshot.guards.get(hashed, snapshot.guard_source)),
        *([engine.render_engine(deployment, revision.pinned, replicas)] if snapshot.can_run(revision) else []),
        engine.render_engine_service(deployment, revision.pinned),
        *budget,
    ]


def _replicas(snapshot: Snapshot, rollout: Rollout, revision: Revision) -> int:
    """A canary's grow with its share, before it rises, and never shrink."""
    wanted = wanted_replicas(snapshot)
    if rollout.candidate is None or revision.name != rollout.candidate.name:
        return wanted
    canary, policy = rollout.canary, snapshot.deployment.spec.rollout.on_inconclusive
    step = canary.progress.step + canaries.passes(canary, policy) if canary is not None else 0
    made = snapshot.engines.get(revision.pinned.engine_hash)
    return min(wanted, max(replicas_at(snapshot, revision, rollout.stable, step), made.spec.replicas if made is not None else 0))


def _gateway(snapshot: Snapshot, rollout: Rollout, epoch: Epoch, configured: Configured, settings: Settings) -> list[Manifest]:
    deployment = snapshot.deployment
    image = next((r.pinned.gateway_image for r in _gateways_of(rollout)), settings.gateway_image)
    claim = gateway.render_claim(deployment)
    budget = [gateway.render_gateway_budget(deployment)] if deployment.spec.gateway.replicas > 1 else []
    return [
        gateway.render_config(deployment, configured.text, _config_annotations(snapshot, rollout, epoch, configured)),
        *access.render_gateway_identity(deployment),
        *([claim] if claim is not None else []),
        gateway.render_gateway(deployment, image, settings),
        gateway.render_public_service(deployment),
        access.render_gateway_policy(deployment, settings),
        access.render_engine_policy(deployment),
        *([access.render_group_policy(deployment)] if any(revision.pinned.group is not None for revision in rollout.live) else []),
        *budget,
        *([render_scaled_object(deployment, settings)] if snapshot.has_keda and deployment.spec.autoscaling is not None else []),
    ]


def _gateways_of(rollout: Rollout) -> list[Revision]:
    """Whose gateway to run: the stable one's, unless a revision has an adapter to load, of which an earlier release's knows nothing."""
    return sorted(rollout.live, key=lambda revision: revision.pinned.adapter is None)


def _config_annotations(snapshot: Snapshot, rollout: Rollout, epoch: Epoch, configured: Configured) -> dict[str, str]:
    """What the configuration in the cluster must tell the next pass, and the gateway need not know."""
    observed, generation = snapshot.config, configured.config.generation
    stable = rollout.stable.name if rollout.stable is not None else None
    stable_since = observed.stable_since if observed is not None and snapshot.configured_stable == stable else generation
    epoch_since = observed.epoch_since if observed is not None and not epoch.is_new else generation
    since = {STABLE_ANNOTATION: str(stable_since), EPOCH_ANNOTATION: str(epoch_since)}
    return since | ({REARMED_ANNOTATION: epoch.rearmed} if epoch.rearmed else {})


def _unwanted(snapshot: Snapshot, rollout: Rollout, objects: tuple[Manifest, ...]) -> tuple[Target, ...]:
    """Children that nothing asks for any more; an engine not before the last gateway has let go of it."""
    namespace = snapshot.deployment.metadata.namespace
    wanted = {Key(manifest["kind"], namespace, manifest["metadata"]["name"]) for manifest in objects}
    live = {revision.pinned.engine_hash for revision in rollout.live}
    held = {names.engine(snapshot.name, hashed) for hashed in snapshot.engines if hashed not in live and not is_released(snapshot, hashed)}
    return tuple(
        target
        for target in snapshot.owned
        if target.key not in wanted and target.key.name not in held and target.key.kind not in NEVER_PRUNED
    )


# --- time --------------------------------------------------------------------


def _next_look(
    snapshot: Snapshot, rollout: Rollout, configured: Configured | None, again_in: float | None, settings: Settings
) -> float | None:
    """Soon while something moves, now and then while a gateway may have news, not at all where only an event can change anything."""
    if configured is None:
        return again_in
    is_applied = snapshot.config is not None and snapshot.config.generation == configured.config.generation
    is_taken_up = is_applied and snapshot.applied_everywhere(configured.config.generation)
    live = {revision.pinned.engine_hash for revision in rollout.live}
    is_moving = (
        not is_taken_up or rollout.is_asleep or rollout.candidate is not None or any(hashed not in live for hashed in snapshot.engines)
    )
    is_watched = rollout.failure is None or rollout.canary is not None
    pause = ROLLING_SECONDS if is_moving and is_watched else settings.state_interval_seconds
    return pause if again_in is None else min(pause, max(again_in, 0.0))
