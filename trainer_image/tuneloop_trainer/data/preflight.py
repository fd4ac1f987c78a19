"""Looks, before any device is taken, for what would spoil a run: refuses what cannot end well, and warns of what seldom does.

Each check has one function here; what the reading and tokenising refuse by themselves (columns, empty rows, contamination,
rows without a supervised token, templates that render a prompt differently once it is answered) is not repeated.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tuneloop_trainer.chat import IGNORED, stop_ids
from tuneloop_trainer.contract import RunConfig
from tuneloop_trainer.data.curation import MAX_CLASS_CHARACTERS, MAX_CLASSES
from tuneloop_trainer.data.records import MAX_BAD_SHARE, Record
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.data.tokens import TokenCounts
from tuneloop_trainer.errors import Invalid

EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
EMBEDDINGS_LOOKED_AT = 128
UNTRAINED_SHARE = 0.01
MIN_END_SHARE = 0.99
MAX_TRUNCATED_SHARE = MAX_BAD_SHARE
FEW_TRUNCATED_SHARE = 0.01
MIN_SUPERVISED_SHARE = 0.01
MIN_ROWS_OF_ONE_CLASS = 20
MAX_CLASS_RATIO = 20
MIN_STEPS, SHORT_RUN_STEPS = 50, 200
MAX_WARMUP_SHARE = 0.2
MAX_EPOCHS, SMALL_SET_ROWS = 3, 1_000
MAX_LORA_BATCH = 64
LEARNING_RATES = {
    "SFT": (1e-5, 5e-5),
    "Pretraining": (1e-5, 3e-4),
    "Seq2Seq": (2e-5, 3e-4),
    "DPO": (5e-7, 1e-6),
    "KTO": (5e-7, 1e-6),
    "GRPO": (5e-7, 5e-6),
    "RLOO": (5e-7, 5e-6),
}
"""Bands for all weights; an adapter learns at ten times the rate (Schulman et al. 2025, "LoRA Without Regret")."""
SCRATCH_RATES = (1e-4, 3e-3)
"""For weights that were drawn."""
LORA_FACTOR = 10
SHORT_RUN_FACTOR = 2
"""A run below SHORT_RUN_STEPS may be that much faster."""
MAX_SHOWN, MAX_CHARACTERS = 8, 160


@dataclass(frozen=True)
class Vocabulary:
    """What the tokenizer and the model say of each other."""

    stop_ids: frozenset[int]
    bos: int | None
    pad: int | None
    tokenizer_size: int
    embedding_rows: int | None
    """None: the model's configuration does not say."""
    untrained: frozenset[int] = frozenset()
    """Stop tokens that the model never learned."""


def read_vocabulary(base: Path, tokenizer: Any) -> Vocabulary:  # Any: transformers is untyped
    config = json.loads((base / "config.json").read_text())
    rows = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    ends = stop_ids(base, tokenizer)
    return Vocabulary(
        stop_ids=ends,
        bos=tokenizer.bos_token_id,
        pad=tokenizer.pad_token_id,
        tokenizer_size=len(tokenizer),
        embedding_rows=rows if isinstance(rows, int) else None,
        untrained=untrained_tokens(base, ends),
    )


