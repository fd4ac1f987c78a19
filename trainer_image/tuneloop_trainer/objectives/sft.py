"""SFT: the answers to prompts are learned token by token."""

from __future__ import annotations

from typing import Any

from tuneloop_trainer.chat import Formatter
from tuneloop_trainer.contract import RunConfig, Suite
from tuneloop_trainer.data.records import CONVERSED, PROMPTED, Record, Shape
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.objectives.objective import Objective, Parts, Tokens, masked


class SFT(Objective):
    """TRL's SFT trainer on rows that are tokenised already."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        # A class below this one that makes tokens itself knows of no conversations.
        self._converses = config.prompt_format == "Chat" and type(self).tokens is SFT.tokens
        if self._converses and self.shape is PROMPTED:
            self.shape = CONVERSED

    def suite_shape(self, suite: Suite) -> Shape:
        shape = super().suite_shape(suite)
        return CONVERSED if self._converses and shape is PROMPTED else shape

    def tokens(self, formatter: Formatter, record: Record) -> Tokens:
        limit = self.config.training.max_sequence_length
        if record.history:
            try:
                ids, labels, whole = formatter.converse(record.prompt, record.completion, record.system, record.history, limit)
            except Invalid as error:
                raise Invalid(f"Row {record.row}: {error.message}", error.reason) from error
            prompt = 0
        else:
            encoded = formatter.encode(record.prompt, record.completion, record.system)
            ids, labels = masked(encoded.prompt, encoded.completion, limit)
            prompt, whole = len(encoded.prompt), len(encoded.prompt) + len(encoded.completion)
        if self.config.loss == "FullSequence":
            labels = list(ids)
        row = TokenRow(ids, labels, record.document, prompt)
        return Tokens([row] if row.supervised else [], whole)

    def own_arguments(self) -> dict[str, Any]:
        """Arguments of TRL's configuration that follow from the objective."""
        return {
            "padding_free": self.packs or self.config.training.packing,
            "max_length": None,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }

    def trainer(self, parts: Parts) -> Any:
        from trl import SFTConfig, SFTTrainer

        from tuneloop_trainer.training.trainer import resumable

        return resumable(SFTTrainer)(
            model=self.with_adapter(parts.model),
            args=SFTConfig(**(self.own_arguments() | parts.arguments)),
            processing_class=parts.tokenizer,
            train_dataset=parts.train,
            eval_dataset=parts.validation,
            **parts.resuming,
        )


OBJECTIVE = SFT
