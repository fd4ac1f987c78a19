"""Seq2Seq: one text into another, by a model with an encoder and a decoder: translation, summaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tuneloop_trainer import models
from tuneloop_trainer.chat import IGNORED, Encoded, Formatter, History, stop_ids
from tuneloop_trainer.contract import Reason, Suite
from tuneloop_trainer.contract import Seq2Seq as Settings
from tuneloop_trainer.data.records import PROMPTED, Record, Shape
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.objectives.objective import Done, Dtype, Objective, Parts, Tokens

if TYPE_CHECKING:
    from tuneloop_trainer.evaluation.suites import PreparedSuite

COLUMNS = ("input_ids", "prompt_length")
ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj", "q", "k", "v", "o"]
"""What the families call the layers of their attention: BART and its kin, and T5 and its kin."""


class Sides(Formatter):
    """The source as the encoder reads it and the target as the decoder writes it, each with the marks that its tokenizer sets."""

    def __init__(self, tokenizer: Any, stops: frozenset[int]) -> None:  # Any: transformers is untyped
        super().__init__(tokenizer, stops, "Text")

    def prompt_ids(self, prompt: str, system: str | None = None, history: History = None) -> list[int]:
        ids: list[int] = self._tokenizer(self.prompt_text(prompt, system, history))["input_ids"]
        return ids

    def encode(self, prompt: str, completion: str, system: str | None = None, history: History = None) -> Encoded:
        target: list[int] = self._tokenizer(text_target=completion)["input_ids"]
        ended = bool(target) and target[-1] in self._stop_ids
        return Encoded(self.prompt_ids(prompt, system, history), target if ended else [*target, self._tokenizer.eos_token_id])


class Seq2Seq(Objective):
    """transformers' own trainer. A row is its source followed by its target; the collator takes the two apart again."""

    shape: Shape = PROMPTED
    answers: ClassVar[bool] = False  # nothing serves it, so there is nothing to ask
    task: ClassVar[str] = "SEQ_2_SEQ_LM"

    @property
    def settings(self) -> Settings:
        return self.config.seq2seq or Settings()

    @property
    def limit(self) -> int:
        """Tokens of a source, and of a target."""
        return self.config.training.max_sequence_length

    # --- prepare ---

    def suite_shape(self, suite: Suite) -> Shape:
        return PROMPTED

    def formatter(self, base: Path, tokenizer: models.Tokenizer) -> Formatter:
        """Raises Invalid for a base that is of another kind, or cannot read rows of the configured length."""
        config = json.loads((base / "config.json").read_text())
        uri, places = self.config.base.uri, config.get("max_position_embeddings")
        problem = None
        if config.get("is_encoder_decoder") is not True:
            problem = "has no encoder. Seq2Seq needs one as T5 or BART have; a decoder alone learns answers with SFT."
        elif tokenizer.pad_token_id is None:
            problem = "has no padding token. Set pad_token in its tokenizer_config.json."
        elif not isinstance(config.get("decoder_start_token_id"), int):
            problem = "does not say what its decoder starts with. Set decoder_start_token_id in its config.json."
        if problem is not None:
            raise Invalid(f"Model {uri} {problem}", Reason.MODEL_NOT_FOUND)
        if isinstance(places, int) and max(self.limit, self.settings.max_answer_tokens) > places:
            fields = "training.maxSequenceLength and objective.seq2Seq.maxAnswerTokens"
            raise Invalid(f"Model {uri} has {places} positions: {fields} can be {places} at most.")
        return Sides(tokenizer, stop_ids(base, tokenizer))

    def tokens(self, formatter: Formatter, record: Record) -> Tokens:
        encoded = formatter.encode(record.prompt, record.completion, record.system)
        source, target = self.cut(encoded.prompt), encoded.completion[: self.limit]
        row = TokenRow(source + target, [IGNORED] * len(source) + target, record.document, len(source))
        return Tokens([row], max(len(encoded.prompt), len(encoded.completion)))

    def cut(self, source: list[int]) -> list[int]:
        """At most as many tokens as a source may have; the last one, the end that the encoder knows, is kept."""
        return source if len(source) <= self.limit else [*source[: self.limit - 1], source[-1]]

    # --- train ---

    def load(self, folder: Path, uri: str, dtype: Dtype) -> models.Model:
        return models.load_seq2seq(folder, uri, dtype)

    def adapter(self, model: models.Model) -> Any:
        adapter = super().adapter(model)
        if adapter is not None and adapter.target_modules != "all-linear":
            adapter.target_modules = set(ATTENTION)
        return adapter

    def trainer(self, parts: Parts) -> Any:
        from transformers import TrainingArguments

        from tuneloop_trainer.training.sides import BothSides, Pairs, token_loss
        from tuneloop_trainer.training.trainer import resumable

        return resumable(BothSides)(
            model=self.with_adapter(parts.model),
            args=TrainingArguments(**parts.arguments),
            processing_class=parts.tokenizer,
            data_collator=Pairs(parts.tokenizer, parts.model),
            compute_loss_func=token_loss,
            train_dataset=parts.train,
            eval_dataset=parts.validation,
            columns=COLUMNS,
            **parts.resuming,
        )

    # --- evaluate ---

    @property
    def scoring(self) -> dict[str, int]:
        return {"source": self.limit, "answer": self.settings.max_answer_tokens, "beams": self.settings.beams}

    def losses(self, model: models.Model, suite: PreparedSuite, done: Done) -> list[tuple[float, int]]:
        from tuneloop_trainer.evaluation import written

        sides = [(self.cut(item.prompt), item.completion[: self.limit]) for item in suite.encoded]
        losses: list[tuple[float, int]] = written.losses(model, sides, done)
        return losses

    def texts(self, model: models.Model, suite: PreparedSuite, formatter: Formatter, done: Done) -> list[str]:
        from tuneloop_trainer.evaluation import written

        sources = [self.cut(item.prompt) for item in suite.encoded[: written.ASKED]]
        answers = written.answers(model, sources, self.settings.max_answer_tokens, self.settings.beams, done)
        return [formatter.decode(answer) for answer in answers]


OBJECTIVE = Seq2Seq
