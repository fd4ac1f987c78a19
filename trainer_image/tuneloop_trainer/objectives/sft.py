"""SFT: the answers to prompts are learned token by token."""

from __future__ import annotations

from typing import Any

from tuneloop_trainer.chat import Formatter
from tuneloop_trainer.data.records import Record
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.objectives.objective import Objective, Parts, Tokens, masked


class SFT(Objective):
    """TRL's SFT trainer on rows that are tokenised already."""

    def tokens(self, formatter: Formatter, record: Record) -> Tokens:
        encoded = formatter.encode(record.prompt, record.completion, record.system)
        ids, labels = masked(encoded.prompt, encoded.completion, self.config.training.max_sequence_length)
        if self.config.loss == "FullSequence":
            labels = list(ids)
        row = TokenRow(ids, labels, record.document, len(encoded.prompt))
        return Tokens([row] if row.supervised else [], len(encoded.prompt) + len(encoded.completion))

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
