"""Scores of a model on a suite, kept in the shared cache: a baseline is scored once per suite and prompt, not once per run."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tuneloop_trainer.manifests import write_atomically

log = logging.getLogger("tuneloop.baselines")


class SuiteScores(BaseModel):
    """One model on one suite, item by item, in the order of the snapshot."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: tuple[str, ...] = ()
    label_scores: tuple[tuple[float, ...], ...] = ()
    """Per item the summed log-probability of each label."""
    losses: tuple[tuple[float, int], ...] = ()
    """Per item the summed negative log-probability of its completion, and its tokens."""
    rewards: tuple[float, ...] = ()
    """Per item the reward of the most likely answer."""

    texts: tuple[str, ...] = ()
    """The model's own answers to the first items."""

    def chosen(self) -> list[int]:
        """Per item the label with the highest score; the first of equals."""
        return [scores.index(max(scores)) for scores in self.label_scores]


def cache_key(**parts: str | int) -> str:
    """Hash of everything that the scores depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_scores(cache: Path, key: str) -> SuiteScores | None:
    """Cached scores; None where there are none, or none that can be read."""
    path = _path(cache, key)
    try:
        return SuiteScores.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        log.warning("the cached scores %s cannot be read and are made anew", key)
        return None


def write_scores(cache: Path, key: str, scores: SuiteScores) -> None:
    """Keep the scores; a cache that cannot be written costs time later, not this run."""
    try:
        write_atomically(_path(cache, key), scores.model_dump_json().encode())
    except OSError as error:
        log.warning("the scores of the baseline are not cached: %s", error.strerror)


def read_answers(cache: Path, key: str) -> list[str] | None:
    """Cached answers in words; None where there are none, or none that can be read."""
    try:
        answers = json.loads(_path(cache, key).read_bytes())
    except (OSError, ValueError):
        return None
    return answers if isinstance(answers, list) and all(isinstance(answer, str) for answer in answers) else None


def write_answers(cache: Path, key: str, answers: list[str]) -> None:
    try:
        write_atomically(_path(cache, key), json.dumps(answers).encode())
    except OSError as error:
        log.warning("the answers of the baseline are not cached: %s", error.strerror)


def _path(cache: Path, key: str) -> Path:
    return cache / "baselines" / f"{key}.json"
