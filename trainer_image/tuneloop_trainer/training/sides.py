"""The trainer of an encoder-decoder: rows taken apart into source and target, and a loss over the target's tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Trainer

from tuneloop_trainer.models import Model, Tokenizer

IGNORED = -100


class BothSides(Trainer):
    """Counts the tokens of sources and targets, for the speed that is shown."""

    _total_train_tokens = 0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:  # Any: transformers is untyped
        self._total_train_tokens += int(inputs["attention_mask"].sum()) + int((inputs["labels"] != IGNORED).sum())
        return super().training_step(model, inputs, *args, **kwargs)


class Pairs:
    """Rows of prepare as sources and targets, each side padded for itself."""

    def __init__(self, tokenizer: Tokenizer, model: Model) -> None:
        tokenizer.padding_side = "right"
        self._collate = DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        sides = [(row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]) for row in rows]
        return self._collate([{"input_ids": source, "attention_mask": [1] * len(source), "labels": target} for source, target in sides])


def token_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """The mean over the targets' tokens, whatever micro-batch they came in."""
    logits = outputs.logits.float()
    flat = labels.to(logits.device).reshape(-1)
    total = torch.nn.functional.cross_entropy(logits.reshape(len(flat), -1), flat, ignore_index=IGNORED, reduction="sum")
    return total / ((flat != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
