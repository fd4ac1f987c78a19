"""A deployment's revisions as ControllerRevisions: what is served is pinned in `data`, what became of it stands in annotations."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tuneloop_gateway.contract import Adapter, Prompt
from tuneloop_operator.api.types import Model
from tuneloop_operator.render import names

Json = dict[str, Any]
OUTCOME = "tuneloop.dev/outcome"
OUTCOME_AT = "tuneloop.dev/outcome-at"
OUTCOME_REASON = "tuneloop.dev/outcome-reason"
OUTCOME_MESSAGE = "tuneloop.dev/outcome-message"
PROBES = "tuneloop.dev/probes"
"""`agreed/asked` of the probe items, where they were asked."""
PROMPT = "tuneloop.dev/prompt"
"""Digest of the prompt that the engine read of PROBE_TEXT before traffic, where it told."""
ENGINE_VERSION = "tuneloop.dev/engine-version"
"""vLLM's version as the engine told it before traffic."""


ANALYSIS = "tuneloop.dev/analysis"
"""What a canary's requests said when it ended: one line of JSON."""
CANARY_STEP = "tuneloop.dev/canary-step"
CANARY_SINCE = "tuneloop.dev/canary-since"
"""The step that a canary is in, from 1, or ended in; and since when."""


IN_PLACE_SINCE = "tuneloop.dev/in-place-since"
"""A candidate for which the engine before was stopped: since when."""
OUTCOME_IN_PLACE = "tuneloop.dev/outcome-in-place"


class Outcome(StrEnum):
    PROMOTED = "Promoted"
    REJECTED = "Rejected"
    REPLACED = "Replaced"
    """A canary that ended without a finding: another version was to be served."""


class Group(Model):
    """Several pods that are one replica."""

    size: int
    worker: dict[str, Any]
    """Pod template of all but the first."""


class Pinned(Model):
    """All that serving a revision takes, resolved once: neither an edit of the spec nor another operator changes it."""

    version: int
    model_version: str
    """Name of the ModelVersion."""
    artifact_digest: str
    engine_hash: str
    prompt_hash: str
    model_id: str
    """What the engine calls the model."""
    adapter: Adapter | None = None
    """What the replicas of its engine load for it; None where the engine has no other model."""
    prompt: Prompt
    inherits_prompt: bool
    """False: it renders differently from what the version was trained and evaluated with."""
    has_probes: bool
    """The version has items to ask before traffic, and they hold for this prompt."""
    prompt_probe: str | None = None
    """Digest of the prompt that training made of PROBE_TEXT, where the version tells."""
    has_reference: bool = False
    """The version has a sample of its training inputs."""
    startup_timeout_seconds: int
    gateway_image: str
    template: dict[str, Any]
    """The engine's pod template; of a group, the first pod's, which is asked."""
    group: Group | None = None


def encoded(pinned: Pinned) -> Json:
    """`data` of a ControllerRevision: what identifies it, readable, and the whole in base64.

    The API server holds `data` fast byte by byte, and its own re-encoding of an object (key order, escapes, nulls) counts as a change.
    What is written here has one encoding only.
    """
    later = ("adapter", "prompt_probe", "has_reference", "group")  # left out where absent, as an earlier release writes and reads it
    absent = {name for name in later if not getattr(pinned, name)}
    whole = json.dumps(pinned.model_dump(mode="json", by_alias=True, exclude=absent), sort_keys=True).encode()
    return {
        "artifactDigest": pinned.artifact_digest,
        "engineHash": pinned.engine_hash,
        "modelVersion": pinned.model_version,
        "pinned": base64.b64encode(whole).decode(),
        "promptHash": pinned.prompt_hash,
        "version": pinned.version,
    }


