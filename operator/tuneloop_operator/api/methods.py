"""Which weights a FineTuneJob trains, and what that means for its output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import ConfigDict, Field

from tuneloop_operator.api.types import Half, Model, rules


class LoRA(Model):
    """Low-rank adapters."""

    rank: int = Field(default=32, ge=1, le=512, description="Rank of the adapters.")
    alpha: int = Field(default=32, ge=1, le=1024, description="Scaling: alpha / rank.")
    dropout: Half = Field(default="0", description="Dropout on the adapters' inputs.")
    target_modules: Literal["AllLinear", "Attention"] = Field(default="AllLinear", description="Which layers get adapters.")
    dora: bool = Field(
        default=False,
        description="DoRA: the length of each column of a weight is learned apart from its direction. Closer to method Full at small "
        "ranks, slower, and no engine serves its adapter: output.format is Merged.",
    )


class PromptTuning(Model):
    """A learned prompt."""

    virtual_tokens: int = Field(default=20, ge=1, le=512, description="Rows that stand before every text in the place of tokens.")


class Method(Model):
    """Which weights are trained."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("!has(self.lora) || self.type == 'LoRA'", "lora may be set only with type: LoRA."),
            ("!has(self.promptTuning) || self.type == 'PromptTuning'", "promptTuning may be set only with type: PromptTuning."),
        )
    )

    type: Literal["LoRA", "Full", "PromptTuning"] = Field(
        default="LoRA",
        description="LoRA: adapters on a frozen base. Full: all weights. PromptTuning: a few rows that stand before every text.",
    )
    lora: LoRA | None = Field(default=None, description="Settings of LoRA.")
    prompt_tuning: PromptTuning | None = Field(default=None, description="Settings of PromptTuning.")

    @property
    def leaves_adapter(self) -> bool:
        """Whether the weights that are trained are kept apart from their base."""
        return self.type != "Full" and not (self.lora is not None and self.lora.dora)


class Quantization(Model):
    """How the base is kept while adapters are trained on it. It is served, and merged into, as it is."""

    bits: Literal[4] = Field(default=4, description="Bits of each weight of the linear layers.")
    type: Literal["NF4"] = Field(default="NF4", description="NF4: 4-bit NormalFloat, with constants that are quantised too (QLoRA).")


class FromCorpus(Model):
    """Which words of the training rows get tokens of their own."""

    min_count: int = Field(default=100, ge=2, le=1_000_000_000, description="Times that a word occurs in the training rows, at least.")
    min_fertility: int = Field(default=3, ge=2, le=64, description="Tokens that the base's tokenizer cuts the word into, at least.")
    max_tokens: int = Field(default=500, ge=1, le=20_000, description="New tokens at most: the words that save most are taken.")


class Vocabulary(Model):
    """New tokens for the words of a domain. They make a new base model, so that the output is Merged."""

    from_corpus: FromCorpus = Field(default=FromCorpus(), description="Which words of the training rows get tokens of their own.")
    initialization: Literal["SubtokenMean"] = Field(
        default="SubtokenMean", description="SubtokenMean: a new row begins as the mean of the rows that its word was made of."
    )


def method_rules() -> Iterator[tuple[str, str]]:
    """The rules between the method and the rest of a FineTuneJob's spec."""
    merged = "!has(self.output.format) || self.output.format == 'Merged'"
    yield f"self.method.type != 'Full' || {merged}", "method Full has no adapter: output.format must be Merged."
    yield (
        f"!has(self.method.lora) || !self.method.lora.dora || {merged}",
        "no engine serves an adapter of DoRA on its base: output.format must be Merged.",
    )
    yield from _quantization_rules()
    learned_prompt = "self.method.type != 'PromptTuning'"
    yield (
        f"{learned_prompt} || !has(self.output.format) || self.output.format == 'Adapter'",
        "PromptTuning changes no weight of its base: output.format must be Adapter.",
    )
    yield f"{learned_prompt} || self.objective.type == 'SFT'", "PromptTuning goes with objective SFT only."
    yield f"{learned_prompt} || !self.training.packing", "a learned prompt stands before each row: training.packing must be false."
    yield f"{learned_prompt} || !has(self.vocabulary)", "PromptTuning trains no row of the vocabulary: leave out vocabulary."
    yield f"!has(self.vocabulary) || {merged}", "new tokens make a new base, on which no adapter stands: output.format must be Merged."


NOT_QUANTIZED = ("SequenceClassification", "RewardModel", "Seq2Seq")
"""Objectives whose models have heads of their own, or two parts."""


def _quantization_rules() -> Iterator[tuple[str, str]]:
    absent = "!has(self.quantization)"
    yield f"{absent} || self.method.type == 'LoRA'", "quantization keeps a base that is not trained: method.type must be LoRA."
    yield (
        f"{absent} || !has(self.method.lora) || !self.method.lora.dora",
        "DoRA measures whole weights: leave out quantization, or lora.dora.",
    )
    yield f"{absent} || !has(self.vocabulary)", "new tokens are written into the base: leave out quantization, or vocabulary."
    yield f"{absent} || self.compute.parallelism != 'FSDP'", "weights in few bits are not divided: compute.parallelism must not be FSDP."
    names = ", ".join(f"'{name}'" for name in NOT_QUANTIZED)
    yield f"{absent} || !(self.objective.type in [{names}])", f"quantization does not go with {', '.join(NOT_QUANTIZED)}."
