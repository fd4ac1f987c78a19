"""What identifies a revision, and what a new one pins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuneloop_gateway.contract import FewShot, Prompt
from tuneloop_operator.api.conditions import DeploymentReason
from tuneloop_operator.api.engineoptions import option_problem
from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.api.objectives import is_servable, method_name, objective_name
from tuneloop_operator.domain.decision import Invalid
from tuneloop_operator.render import names
from tuneloop_operator.render.engine import adapter, base_uri, cache_problem, claims_of, is_adapter, lora_rank, model_id, render_templates
from tuneloop_operator.render.groups import parallel_problem
from tuneloop_operator.render.revisions import Pinned, Revision, encoded
from tuneloop_operator.settings import Settings


def engine_hash(deployment: ModelDeployment, version: ModelVersion) -> str:
    """Over what the engine loads at its start, the task and `engine` but its replicas: as written, not as resolved, so that an upgrade
    changes no hash. Of an adapter that is its base, the rank there must be room for, and the claims that have to be mounted.

    Defaults are left out, so that a field that a later release adds changes none either.
    """
    if not is_adapter(version) or version.spec.base is None:
        return _own_engine_hash(deployment, version)
    base = version.spec.base
    identity: dict[str, Any] = {
        "model": version.spec.model,
        "base": [base.source.model_dump(mode="json", exclude_defaults=True), base.digest, base_uri(version)],
        "rank": lora_rank(version),
        "claims": claims_of(version),
        "task": deployment.spec.task,
        "engine": deployment.spec.engine.model_dump(mode="json", exclude={"replicas"}, exclude_defaults=True),
    }
    return names.short_hash(identity)


def _own_engine_hash(deployment: ModelDeployment, version: ModelVersion) -> str:
    """Of an engine that has one model. Earlier releases made such engines for adapters too."""
    artifact, base = version.spec.artifact, version.spec.base
    identity: dict[str, Any] = {
        "model": version.spec.model,
        "artifact": artifact.manifest_digest,
        "base": None if artifact.format == "Merged" or base is None else [base.source.uri, base.source.revision, base.digest],
        "task": deployment.spec.task,
        "engine": deployment.spec.engine.model_dump(mode="json", exclude={"replicas"}, exclude_defaults=True),
    }
    if artifact.rank is not None:  # a new record that corrects the rank is another engine of the same bytes
        identity["rank"] = artifact.rank
    return names.short_hash(identity)


def effective_prompt(deployment: ModelDeployment, version: ModelVersion) -> Prompt:
    """The deployment's prompt, or else the one that the version was trained with."""
    prompt = deployment.spec.prompt
    if prompt is None:
        return Prompt(template=version.spec.prompt.template)
    temperature = prompt.parameters.temperature
    return Prompt(
        system=prompt.system,
        template=prompt.template,
        few_shot=tuple(FewShot(input=example.input, output=example.output) for example in prompt.few_shot),
        temperature=None if temperature is None else float(temperature),
        max_tokens=prompt.parameters.max_tokens,
    )


def renders_as_trained(deployment: ModelDeployment, version: ModelVersion) -> bool:
    """Whether the model sees what it was trained and evaluated on; sampling parameters do not change that."""
    prompt = effective_prompt(deployment, version)
    trained = version.spec.prompt
    same_turns = prompt.template == trained.template and prompt.system is None and not prompt.few_shot
    return same_turns and (trained.format == "Chat") == (deployment.spec.task == "Chat")


def revision_name(deployment: ModelDeployment, version: ModelVersion) -> str:
    """One name for one (engineHash, adapter digest, promptHash)."""
    adapters = [version.spec.artifact.manifest_digest] if is_adapter(version) else []
    return _name(deployment, [engine_hash(deployment, version), *adapters, prompt_hash(deployment, version)])


def _name(deployment: ModelDeployment, identity: list[str]) -> str:
    return f"{deployment.metadata.name}-{names.short_hash(identity)}"


def revision_of(deployment: ModelDeployment, version: ModelVersion, revisions: tuple[Revision, ...]) -> Revision | None:
    """The one on record; also one by which an earlier release gave an adapter an engine of its own: an upgrade rolls nothing out."""
    earlier = _name(deployment, [_own_engine_hash(deployment, version), prompt_hash(deployment, version)])
    by_name = {revision.name: revision for revision in revisions}
    return by_name.get(revision_name(deployment, version)) or by_name.get(earlier)


def prompt_hash(deployment: ModelDeployment, version: ModelVersion) -> str:
    return names.short_hash(effective_prompt(deployment, version).model_dump(mode="json", exclude_defaults=True))


def new_revision(
    deployment: ModelDeployment, version: ModelVersion, number: int, created_at: str, settings: Settings,
    engines: Mapping[str, Pinned],
) -> Revision:  # fmt: skip
    """A revision with everything pinned that serving it takes. Raises Invalid where it cannot be served. `engines` are
    those that run, by hash: one that is shared stays as it is, also where another release would make it otherwise."""
    _check(deployment, version)
    hashed = engine_hash(deployment, version)
    inherits = renders_as_trained(deployment, version)
    running = engines.get(hashed)
    template, group = (running.template, running.group) if running is not None else render_templates(deployment, version, hashed, settings)
    pinned = Pinned(
        version=version.spec.version,
        model_version=version.metadata.name,
        artifact_digest=version.spec.artifact.manifest_digest,
        engine_hash=hashed,
        prompt_hash=prompt_hash(deployment, version),
        model_id=model_id(version),
        adapter=adapter(version),
        prompt=effective_prompt(deployment, version),
        inherits_prompt=inherits,
        has_probes=version.spec.probes_uri is not None and inherits,
        prompt_probe=_prompt_probe(version),
        has_reference=version.spec.reference_uri is not None,
        startup_timeout_seconds=deployment.spec.engine.startup_timeout_seconds,
        gateway_image=settings.gateway_image,
        template=template,
        group=group,
    )
    name = revision_name(deployment, version)
    return Revision(name=name, number=number, created_at=created_at, pinned=pinned, data=encoded(pinned))


def _prompt_probe(version: ModelVersion) -> str | None:
    """None for what an earlier release recorded: a hash of the text, which no engine tells."""
    recorded = version.spec.prompt.probe_sha256
    return recorded if recorded is not None and recorded.startswith("sha256:") else None


def _trained_with(lineage_spec: dict[str, Any]) -> str:
    """What keeps an engine from serving it: the method, or the objective."""
    method = method_name(lineage_spec)
    return method if method == "PromptTuning" else objective_name(lineage_spec)


def _check(deployment: ModelDeployment, version: ModelVersion) -> None:
    engine = deployment.spec.engine
    problem = option_problem(engine.options) or cache_problem(engine, version) or parallel_problem(engine)
    if problem is not None:
        raise Invalid(DeploymentReason.INVALID_OPTION.value, problem)
    if version.spec.lineage is not None and not is_servable(version.spec.lineage.spec):
        message = (
            f"ModelVersion {version.metadata.name} was trained with {_trained_with(version.spec.lineage.spec)}, and no engine here serves "
            "what that makes. Set spec.model to another version."
        )
        raise Invalid(DeploymentReason.NOT_SERVABLE.value, message)
    if version.spec.artifact.format == "Adapter" and version.spec.base is None:
        name = version.metadata.name
        message = f"ModelVersion {name} is an adapter without spec.base: record the base model that it belongs to in a new version."
        raise Invalid(DeploymentReason.NOT_SERVABLE.value, message)
