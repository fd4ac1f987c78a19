"""A stage's last word: kept within the bytes that Kubernetes keeps, written where the operator looks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from tuneloop_trainer.contract import RESULT_LIMIT, EvaluateSummary, GateResult, StageResult
from tuneloop_trainer.manifests import write_atomically

MESSAGE_LIMIT = 600
RESULT_FILE = "result.json"
"""Name of the full result inside a stage's published folder."""


def encode(result: StageResult) -> bytes:
    """The result as JSON of at most RESULT_LIMIT bytes: what is not needed to decide goes first, gates last.

    The full result lies beside the stage's output, so nothing is lost by what is left out here.
    """
    steps = (
        _as_is,
        _with_a_short_message,
        _without_phases,
        _without_discordance,
        _without_scores,
        _with_one_data_digest,
        _without_warnings,
        _with_bare_gates,
        _with_fewer_gates,
    )
    for shorten in steps:
        result = shorten(result)
        content = _dump(result)
        if len(content) <= RESULT_LIMIT:
            return content
    raise ValueError(f"a result of {len(content)} bytes cannot be shortened to {RESULT_LIMIT}")


def sentence(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """The text on one line, at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def read_result(path: Path) -> StageResult | None:
    """The result in a file; None where there is none that can be read."""
    try:
        return StageResult.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def write_result(path: Path, result: StageResult) -> None:
    write_atomically(path, result.model_dump_json(by_alias=True, exclude_none=True).encode())


def write_termination(path: Path, result: StageResult) -> None:
    """Write in place: the termination message is a mounted file, which cannot be renamed over."""
    path.write_bytes(encode(result))


def _dump(result: StageResult) -> bytes:
    return result.model_dump_json(by_alias=True, exclude_none=True, exclude_defaults=False).encode()


def _as_is(result: StageResult) -> StageResult:
    return result


def _without_phases(result: StageResult) -> StageResult:
    return result.model_copy(update={"phase_seconds": {}})


def _edit_evaluation(result: StageResult, edit: Callable[[EvaluateSummary], EvaluateSummary]) -> StageResult:
    return result if result.evaluate is None else result.model_copy(update={"evaluate": edit(result.evaluate)})


def _without_scores(result: StageResult) -> StageResult:
    return _edit_evaluation(result, lambda summary: summary.model_copy(update={"scores": {}}))


def _without_discordance(result: StageResult) -> StageResult:
    def bare(gate: GateResult) -> GateResult:
        return gate.model_copy(update={"discordant": None})

    return _edit_evaluation(result, lambda summary: summary.model_copy(update={"gates": tuple(map(bare, summary.gates))}))


def _with_one_data_digest(result: StageResult) -> StageResult:
    if result.prepare is None:
        return result
    joined = "".join(f"{uri}={digest};" for uri, digest in sorted(result.prepare.dataset_digests.items()))
    digests = {"*": hashlib.sha256(joined.encode()).hexdigest()}
    return result.model_copy(update={"prepare": result.prepare.model_copy(update={"dataset_digests": digests, "dataset_revisions": {}})})


def _without_warnings(result: StageResult) -> StageResult:
    """The data card has them."""
    if result.prepare is None:
        return result
    return result.model_copy(update={"prepare": result.prepare.model_copy(update={"warnings": ()})})


def _with_a_short_message(result: StageResult) -> StageResult:
    result = result.model_copy(update={"message": sentence(result.message, 200)})
    return _edit_evaluation(result, lambda summary: summary.model_copy(update={"message": sentence(summary.message, 150)}))


def _with_bare_gates(result: StageResult) -> StageResult:
    def bare(gate: GateResult) -> GateResult:
        return gate.model_copy(update={"p": None, "detectable": None})

    return _edit_evaluation(result, lambda summary: summary.model_copy(update={"gates": tuple(map(bare, summary.gates))}))


def _with_fewer_gates(result: StageResult) -> StageResult:
    """As many gates as fit; the verdict is over all of them, and the full report has the rest."""
    while result.evaluate is not None and result.evaluate.gates and len(_dump(result)) > RESULT_LIMIT:
        result = _edit_evaluation(result, lambda summary: summary.model_copy(update={"gates": summary.gates[:-1]}))
    return result
