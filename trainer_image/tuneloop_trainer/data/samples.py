"""Three training rows as the model sees them, for the data card: pieces of text, each learned or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuneloop_trainer.data.shards import TokenRow

SAMPLES = 3
SHOWN_TOKENS = 400
_JOINED = 8
"""Tokens that one character may be made of, at most."""


@dataclass(frozen=True)
class Piece:
    """A token (or the few that make one character), and whether there is loss on it."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Sample:
    row: int
    tokens: int
    learned: int
    left_out: int
    """Tokens of the middle that are not shown."""
    beginning: tuple[Piece, ...]
    end: tuple[Piece, ...]


class Samples:
    """Keeps the rows that are first in an order which depends on their content alone."""

    def __init__(self) -> None:
        self._kept: list[tuple[bytes, int, TokenRow]] = []

    def offer(self, key: bytes, number: int, row: TokenRow) -> None:
        if len(self._kept) < SAMPLES or key < self._kept[-1][0]:
            self._kept = sorted([*self._kept, (key, number, row)], key=lambda kept: kept[:2])[:SAMPLES]

    def rendered(self, tokenizer: Any) -> list[Sample]:  # Any: transformers is untyped
        return [_sample(number, row, tokenizer) for _, number, row in self._kept]


def _sample(number: int, row: TokenRow, tokenizer: Any) -> Sample:
    learned = [label >= 0 for label in row.labels] if row.labels else [False] * len(row.input_ids)
    if learned:
        learned[0] = False  # the first token is never predicted
    half = SHOWN_TOKENS // 2
    left_out = max(0, len(row.input_ids) - SHOWN_TOKENS)
    cut = len(row.input_ids) - half if left_out else half
    return Sample(
        row=number,
        tokens=len(row.input_ids),
        learned=sum(learned),
        left_out=left_out,
        beginning=tuple(_pieces(row.input_ids[:half], learned[:half], tokenizer)),
        end=tuple(_pieces(row.input_ids[cut:], learned[cut:], tokenizer)),
    )


def _pieces(ids: Sequence[int], learned: Sequence[bool], tokenizer: Any) -> list[Piece]:
    pieces: list[Piece] = []
    waiting: list[int] = []
    for place, token in enumerate(ids):
        waiting.append(token)
        text = str(tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if text.endswith("\ufffd") and len(waiting) < _JOINED and place + 1 < len(ids):
            continue  # a part of a character
        pieces.append(Piece(text, learned[place]))
        waiting = []
    return pieces
