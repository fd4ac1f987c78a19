"""What an objective answers to the stages. The defaults here are those of a causal language model that is served as a chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tuneloop_trainer import models
from tuneloop_trainer.chat import Formatter, stop_ids
from tuneloop_trainer.contract import DEFAULTS, Defaults, PromptTuning, Reason, RunConfig, Suite
from tuneloop_trainer.data.records import PREFERRED, PROMPTED, Record, Shape
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.errors import Invalid

if TYPE_CHECKING:
    from tuneloop_trainer.evaluation.baselines import SuiteScores
    from tuneloop_trainer.evaluation.suites import PreparedSuite

NOTES = "objective.json"
TERMS = "vocabulary.json"
"""In the folder of prepare: the words that got tokens of their own, and which."""
Done = Callable[[int], None]
Sources = Sequence[Iterable[Record]]
"""Per source its records, which may be walked several times and do not fit into memory together."""
Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A record as rows to train on; none, where no token of it could be learned. `whole` is the length it would need uncut."""

    rows: list[TokenRow]
    whole: int


@dataclass(frozen=True)
class Parts:
    """What a trainer is put together from, beside what the objective adds."""

    base: Path
    model: models.Model
    tokenizer: models.Tokenizer
    arguments: dict[str, Any]
    train: Any
    validation: Any
    resuming: dict[str, Any]
    """Order, samples consumed and checkpoints, as `training.trainer.Resumable` takes them."""


