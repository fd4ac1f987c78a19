"""SequenceClassification: a text gets one of a few labels, by a head in the place of the language model's."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tuneloop_trainer import models
from tuneloop_trainer.chat import Encoded, Formatter, History
from tuneloop_trainer.contract import Classification, Suite
from tuneloop_trainer.data.records import LABELLED, Record, Shape
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.objectives.objective import NOTES, Done, Dtype, Objective, Parts, Sources, Tokens

if TYPE_CHECKING:
    from tuneloop_trainer.evaluation.baselines import SuiteScores
    from tuneloop_trainer.evaluation.suites import PreparedSuite

MAX_LABELS = 64
COLUMNS = ("input_ids", "target")


class Texts(Formatter):
    """Texts as the classifier reads them: no chat, no end to learn."""

    def __init__(self, tokenizer: Any) -> None:  # Any: transformers is untyped
        super().__init__(tokenizer, frozenset(), "Text")

    def encode(self, prompt: str, completion: str, system: str | None = None, history: History = None) -> Encoded:
        return Encoded(self.prompt_ids(prompt, system, history), [])


class SequenceClassification(Objective):
    """transformers' own trainer on a classification model. The base has no head to compare with: it is scored as if it
    answered every text by the labels' shares of the training rows."""

    shape: Shape = LABELLED
    tokens_need_all: ClassVar[bool] = True
    answers: ClassVar[bool] = False
    task: ClassVar[str] = "SEQ_CLS"
    labels: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    """Training rows of each label."""

    @property
    def settings(self) -> Classification:
        return self.config.classification or Classification()

    # --- prepare ---

    def suite_shape(self, suite: Suite) -> Shape:
        return LABELLED

    def formatter(self, base: Path, tokenizer: models.Tokenizer) -> Formatter:
        return Texts(tokenizer)

    def look_at(self, train: Sources, others: Sequence[Record]) -> None:
        found = Counter(record.completion for records in train for record in records)
        self.labels = self.settings.labels or tuple(sorted(found))
        self.counts = tuple(found[label] for label in self.labels)
        if len(self.labels) > MAX_LABELS:
            raise Invalid(f"The training rows have {len(self.labels)} distinct labels; at most {MAX_LABELS} are told apart.")
        if sum(count > 0 for count in self.counts) < 2:
            raise Invalid("The training rows have one label only: there is nothing to tell apart.")
        absent = next((label for label, count in zip(self.labels, self.counts, strict=True) if not count), None)
        if absent is not None:
            raise Invalid(f"No training row has the label '{absent[:40]}' of objective.sequenceClassification.labels.")
        for record in (*(record for records in train for record in records), *others):
            if record.completion not in self.labels:
                names = ", ".join(self.labels)[:200]
                raise Invalid(f"Row {record.row} has the label '{record.completion[:40]}'; the training rows have {names}.")

    def notes(self) -> dict[str, Any]:
        return {"labels": self.labels, "counts": self.counts}

    def read_notes(self, folder: Path) -> None:
        notes = json.loads((folder / NOTES).read_text())
        self.labels, self.counts = tuple(notes["labels"]), tuple(notes["counts"])

    def tokens(self, formatter: Formatter, record: Record) -> Tokens:
        ids = formatter.prompt_ids(record.prompt)
        cut = ids[: self.config.training.max_sequence_length]
        row = TokenRow(cut, [], record.document, len(cut), target=self.labels.index(record.completion))
        return Tokens([row] if ids else [], len(ids))

    # --- train ---

    def load_base(self, folder: Path, dtype: Dtype) -> models.Model:
        """With a new head, drawn under the run's seed."""
        import torch

        torch.manual_seed(self.config.training.seed)
        return models.load_classifier(folder, self.config.base.uri, dtype, self.labels)

    def load(self, folder: Path, uri: str, dtype: Dtype) -> models.Model:
        return models.load_classifier(folder, uri, dtype, None)

    def trainer(self, parts: Parts) -> Any:
        from transformers import Trainer, TrainingArguments

        from tuneloop_trainer.training.trainer import resumable

        return resumable(Trainer)(
            model=with_new_head(self, parts.model),
            args=TrainingArguments(**({"include_num_input_tokens_seen": "non_padding"} | parts.arguments)),
            processing_class=parts.tokenizer,
            data_collator=Labelled(parts.tokenizer),
            compute_loss_func=self._loss,
            train_dataset=parts.train,
            eval_dataset=parts.validation,
            columns=COLUMNS,
            **parts.resuming,
        )

    def class_weights(self) -> list[float]:
        """Balanced: the inverse of each class's share, 1 on average over the rows."""
        if self.settings.class_weights == "None":
            return [1.0] * len(self.labels)
        return [sum(self.counts) / (len(self.counts) * count) for count in self.counts]

    def _loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        import torch

        weights = torch.tensor(self.class_weights(), device=labels.device)
        total = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, weight=weights, reduction="sum")
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    # --- evaluate ---

    def label_scores(self, model: models.Model, suite: PreparedSuite, done: Done) -> list[list[float]]:
        from tuneloop_trainer.evaluation import scoring

        known = [model.config.label2id.get(label) for label in suite.labels]
        if None in known:
            raise Invalid(f"The model tells apart {', '.join(model.config.label2id)[:200]}; suite {suite.suite.name} has other labels.")
        texts = [item.prompt[: self.config.training.max_sequence_length] for item in suite.encoded]
        outputs = scoring.head_outputs(model, texts, done)
        totals = [math.log(sum(math.exp(value - max(row)) for value in row)) + max(row) for row in outputs]
        return [[row[place] - total for place in known] for row, total in zip(outputs, totals, strict=True)]

    def losses(self, model: models.Model, suite: PreparedSuite, done: Done) -> list[tuple[float, int]]:
        """Cross-entropy of each item's label: one prediction an item."""
        scores = self.label_scores(model, suite, done)
        return [(-row[place], 1) for row, place in zip(scores, suite.expected, strict=True)]

    def base_scores(self, suite: PreparedSuite) -> SuiteScores:
        from tuneloop_trainer.evaluation.baselines import SuiteScores

        shares = {label: count / sum(self.counts) for label, count in zip(self.labels, self.counts, strict=True)}
        row = tuple(math.log(shares[label]) for label in suite.labels)
        losses = tuple((-row[place], 1) for place in suite.expected) if "Loss" in suite.suite.metrics else ()
        return SuiteScores(labels=suite.labels, label_scores=(row,) * len(suite.items), losses=losses)


def with_new_head(objective: Objective, model: models.Model) -> models.Model:
    """The model with its adapter; the new head is trained whole, in fp32."""
    wrapped = objective.with_adapter(model)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


class Labelled:
    """Padded texts with their classes."""

    def __init__(self, tokenizer: models.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        import torch

        batch = self._tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, padding_side="right", return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["target"] for row in rows])}


OBJECTIVE = SequenceClassification