def decoded(data: Json) -> Pinned | None:
    """None for data that is not of this shape."""
    try:
        return Pinned.model_validate_json(base64.b64decode(data["pinned"], validate=True))
    except (KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Verdict:
    """What became of a revision."""

    outcome: Outcome
    at: str
    reason: str = ""
    message: str = ""
    probes: str = ""
    prompt: str = ""
    """Digest of the prompt that the engine read before traffic; "" where it is not known."""
    engine: str = ""
    """vLLM's version as the engine told it before traffic."""
    numbers: str = ""
    """Of a canary's analysis."""
    in_place: bool = False
    """Promoted after the engine before was stopped: there is none to keep warm."""


@dataclass(frozen=True)
class Progress:
    """How far a canary has come. It stands on its revision, so that whoever is the operator goes on from there."""

    step: int
    """From 0."""
    since: str


@dataclass(frozen=True)
class Revision:
    """A ControllerRevision, observed or to be made."""

    name: str
    number: int
    created_at: str
    pinned: Pinned
    data: Json
    """As it stands in the object: `data` is immutable, so it is written back byte by byte."""
    verdict: Verdict | None = None
    progress: Progress | None = None
    """Of a canary: where it is, or where it was stopped."""
    in_place: str = ""
    """Of a candidate: since when the engine before is stopped; "" where both run."""

    @property
    def is_promoted(self) -> bool:
        return self.verdict is not None and self.verdict.outcome is Outcome.PROMOTED

    @property
    def renders_as_trained(self) -> bool:
        """Whether the model reads what it was trained and evaluated on: by what the engine read before traffic, or else by the settings."""
        read = self.verdict.prompt if self.verdict is not None else ""
        if read and self.pinned.prompt_probe is not None:
            return read == self.pinned.prompt_probe
        return self.pinned.inherits_prompt

    @property
    def is_rejected(self) -> bool:
        return self.verdict is not None and self.verdict.outcome is Outcome.REJECTED


def render_revision(revision: Revision, deployment: str, namespace: str) -> Json:
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": revision.name,
            "namespace": namespace,
            "labels": names.labels("revision", deployment, **{names.DEPLOYMENT_LABEL: deployment}),
            "annotations": _annotations(revision.verdict) | _progress_annotations(revision),
        },
        "data": revision.data,
        "revision": revision.number,
    }


def _annotations(verdict: Verdict | None) -> dict[str, str]:
    if verdict is None:
        return {}
    fields = {
        OUTCOME: verdict.outcome.value,
        OUTCOME_AT: verdict.at,
        OUTCOME_REASON: verdict.reason,
        OUTCOME_MESSAGE: verdict.message,
        PROBES: verdict.probes,
        PROMPT: verdict.prompt,
        ENGINE_VERSION: verdict.engine,
        ANALYSIS: verdict.numbers,
        OUTCOME_IN_PLACE: "true" if verdict.in_place else "",
    }
    return {name: text for name, text in fields.items() if text}


def _progress_annotations(revision: Revision) -> dict[str, str]:
    progress = revision.progress
    step = {CANARY_STEP: str(progress.step + 1), CANARY_SINCE: progress.since} if progress is not None else {}
    return step | ({IN_PLACE_SINCE: revision.in_place} if revision.in_place else {})


def parse_progress(annotations: dict[str, str]) -> Progress | None:
    """None where no canary runs or ran, or where nobody of us wrote it."""
    step = annotations.get(CANARY_STEP, "")
    return Progress(int(step) - 1, annotations.get(CANARY_SINCE, "")) if re.fullmatch("[1-9][0-9]?", step) else None


def parse_verdict(annotations: dict[str, str]) -> Verdict | None:
    """The verdict in the annotations; None where there is none, or one that nobody of us wrote."""
    try:
        outcome = Outcome(annotations.get(OUTCOME, ""))
    except ValueError:
        return None
    return Verdict(
        outcome=outcome,
        at=annotations.get(OUTCOME_AT, ""),
        reason=annotations.get(OUTCOME_REASON, ""),
        message=annotations.get(OUTCOME_MESSAGE, ""),
        probes=annotations.get(PROBES, ""),
        prompt=annotations.get(PROMPT, ""),
        engine=annotations.get(ENGINE_VERSION, ""),
        numbers=annotations.get(ANALYSIS, ""),
        in_place=annotations.get(OUTCOME_IN_PLACE) == "true",
    )