class Objective:
    """One run's objective, made from its configuration."""

    shape: Shape = PROMPTED
    """How a training row and a row of the validation split are read."""
    packs: ClassVar[bool] = False
    """Whether rows are packed whatever the configuration says."""
    least_rows: ClassVar[int] = 1
    """Rows that a micro-batch must have."""
    repeats: int = 1
    """Times that a row counts in a global batch: completions that the model writes to it."""
    tokens_need_all: ClassVar[bool] = False
    """Whether a record's tokens depend on what `look_at` saw."""
    answers: ClassVar[bool] = True
    """Whether the model writes text, so that it can be asked freely and probed where it is served."""
    task: ClassVar[str] = "CAUSAL_LM"
    """peft's name of what the model does."""
    new_tokens: tuple[int, ...] = ()
    """Tokens that the run added to the vocabulary; their rows are trained whatever the method."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @property
    def defaults(self) -> Defaults:
        return DEFAULTS[self.config.objective, self.config.method.type]

    # --- prepare ---

    def suite_shape(self, suite: Suite) -> Shape:
        """How the items of a suite are read."""
        if suite.type == "Validation":
            return self.shape
        return PREFERRED if "Preference" in suite.metrics else PROMPTED

    def judged(self, records: Sequence[Record]) -> list[Record]:
        """The held-out records that the model is judged by."""
        return list(records)

    def formatter(self, base: Path, tokenizer: models.Tokenizer) -> Formatter:
        return Formatter(tokenizer, stop_ids(base, tokenizer), self.config.prompt_format)

    def look_at(self, train: Sources, others: Sequence[Record]) -> None:
        """See all training records, and those that are judged by, before any is tokenised. Raises Invalid for a set that the
        objective cannot learn from."""

    def notes(self) -> dict[str, Any]:
        """What the later stages need to know of the data."""
        return {}

    def write_notes(self, folder: Path) -> None:
        if notes := self.notes():
            (folder / NOTES).write_text(json.dumps(notes, ensure_ascii=False))

    def read_notes(self, folder: Path) -> None:
        """Take up what `write_notes` left."""

    def tokens(self, formatter: Formatter, record: Record) -> Tokens:
        """The record as tokens of at most the configured length."""
        raise NotImplementedError

    # --- train ---

    def load_base(self, folder: Path, dtype: Dtype) -> models.Model:
        """The base as this objective trains it."""
        return self.load(folder, self.config.base.uri, dtype)

    def load_quantized(self, folder: Path, dtype: Dtype) -> models.Model:
        """The base under an adapter that is trained on it in few bits; it is merged into, and served on, the base as it is."""
        return models.load_model(folder, self.config.base.uri, dtype, self.config.quantization)

    def load(self, folder: Path, uri: str, dtype: Dtype) -> models.Model:
        """A model that this objective has trained: a checkpoint's, or a merged one."""
        return models.load_model(folder, uri, dtype)

    def trainer(self, parts: Parts) -> Any:
        """The trainer, ready to run."""
        raise NotImplementedError

    def adapter(self, model: models.Model) -> Any:
        """peft's configuration of the adapter on this model; None where all weights are trained."""
        lora = self.config.method.lora
        if self.config.method.type == "PromptTuning":
            return self._prompt()
        if self.config.method.type == "Full" or lora is None:
            return None
        from peft import LoraConfig

        targets = "all-linear" if lora.target_modules == "AllLinear" else ["q_proj", "k_proj", "v_proj", "o_proj"]
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            use_dora=lora.dora,
            trainable_token_indices=self._new_rows(model),
            task_type=self.task,
        )

    def _prompt(self) -> Any:
        """A learned prompt, that begins as rows of the vocabulary, drawn under the run's seed."""
        from peft import PromptTuningConfig, PromptTuningInit

        settings = self.config.method.prompt_tuning or PromptTuning()
        return PromptTuningConfig(
            num_virtual_tokens=settings.virtual_tokens, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB, task_type=self.task
        )

    def _new_rows(self, model: models.Model) -> dict[str, list[int]] | None:
        """Rows that are trained beside the adapter, by the name of their layer. A head that is tied follows the input by itself."""
        if not self.new_tokens:
            return None
        layers = [model.get_input_embeddings()]
        head = model.get_output_embeddings()
        if head is not None and head.weight is not layers[0].weight:
            layers.append(head)
        names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
        return {names[id(layer)]: list(self.new_tokens) for layer in layers}

    def with_adapter(self, model: models.Model) -> models.Model:
        """The model with the adapter to train, in fp32, where the method has one."""
        adapter = self.adapter(model)
        if adapter is None:
            return model
        from peft import get_peft_model

        try:
            return get_peft_model(model, adapter, autocast_adapter_dtype=True)
        except ValueError as error:
            raise Invalid(f"{self.config.method.type} does not fit {self.config.base.uri}: {error}", Reason.MODEL_NOT_FOUND) from error

    # --- evaluate ---

    def label_scores(self, model: models.Model, suite: PreparedSuite, done: Done) -> list[list[float]]:
        """Per item the summed log-probability of each label."""
        from tuneloop_trainer.evaluation import scoring

        return scoring.label_scores(model, [item.prompt for item in suite.encoded], suite.label_tokens, done)

    def losses(self, model: models.Model, suite: PreparedSuite, done: Done) -> list[tuple[float, int]]:
        """Per item the summed negative log-probability, and over how many predictions."""
        from tuneloop_trainer.evaluation import scoring

        return scoring.held_out_losses(model, suite.encoded, suite.limit, done)

    def rewards(self, model: models.Model, suite: PreparedSuite, done: Done) -> list[float]:
        """Per item the reward of the model's most likely answer."""
        raise Invalid(f"{self.config.objective} has no rewards: suite {suite.suite.name} cannot have the metric Reward.")

    def reward_key(self) -> str:
        """What the rewards depend on beside model and items, for the cache of scores."""
        return ""

    def reward_bytes(self) -> int:
        """Weights of models that stand beside the model while it is trained."""
        return 0

    def texts(self, model: models.Model, suite: PreparedSuite, formatter: Formatter, done: Done) -> list[str]:
        """The model's own answers to the first items, for the metric ChrF. Those that a causal model is probed by are others."""
        raise NotImplementedError

    @property
    def scoring(self) -> dict[str, int]:
        """What scores depend on beside the suite: scores that were made by other settings are not taken from the cache."""
        return {}

    def base_scores(self, suite: PreparedSuite) -> SuiteScores | None:
        """The base's scores where the base itself cannot be asked; None: it can."""
        return None


def masked(prompt: list[int], completion: list[int], limit: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of an answer to a prompt, cut at the limit."""
    from tuneloop_trainer.chat import IGNORED

    return (prompt + completion)[:limit], ([IGNORED] * len(prompt) + completion)[:limit]
