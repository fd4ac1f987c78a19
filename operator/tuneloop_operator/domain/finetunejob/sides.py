"""What a training of an encoder-decoder keeps and computes. Arithmetic over its shape, beside `estimates`, which is about decoders.

What a layer keeps for the backward pass was counted as there, on 9 random shapes of T5 and BART for each method and precision, and is a
weighted sum of the widths; the sums are within 15 % of the counts (BART in bf16 with all weights: 40 %).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from tuneloop_trainer.contract import ModelShape

PAIR = 12
"""Bytes for each head and pair of positions, where their scores are kept: the scores, what is left of them, which were dropped."""


class Kept(NamedTuple):
    """Bytes that a layer keeps for a token, for each of the hidden size, the MLP's width and the width of the queries."""

    hidden: int
    wide: int
    query: int


KEPT: dict[tuple[bool, str, str], tuple[Kept, Kept, int]] = {
    (True, "Full", "BF16"): (Kept(66, 16, 10), Kept(79, 14, 50), 26),
    (True, "Full", "FP32"): (Kept(32, 32, 16), Kept(48, 32, 25), 8),
    (True, "LoRA", "BF16"): (Kept(29, 17, 15), Kept(40, 17, 23), 13),
    (True, "LoRA", "FP32"): (Kept(32, 32, 16), Kept(48, 32, 25), 8),
    (False, "Full", "BF16"): (Kept(48, 6, 0), Kept(48, 6, 0), 24),
    (False, "Full", "FP32"): (Kept(40, 8, 0), Kept(60, 8, 0), 8),
    (False, "LoRA", "BF16"): (Kept(29, 4, 0), Kept(40, 4, 0), 9),
    (False, "LoRA", "FP32"): (Kept(40, 8, 0), Kept(60, 8, 0), 8),
}
"""(T5's kind, method, precision) -> of a layer of the encoder and of the decoder, and bytes for the hidden size that each layer of the
decoder keeps for a token of the source."""


def kept_by_layers(
    shape: ModelShape,
    method: Literal["LoRA", "Full"],
    precision: Literal["BF16", "FP32"],
    device: Literal["cpu", "cuda"],
    rows: int,
    tokens: tuple[int, int],
    *,
    checkpointing: bool,
) -> int:
    """Bytes for a micro-batch of so many rows; `tokens` are those of a row's source and target."""
    source, target = tokens
    encoder, decoder, across = KEPT[shape.pairs == "Biased", method, precision]
    scores = PAIR * shape.heads if shape.pairs == "Biased" or (shape.pairs == "Dropped" and device == "cpu") else 0
    reading = source * _of_token(shape, encoder) + scores * source * source
    writing = target * _of_token(shape, decoder) + source * across * shape.hidden_size + scores * target * (source + target)
    layers = shape.encoder_layers or 0
    if not checkpointing:
        return rows * (layers * reading + shape.layers * writing)
    stream = 2 if method == "LoRA" and precision == "BF16" else 4
    inputs = stream * shape.hidden_size * (layers * source + shape.layers * (source + target))
    return rows * (max(reading, writing) + inputs)


def _of_token(shape: ModelShape, kept: Kept) -> int:
    return kept.hidden * shape.hidden_size + kept.wide * shape.intermediate_size + kept.query * shape.heads * shape.head_size


def adapted_parameters(shape: ModelShape, rank: int, only_attention: bool) -> int:
    """LoRA: rank x (inputs + outputs) of every layer that it adapts; a layer of the decoder has two attentions."""
    attention = 4 * (shape.hidden_size + shape.heads * shape.head_size)
    wide = 0 if only_attention else _projections(shape) * (shape.hidden_size + shape.intermediate_size)
    return rank * ((shape.encoder_layers or 0) * (attention + wide) + shape.layers * (2 * attention + wide))


def weights_of_a_token(shape: ModelShape, supervised_share: float) -> float:
    """Weights that a token of the mean row goes through: one of the source through the encoder, one of the target through the decoder
    and its head."""
    share = min(max(supervised_share, 0.0), 1.0)
    attention = 4 * shape.hidden_size * shape.heads * shape.head_size
    wide = _projections(shape) * shape.hidden_size * shape.intermediate_size
    encoder, decoder = (shape.encoder_layers or 0) * (attention + wide), shape.layers * (2 * attention + wide)
    return (1 - share) * encoder + share * (decoder + shape.vocabulary * shape.hidden_size)


def _projections(shape: ModelShape) -> int:
    """Of an MLP: T5's later ones have a gate."""
    return 3 if shape.pairs == "Biased" else 2
