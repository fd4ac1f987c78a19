"""A stage's last word, read from a pod that may say anything: believed only where every part of it is what it can be."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from tuneloop_trainer.contract import PROGRESS_LIMIT, ExitCode, Progress, Stage, StageResult

MESSAGE_LIMIT = 4096
"""Bytes that Kubernetes keeps of a termination message."""
LARGEST = 2**53
"""Larger integers are no numbers in JSON."""
DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")


@functools.lru_cache(maxsize=256)
def parse_result(message: str, stage: Stage, exit_code: int) -> StageResult | None:
    """The result, or None where the message is none, is of another stage, or claims what cannot be."""
    if not message or len(message) > MESSAGE_LIMIT:
        return None
    try:
        result = StageResult.model_validate_json(message)
    except ValidationError:
        return None
    if result.stage is not stage or result.exit_code != exit_code:
        return None
    if not all(map(_is_sane, _leaves(result.model_dump()))):
        return None
    if exit_code == ExitCode.DONE and not _is_complete(result):
        return None
    return result


def parse_progress(content: bytes, stage: Stage, pod_uid: str) -> Progress | None:
    """What a running pod answered; None where it is another pod's on a reused address, or no progress."""
    if len(content) > PROGRESS_LIMIT:
        return None
    try:
        progress = Progress.model_validate_json(content)
    except ValidationError:
        return None
    is_its_own = progress.pod_uid == pod_uid and progress.stage is stage
    return progress if is_its_own and all(map(_is_sane, _leaves(progress.model_dump()))) else None


def _leaves(value: Any) -> Iterator[Any]:  # what JSON holds
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _is_sane(leaf: object) -> bool:
    if isinstance(leaf, float):
        return math.isfinite(leaf)
    return not isinstance(leaf, int) or abs(leaf) <= LARGEST


def _is_complete(result: StageResult) -> bool:
    """Whether a stage that is done says what the next step needs."""
    match result.stage:
        case Stage.PREPARE:
            return result.prepare is not None
        case Stage.TRAIN:
            return result.train is not None
        case Stage.PACKAGE:
            return result.package is not None and DIGEST.match(result.package.manifest_digest) is not None
        case Stage.EVALUATE:
            return result.evaluate is not None and DIGEST.match(result.evaluate.artifact_digest) is not None
