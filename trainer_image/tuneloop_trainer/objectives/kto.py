"""KTO: answers that people found good become likelier, those found bad less likely, without pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tuneloop_trainer import models
from tuneloop_trainer.chat import Formatter
from tuneloop_trainer.contract import Kto
from tuneloop_trainer.data.records import JUDGED, Record, Shape
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.objectives.dpo import with_reference
from tuneloop_trainer.objectives.objective import Objective, Parts, Sources, Tokens, masked

COLUMNS = ("input_ids", "prompt_length", "target")


class KTO(Objective):
    """TRL's KTO trainer. Judged by the loss on desirable answers."""

    shape: Shape = JUDGED
    least_rows: ClassVar[int] = 2
    """The divergence from the base is estimated from each prompt with its neighbour's answer."""

    def judged(self, records: Sequence[Record]) -> list[Record]:
        return [record for record in records if record.desirable]

    def look_at(self, train: Sources, others: Sequence[Record]) -> None:
        kinds = {record.desirable for records in train for record in records}
        if len(kinds) < 2:
            kind = "desirable" if True in kinds else "undesirable"
            raise Invalid(f"Every training row is {kind}. KTO needs rows of both kinds in the column 'desirable'.")

    def tokens(self, formatter: Formatter, record: Record) -> Tokens:
        encoded = formatter.encode(record.prompt, record.completion, record.system)
        ids, labels = masked(encoded.prompt, encoded.completion, self.config.training.max_sequence_length)
        row = TokenRow(ids, labels, record.document, len(encoded.prompt), target=int(bool(record.desirable)))
        return Tokens([row] if row.supervised else [], len(encoded.prompt) + len(encoded.completion))

    def trainer(self, parts: Parts) -> Any:
        from trl import KTOConfig, KTOTrainer

        from tuneloop_trainer.training.trainer import resumable

        settings = self.config.kto or Kto()
        own = {
            "beta": settings.beta,
            "desirable_weight": settings.desirable_weight,
            "undesirable_weight": settings.undesirable_weight,
            "max_length": None,
            "train_sampling_strategy": "sequential",
        }
        return resumable(KTOTrainer)(
            **with_reference(self, parts),
            args=KTOConfig(**(own | parts.arguments)),
            processing_class=parts.tokenizer,
            data_collator=Judgements(models.padding(parts.tokenizer)),
            train_dataset=parts.train,
            eval_dataset=parts.validation,
            columns=COLUMNS,
            **parts.resuming,
        )


class Judgements:
    """Rows of prepare as TRL's collator wants them; each prompt also with the answer of the row before it in the micro-batch."""

    def __init__(self, pad: int) -> None:
        from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

        self._collate = DataCollatorForUnpairedPreference(pad_token_id=pad)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
        answers = [row["input_ids"][row["prompt_length"] :] for row in rows]
        strangers = [answers[-1], *answers[:-1]]
        return self._collate(
            [
                {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": stranger, "label": bool(row["target"])}
                for prompt, answer, stranger, row in zip(prompts, answers, strangers, rows, strict=True)
            ]
        )


OBJECTIVE = KTO
