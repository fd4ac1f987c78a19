"""Packs several short rows into one sequence, so that no step is spent on padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence

from tuneloop_trainer.chat import IGNORED
from tuneloop_trainer.data.shards import TokenRow

WINDOW_ROWS, WINDOW_TOKENS = 20_000, 2_000_000


def pack(rows: Sequence[TokenRow], max_length: int) -> list[TokenRow]:
    """Best-fit decreasing: each row goes where the least space remains. No row is cut; within a packed row the first token of
    each sequence has no loss, as it would be predicted from its neighbour."""
    bins: list[list[TokenRow]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        place = bisect_left(spaces, (len(row.input_ids), -1))
        if place == len(spaces):
            bins.append([])
            free, number = max_length, len(bins) - 1
        else:
            free, number = spaces.pop(place)
        bins[number].append(row)
        insort(spaces, (free - len(row.input_ids), number))
    return [_joined(members) for members in bins]


def pack_stream(rows: Iterable[TokenRow], max_length: int) -> Iterator[TokenRow]:
    """As `pack`, over as many rows at a time as fill a few thousand packed ones: memory stays flat, and little is lost at the seams."""
    waiting: list[TokenRow] = []
    tokens = 0
    for row in rows:
        waiting.append(row)
        tokens += len(row.input_ids)
        if len(waiting) >= WINDOW_ROWS or tokens >= WINDOW_TOKENS:
            yield from pack(waiting, max_length)
            waiting, tokens = [], 0
    yield from pack(waiting, max_length)


def _joined(rows: Sequence[TokenRow]) -> TokenRow:
    return TokenRow(
        input_ids=[token for row in rows for token in row.input_ids],
        labels=[label for row in rows for label in (IGNORED, *row.labels[1:])],
        document=rows[0].document,
        prompt_length=0,
        sequences=tuple(len(row.input_ids) for row in rows),
    )
