"""Where each stage's output lies, and how a stage that is already done tells its result again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tuneloop_trainer.contract import Manifest, RunConfig, Stage, StageResult
from tuneloop_trainer.errors import Mismatch, StageError
from tuneloop_trainer.manifests import verify
from tuneloop_trainer.results import RESULT_FILE, read_result


def stage_folder(config: RunConfig, stage: Stage) -> Path:
    return Path(config.paths.work) / stage.value


MODEL_CARD = "MODEL_CARD.md"
"""In evaluate's output and in copies of the model: its card, with the figures of its evaluation."""
FIRST_NONES = frozenset(
    {"path", "feedback", "template", "repository", "revision", "lora", "max_steps", "warmup_steps", "early_stopping_patience", "source"}
)
LATER: dict[str, Any] = {"personal_data": "Keep", "quality": "None", "languages": [], "dora": False, "rows": "Labels"}
"""Fields of the contract's first release that may be None, and the defaults of those that came later. A later field counts only once
it says something, so that it changes no key of a run that was made before it."""
LATER_NONES = frozenset({("train", "repository"), ("source", "repository")})
"""Later fields whose names the first release had elsewhere: where, and the name."""


NO_PART = frozenset({"paths", "threads", "stall_seconds", "checkpoint", "image", "origins", "push", "estimate", "reporting"})
"""Fields that change no output."""


def run_key(config: RunConfig) -> str:
    """Hash of what the run's outputs depend on; an output of another key is made anew. Where they lie is no part of it."""
    content = config.model_dump(mode="json", exclude=set(NO_PART))
    for name in ("micro_batch_size", "parallelism"):
        content["training"].pop(name)
    content["evaluation"].pop("baseline")
    return _hash(_without_silent_fields(content))


def _without_silent_fields(content: Any, of: str = "") -> Any:
    """`of` is the field that holds it."""
    if isinstance(content, dict):
        first = {name for name in content if name in FIRST_NONES and (of, name) not in LATER_NONES}
        said = {name: value for name, value in content.items() if value is not None or name in first}
        kept = {name: value for name, value in said.items() if name not in LATER or value != LATER[name]}
        return {name: _without_silent_fields(value, name) for name, value in kept.items()}
    return [_without_silent_fields(value, of) for value in content] if isinstance(content, list) else content


def evaluation_key(config: RunConfig) -> str:
    """Hash of what the evaluation depends on: the run's, and the baseline, which may move while the model is trained."""
    return _hash([run_key(config), config.evaluation.baseline.model_dump(mode="json")])


def _key(config: RunConfig, stage: Stage) -> str:
    return evaluation_key(config) if stage is Stage.EVALUATE else run_key(config)


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def told_again(config: RunConfig, stage: Stage, folder: Path | None = None) -> StageResult | None:
    """The result of a stage whose published folder verifies; None where it has to run."""
    folder = folder or stage_folder(config, stage)
    try:
        manifest = verify(folder)
    except Mismatch:
        return None
    result = read_result(folder / RESULT_FILE)
    return result if manifest.metadata.get("run_key") == _key(config, stage) else None


def require_stage(config: RunConfig, stage: Stage) -> tuple[Manifest, StageResult]:
    """The output of an earlier stage, verified. Raises StageError where it is missing or of another configuration."""
    folder = stage_folder(config, stage)
    manifest = verify(folder)
    result = read_result(folder / RESULT_FILE)
    if result is None or manifest.metadata.get("run_key") != _key(config, stage):
        raise StageError(f"The output of {stage.value} was made for another configuration of this run.")
    return manifest, result
