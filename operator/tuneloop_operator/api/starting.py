"""What a training starts from: a model that there is, or weights that are drawn for an architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import ConfigDict, Field

from tuneloop_operator.api.types import SOURCE_RULES, Model, SecretRef, Source, rules


class Architecture(Model):
    """A decoder whose weights are drawn before they are trained."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.hiddenSize % (2 * self.heads) == 0",
                "hiddenSize must be a multiple of 2 x heads: each head has an even share of it.",
            ),
            ("!has(self.keyValueHeads) || self.heads % self.keyValueHeads == 0", "heads must be a multiple of keyValueHeads."),
        )
    )

    family: Literal["Llama", "Qwen3"] = Field(default="Llama", description="How its layers are built.")
    layers: int = Field(ge=1, le=256, description="Layers.")
    hidden_size: int = Field(ge=16, le=32_768, description="Width of the hidden states.")
    heads: int = Field(ge=1, le=256, description="Heads of the attention. Engines want heads of 64 or 128: hiddenSize / heads.")
    key_value_heads: int | None = Field(default=None, ge=1, le=256, description="Heads of keys and values. Absent: as many as heads.")
    intermediate_size: int | None = Field(
        default=None, ge=16, le=131_072, description="Width of the MLP. Absent: 8/3 of hiddenSize, up to a multiple of 64."
    )
    tie_embeddings: bool = Field(default=True, description="Whether input and output share one matrix; large models do without.")


class TrainTokenizer(Model):
    """A byte-level BPE tokenizer of the corpus's own."""

    vocabulary_size: int = Field(default=32_000, ge=320, le=262_144, description="Tokens, at most; a small corpus may give fewer.")


class Tokenizer(Model):
    """What cuts texts into tokens."""

    model_config = ConfigDict(
        json_schema_extra=rules(("has(self.source) != has(self.train)", "exactly one of tokenizer.source and tokenizer.train must be set."))
    )

    source: Source | None = Field(default=None, description="A model, or a folder, whose tokenizer is taken; its weights are not read.")
    train: TrainTokenizer | None = Field(default=None, description="Train one on the training rows.")


class StartingModel(Model):
    """A model that there is (`uri`), or an architecture whose weights are drawn by training.seed."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("has(self.uri) != has(self.architecture)", "exactly one of uri and architecture must be set."),
            ("has(self.architecture) == has(self.tokenizer)", "architecture needs a tokenizer, and tokenizer an architecture."),
            ("has(self.uri) || !(has(self.revision) || has(self.secretRef))", "revision and secretRef belong to uri."),
            *((f"!has(self.uri) || ({rule['rule']})", rule["message"]) for rule in SOURCE_RULES["x-kubernetes-validations"]),
        )
    )

    uri: str | None = Field(default=None, min_length=7, max_length=512, description="pvc://claim/path, or hf://organisation/name.")
    revision: str | None = Field(
        default=None, max_length=64, description="Commit of a hub repository. Resolved once, and pinned in status, if absent."
    )
    secret_ref: SecretRef | None = Field(default=None, description="Secret with the key `token`, for a hub repository that needs one.")
    architecture: Architecture | None = Field(default=None, description="Draw the weights instead: pretraining from scratch.")
    tokenizer: Tokenizer | None = Field(default=None, description="The tokenizer of a drawn model.")

    @property
    def files(self) -> Source | None:
        """What is read of other models: the base, or the tokenizer that is taken. None: nothing."""
        if self.uri is not None:
            return Source(uri=self.uri, revision=self.revision, secret_ref=self.secret_ref)
        return self.tokenizer.source if self.tokenizer is not None else None


def starting_rules() -> Iterator[tuple[str, str]]:
    """The rules between the model and the rest of a FineTuneJob's spec."""
    drawn = "has(self.baseModel.architecture)"
    yield (
        f"!{drawn} || self.objective.type == 'Pretraining'",
        "weights that are drawn have to learn texts first: set objective.type: Pretraining.",
    )
    yield f"!{drawn} || self.method.type == 'Full'", "weights that are drawn are trained whole: set method.type: Full."
    yield f"!{drawn} || !has(self.vocabulary)", "vocabulary extends a tokenizer that there is: leave it out with baseModel.architecture."