def untrained_tokens(base: Path, tokens: Iterable[int]) -> frozenset[int]:
    """Those of the tokens whose input embedding is near zero beside the others': a base model has such for the marks of a chat."""
    from safetensors import safe_open

    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            name = next((name for name in file.keys() if name.endswith(EMBEDDINGS)), None)  # noqa: SIM118  # no mapping
            if name is not None:
                table = file.get_slice(name)
                rows = table.get_shape()[0]
                usual = median(_norm(table, row) for row in range(0, rows, max(1, rows // EMBEDDINGS_LOOKED_AT)))
                return frozenset(token for token in tokens if token < rows and _norm(table, token) < UNTRAINED_SHARE * usual)
    return frozenset()


def _norm(table: Any, row: int) -> float:  # Any: safetensors is untyped
    return float(table[row : row + 1].float().norm())


@dataclass
class Preflight:
    """Sees every record with its tokens, then judges the whole."""

    config: RunConfig
    vocabulary: Vocabulary
    whole: int = 0
    ended: int = 0
    endless: int = 0
    """Targets of an encoder-decoder that were cut, and with them their end."""
    ends: set[int] = field(default_factory=set)
    classes: Counter[str] | None = field(default_factory=Counter)

    def see(self, record: Record, rows: list[TokenRow], whole_length: int) -> None:
        """One record that is kept. Raises Invalid for tokens that the model cannot read."""
        for row in rows:
            self._refuse_unknown_token(record, row)
            self._refuse_double_start(record, row)
        if whole_length <= self.config.training.max_sequence_length and max(rows[-1].labels, default=-1) >= 0:
            ends = _ends(rows[-1].labels) if record.history else {rows[-1].labels[-1]}
            self.whole += 1
            self.ended += ends <= self.vocabulary.stop_ids
            self.ends |= ends
        if self.config.objective == "Seq2Seq":
            self.endless += rows[-1].labels[-1] not in self.vocabulary.stop_ids
        self._count_class(record)

    def judge(self, counts: TokenCounts, steps: int) -> list[str]:
        """Warnings, the gravest first. Raises Invalid for a set that is not worth a device."""
        self._refuse_unknown_padding()
        self._refuse_without_ends()
        self._refuse_mostly_truncated(counts)
        self._refuse_one_class()
        checks = (
            self._untrained_end(),
            self._truncation(counts),
            self._supervision(counts),
            self._imbalance(),
            self._unseen_labels(),
            self._vocabulary(),
            self._contamination(),
            self._learning_rate(steps),
            self._steps(steps),
            self._warmup(steps),
            self._epochs(counts),
            self._batch(),
            self._targets(),
        )
        return [warning[:MAX_CHARACTERS] for warning in checks if warning is not None]

    # --- refusals ---

    def _refuse_unknown_token(self, record: Record, row: TokenRow) -> None:
        rows = self.vocabulary.embedding_rows
        if rows is not None and max(row.input_ids, default=0) >= rows:
            raise Invalid(
                f"Row {record.row} has the token {max(row.input_ids)}, and the base model has {rows} embedding rows. "
                "Its tokenizer belongs to another model: set baseModel to one folder that holds both."
            )

    def _refuse_unknown_padding(self) -> None:
        pad, rows = self.vocabulary.pad, self.vocabulary.embedding_rows
        if pad is not None and rows is not None and pad >= rows:
            raise Invalid(f"The tokenizer pads with the token {pad}, and the base model has {rows} embedding rows. Correct pad_token.")

    def _refuse_double_start(self, record: Record, row: TokenRow) -> None:
        bos = self.vocabulary.bos
        if bos is not None and bos not in self.vocabulary.stop_ids and row.input_ids[:2] == [bos, bos]:
            raise Invalid(
                f"Row {record.row} starts with two start tokens: the chat template and the tokenizer both write one. "
                "Correct the chat template, or set promptFormat: Text."
            )

    def _refuse_without_ends(self) -> None:
        if self.whole and self.ended < MIN_END_SHARE * self.whole:
            raise Invalid(
                f"{self.whole - self.ended} of {self.whole} uncut rows do not end with a token at which the engine stops: the model "
                "would learn never to stop. Correct the base model's chat template or generation_config.json."
            )

    def _refuse_mostly_truncated(self, counts: TokenCounts) -> None:
        endless = {"SFT": counts.truncated, "Seq2Seq": self.endless}.get(self.config.objective, 0)
        if endless > MAX_TRUNCATED_SHARE * counts.rows:
            raise Invalid(
                f"{endless} of {counts.rows} rows are cut at training.maxSequenceLength "
                f"{self.config.training.max_sequence_length}, and with them the end of the answer. Raise it, or shorten the rows."
            )

    def _refuse_one_class(self) -> None:
        if self.classes is not None and len(self.classes) == 1 and self.classes.total() >= MIN_ROWS_OF_ONE_CLASS:
            (name,) = self.classes
            raise Invalid(f"All {self.classes.total()} training rows have the completion '{name[:40]}': there is nothing to learn.")

    # --- warnings ---

    def _untrained_end(self) -> str | None:
        never = sorted(self.ends & self.vocabulary.untrained)
        if not never:
            return None
        return f"The base model never learned token {never[0]}, which ends the answers (its embedding is near 0). Use an instruct model."

    def _truncation(self, counts: TokenCounts) -> str | None:
        if counts.truncated <= FEW_TRUNCATED_SHARE * counts.rows:
            return None
        lost = f"{self.endless} answers have no end" if self.config.objective == "Seq2Seq" else "their answers have no end"
        return f"{counts.truncated} of {counts.rows} rows are cut at training.maxSequenceLength: {lost}."

    def _supervision(self, counts: TokenCounts) -> str | None:
        if not self.whole or counts.supervised_share >= MIN_SUPERVISED_SHARE:
            return None
        return f"Only {counts.supervised_share:.2%} of the tokens are learned: the prompts are long, the answers short."

    def _imbalance(self) -> str | None:
        if not self.classes or len(self.classes) < 2:
            return None
        (most, many), (least, few) = self.classes.most_common()[0], self.classes.most_common()[-1]
        if many <= MAX_CLASS_RATIO * few:
            return None
        return f"'{most[:30]}' has {many} rows, '{least[:30]}' {few}: set data.curation.classBalance, or add rows of the latter."

    def _unseen_labels(self) -> str | None:
        if not self.classes:
            return None
        labels = [label for suite in self.config.evaluation.suites for label in suite.labels]
        unseen = next((label for label in labels if label.strip() not in self.classes), None)
        return None if unseen is None else f"No training row has the label '{unseen[:40]}', which a suite asks for."

    def _vocabulary(self) -> str | None:
        size, rows = self.vocabulary.tokenizer_size, self.vocabulary.embedding_rows
        if rows is None or size <= rows:
            return None
        return f"The tokenizer knows {size} tokens, the model {rows}: no row uses the others, but a user might."

    def _contamination(self) -> str | None:
        if self.config.curation.decontaminate or not (self.config.evaluation.suites or self.config.validation_fraction):
            return None
        return "data.curation.decontaminate is false: training rows may equal evaluation items, and gates then say little."

    def _learning_rate(self, steps: int) -> str | None:
        band = SCRATCH_RATES if self.config.scratch is not None else LEARNING_RATES.get(self.config.objective)
        if band is None or self.config.method.type == "PromptTuning":
            return None
        factor = LORA_FACTOR if self.config.method.type != "Full" else 1
        low, high = band[0] * factor, band[1] * factor * (SHORT_RUN_FACTOR if steps < SHORT_RUN_STEPS else 1)
        rate = self.config.training.learning_rate
        if low * 0.999 <= rate <= high * 1.001:
            return None
        kind = f"{self.config.objective} with {self.config.method.type}"
        return f"training.learningRate {rate:g} is outside {low:g} to {high:g}, usual for {kind}."

    def _steps(self, steps: int) -> str | None:
        return None if steps >= MIN_STEPS else f"The run has {steps} steps only; below {MIN_STEPS} little is learned. Set training.epochs."

    def _warmup(self, steps: int) -> str | None:
        warmup = self.config.training.warmup_steps
        if warmup is None or warmup <= MAX_WARMUP_SHARE * steps:
            return None
        return f"training.warmupSteps {warmup} is more than a fifth of the run's {steps} steps."

    def _epochs(self, counts: TokenCounts) -> str | None:
        training = self.config.training
        if training.max_steps is not None or training.epochs <= MAX_EPOCHS or counts.rows >= SMALL_SET_ROWS:
            return None
        return f"{training.epochs:g} epochs over {counts.rows} rows are likely to be learned by heart. Set training.earlyStopping."

    def _batch(self) -> str | None:
        if self.config.method.type != "LoRA" or self.config.training.global_batch_size <= MAX_LORA_BATCH:
            return None
        return (
            f"training.globalBatchSize {self.config.training.global_batch_size}: adapters learn worse from batches above {MAX_LORA_BATCH}."
        )

    def _targets(self) -> str | None:
        lora = self.config.method.lora
        if lora is None or lora.target_modules != "Attention":
            return None
        return "method.lora.targetModules Attention leaves out the MLP layers, where most is learned. AllLinear is the default."

    def _count_class(self, record: Record) -> None:
        if self.classes is None or record.rejected is not None or record.history:
            self.classes = None
            return
        name = record.completion.strip()
        if not name or len(name) > MAX_CLASS_CHARACTERS or (name not in self.classes and len(self.classes) == MAX_CLASSES):
            self.classes = None
        else:
            self.classes[name] += 1


def _ends(labels: list[int]) -> set[int]:
    """The last token of each answer: of each run of tokens with loss."""
    return {label for label, after in zip(labels, [*labels[1:], IGNORED], strict=True) if label != IGNORED and after == IGNORED}
