"""DPO: of two answers to a prompt, the preferred one becomes likelier than it was, relative to the base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuneloop_trainer import models
from tuneloop_trainer.chat import Formatter
from tuneloop_trainer.contract import Dpo
from tuneloop_trainer.data.records import PREFERRED, Record, Shape
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.objectives.objective import Objective, Parts, Tokens, masked

LOSSES = {"Sigmoid": "sigmoid", "Hinge": "hinge", "IPO": "ipo"}
COLUMNS = ("input_ids", "prompt_length", "rejected_ids")


class DPO(Objective):
    """TRL's DPO trainer. The reference is the base: the model without its adapter, or a frozen copy beside all weights."""

    shape: Shape = PREFERRED

    def tokens(self, formatter: Formatter, record: Record) -> Tokens:
        limit = self.config.training.max_sequence_length
        chosen = formatter.encode(record.prompt, record.completion, record.system)
        rejected = formatter.encode(record.prompt, record.rejected or "", record.system)
        ids, labels = masked(chosen.prompt, chosen.completion, limit)
        other = rejected.completion[: max(0, limit - len(rejected.prompt))]
        row = TokenRow(ids, labels, record.document, len(chosen.prompt), rejected=other)
        whole = len(chosen.prompt) + max(len(chosen.completion), len(rejected.completion))
        # Answers that differ only behind the limit would teach nothing.
        learnable = row.supervised > 0 and ids[len(chosen.prompt) :] != other
        return Tokens([row] if learnable else [], whole)

    def trainer(self, parts: Parts) -> Any:
        from trl import DPOConfig, DPOTrainer

        from tuneloop_trainer.training.trainer import resumable

        settings = self.config.dpo or Dpo()
        own = {"beta": settings.beta, "loss_type": [LOSSES[settings.loss]], "max_length": None}
        return resumable(DPOTrainer)(
            **with_reference(self, parts),
            args=DPOConfig(**(own | parts.arguments)),
            processing_class=parts.tokenizer,
            data_collator=Pairs(models.padding(parts.tokenizer)),
            train_dataset=parts.train,
            eval_dataset=parts.validation,
            columns=COLUMNS,
            **parts.resuming,
        )


def with_reference(objective: Objective, parts: Parts) -> dict[str, Any]:
    """Model, adapter and reference for TRL. It wraps the model itself: given one with an adapter, it would copy that as the
    reference, though the model without it is the same."""
    adapter = objective.adapter(parts.model)
    if adapter is not None:
        return {"model": parts.model, "peft_config": adapter}
    half = objective.config.training.precision == "BF16"
    return {"model": parts.model, "ref_model": objective.load_base(parts.base, "bfloat16" if half else "float32")}


class Pairs:
    """Rows of prepare as TRL's collator of preferences wants them."""

    def __init__(self, pad: int) -> None:
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        self._collate = DataCollatorForPreference(pad_token_id=pad)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        return self._collate(
            [
                {
                    "prompt_ids": row["input_ids"][: row["prompt_length"]],
                    "chosen_ids": row["input_ids"][row["prompt_length"] :],
                    "rejected_ids": row["rejected_ids"],
                }
                for row in rows
            ]
        )


OBJECTIVE = DPO
