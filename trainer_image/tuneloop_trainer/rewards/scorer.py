"""Model: the score of a reward model that another run has packaged, verified by its digest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tuneloop_trainer import models
from tuneloop_trainer.chat import Formatter, stop_ids
from tuneloop_trainer.contract import Reason, Scorer
from tuneloop_trainer.errors import Invalid, Mismatch
from tuneloop_trainer.manifests import verify
from tuneloop_trainer.rewards.reward import Completion, Reward, finite


class ModelReward(Reward):
    """Prompt and completion in the tokens of the reward model, as it was trained on them; cut at the run's own length."""

    name = "Model"

    def __init__(self, asked: Scorer, style: Literal["Chat", "Text"], limit: int) -> None:
        self._asked = asked
        self._style = style
        self._limit = limit
        self._folder = Path(asked.path)
        try:
            manifest = verify(self._folder, asked.manifest_digest)
        except Mismatch as error:
            raise Invalid(
                f"Reward model {asked.uri} is not what its manifestDigest says: {error.message}", Reason.MODEL_NOT_FOUND
            ) from error
        if manifest.metadata.get("objective") != "RewardModel":
            found = manifest.metadata.get("objective")
            raise Invalid(f"Model {asked.uri} was trained by {found}; rewards come from a RewardModel.", Reason.MODEL_NOT_FOUND)
        self._bytes = sum(file.size for file in manifest.files if file.path.endswith(".safetensors"))

    def of(self, completions: Sequence[Completion]) -> list[float]:
        from tuneloop_trainer.evaluation import scoring

        encoded = [self._formatter.encode(one.prompt, one.text, one.system) for one in completions]
        texts = [(one.prompt + one.completion)[: self._limit] for one in encoded]
        scores = scoring.head_outputs(self._model, texts, lambda _: None)
        return [finite(self.name, one, row[0]) for one, row in zip(completions, scores, strict=True)]

    def key(self) -> str:
        return f"{self.name} {self._asked.manifest_digest} {self._style} {self._limit}"

    def size_bytes(self) -> int:
        return self._bytes

    @cached_property
    def _model(self) -> Any:
        return models.load_classifier(self._folder, self._asked.uri, "bfloat16", None)

    @cached_property
    def _formatter(self) -> Formatter:
        tokenizer = models.load_tokenizer(self._folder, self._asked.uri)
        return Formatter(tokenizer, stop_ids(self._folder, tokenizer), self._style)
