"""RewardModel: a score for an answer to a prompt, learned from which of two answers people preferred."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tuneloop_trainer import models
from tuneloop_trainer.contract import Suite
from tuneloop_trainer.data.records import PREFERRED, Shape
from tuneloop_trainer.objectives.classification import with_new_head
from tuneloop_trainer.objectives.dpo import COLUMNS, DPO
from tuneloop_trainer.objectives.objective import Done, Dtype, Parts

if TYPE_CHECKING:
    from tuneloop_trainer.evaluation.baselines import SuiteScores
    from tuneloop_trainer.evaluation.suites import PreparedSuite

LABELS = ("reward",)


class RewardModel(DPO):
    """TRL's reward trainer on the rows of DPO. The base has no score to compare with: it is scored as a coin."""

    answers: ClassVar[bool] = False
    task: ClassVar[str] = "SEQ_CLS"

    def suite_shape(self, suite: Suite) -> Shape:
        return PREFERRED

    def load_base(self, folder: Path, dtype: Dtype) -> models.Model:
        """With a new head, drawn under the run's seed."""
        import torch

        torch.manual_seed(self.config.training.seed)
        return models.load_classifier(folder, self.config.base.uri, dtype, LABELS)

    def load(self, folder: Path, uri: str, dtype: Dtype) -> models.Model:
        return models.load_classifier(folder, uri, dtype, None)

    def trainer(self, parts: Parts) -> Any:
        from trl import RewardConfig, RewardTrainer

        from tuneloop_trainer.training.trainer import resumable

        return resumable(RewardTrainer)(
            model=with_new_head(self, parts.model),
            args=RewardConfig(**({"max_length": None} | parts.arguments)),
            processing_class=parts.tokenizer,
            data_collator=Pairs(models.padding(parts.tokenizer)),
            train_dataset=parts.train,
            eval_dataset=parts.validation,
            columns=COLUMNS,
            **parts.resuming,
        )

    def label_scores(self, model: models.Model, suite: PreparedSuite, done: Done) -> list[list[float]]:
        """The score of either answer of each item."""
        from tuneloop_trainer.evaluation import scoring

        limit = self.config.training.max_sequence_length
        texts = [
            (item.prompt + tokens)[:limit] for item, choices in zip(suite.encoded, suite.label_tokens, strict=True) for tokens in choices
        ]
        scores = [row[0] for row in scoring.head_outputs(model, texts, done)]
        return [list(pair) for pair in zip(scores[::2], scores[1::2], strict=True)]

    def base_scores(self, suite: PreparedSuite) -> SuiteScores:
        """Right on every other item."""
        from tuneloop_trainer.evaluation.baselines import SuiteScores

        return SuiteScores(labels=suite.labels, label_scores=tuple((float(place % 2 == 0), 0.5) for place in range(len(suite.items))))


class Pairs:
    """Rows of prepare as TRL's collator of rewards wants them: either answer behind its prompt."""

    def __init__(self, pad: int) -> None:
        from trl.trainer.reward_trainer import DataCollatorForPreference

        self._collate = DataCollatorForPreference(pad_token_id=pad)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        return self._collate(
            [
                {"chosen_ids": row["input_ids"], "rejected_ids": row["input_ids"][: row["prompt_length"]] + row["rejected_ids"]}
                for row in rows
            ]
        )


OBJECTIVE = RewardModel
