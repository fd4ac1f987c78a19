"""Pre-training, continued or from scratch: every token of every text is learned; long texts are divided, short ones packed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tuneloop_trainer import models, scratch
from tuneloop_trainer.chat import Formatter, stop_ids
from tuneloop_trainer.contract import FROM_SCRATCH, Defaults, Suite
from tuneloop_trainer.data.records import PROMPTED, TEXT, Record, Shape
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.objectives.objective import Dtype, Tokens
from tuneloop_trainer.objectives.sft import SFT

if TYPE_CHECKING:
    from tuneloop_trainer.evaluation.baselines import SuiteScores
    from tuneloop_trainer.evaluation.suites import PreparedSuite


class Pretraining(SFT):
    """As SFT over whole texts, always packed. No token is dropped: a text longer than a row becomes several."""

    shape: Shape = TEXT
    packs: ClassVar[bool] = True

    def suite_shape(self, suite: Suite) -> Shape:
        """A suite over the loss alone has texts; one with labels has prompts and completions."""
        if suite.type == "Validation" or suite.metrics == ("Loss",):
            return TEXT
        return PROMPTED

    def formatter(self, base: Path, tokenizer: models.Tokenizer) -> Formatter:
        """Texts are learned as they are, without turns of a chat."""
        return Formatter(tokenizer, stop_ids(base, tokenizer), "Text")

    def tokens(self, formatter: Formatter, record: Record) -> Tokens:
        encoded = formatter.encode("", record.completion)
        ids, limit = encoded.prompt + encoded.completion, self.config.training.max_sequence_length
        parts = [ids[start : start + limit] for start in range(0, len(ids), limit)]
        return Tokens([TokenRow(part, list(part), record.document, 0) for part in parts], 0)

    # --- from scratch ---

    @property
    def defaults(self) -> Defaults:
        return super().defaults if self.config.scratch is None else FROM_SCRATCH

    def load_base(self, folder: Path, dtype: Dtype) -> models.Model:
        if self.config.scratch is None:
            return super().load_base(folder, dtype)
        return scratch.draw(folder, self.config.training.seed, dtype)

    def base_scores(self, suite: PreparedSuite) -> SuiteScores | None:
        """Drawn weights know nothing, and to be better than they are would say nothing. The measure is what can be known without
        reading: each token is as likely as its share of the training rows."""
        if self.config.scratch is None:
            return None
        from tuneloop_trainer.evaluation.frequencies import by_frequencies

        return by_frequencies(suite, Path(self.config.paths.work) / "prepare")


OBJECTIVE = Pretraining
