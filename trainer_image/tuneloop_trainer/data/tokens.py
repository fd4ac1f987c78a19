"""Records to token rows: labels, truncation, and what the data card says about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tuneloop_trainer.chat import IGNORED, Formatter
from tuneloop_trainer.contract import RunConfig
from tuneloop_trainer.data.records import MAX_BAD_SHARE, Drops, Record
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.errors import Invalid

HISTOGRAM_BOUNDS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass
class TokenCounts:
    """Totals over the rows that were kept."""

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    with_end: int = 0
    """Rows whose last token, at which the engine stops, is supervised."""
    longest: int = 0
    histogram: tuple[int, ...] = (0,) * (len(HISTOGRAM_BOUNDS) + 1)

    def add(self, row: TokenRow, truncated: bool) -> None:
        length = len(row.input_ids)
        self.rows += 1
        self.tokens += length
        self.supervised += row.supervised
        self.truncated += truncated
        self.with_end += not truncated
        self.longest = max(self.longest, length)
        bucket = sum(length > bound for bound in HISTOGRAM_BOUNDS)
        self.histogram = tuple(count + (index == bucket) for index, count in enumerate(self.histogram))

    @property
    def supervised_share(self) -> float:
        return self.supervised / self.tokens if self.tokens else 0.0


class Tokenizing:
    """Turns records into rows of at most `max_sequence_length` tokens."""

    def __init__(self, config: RunConfig, formatter: Formatter) -> None:
        self.counts = TokenCounts()
        self.drops = Drops()
        self._formatter = formatter
        self._limit = config.training.max_sequence_length
        self._whole = config.loss == "FullSequence"
        self._needed = 0

    def rows(self, records: Sequence[Record], done: Callable[[int], None]) -> list[TokenRow]:
        rows = []
        for number, record in enumerate(records, 1):
            row = self._row(record)
            if row is not None:
                rows.append(row)
            if number % 100 == 0:
                done(number)
        return rows

    def refuse_if_mostly_dropped(self) -> None:
        """Raises Invalid if more than 20 % of the rows have no token to learn from within the sequence length."""
        dropped = sum(self.drops.counts.values())
        total = dropped + self.counts.rows
        if dropped > MAX_BAD_SHARE * total:
            raise Invalid(
                f"{dropped} of {total} rows have no supervised token within training.maxSequenceLength {self._limit}; "
                f"{self.drops.first}. Set training.maxSequenceLength to at least {self._needed}."
            )

    def _row(self, record: Record) -> TokenRow | None:
        encoded = self._formatter.encode(record.prompt, record.completion, record.system)
        ids = encoded.prompt + encoded.completion
        labels = list(ids) if self._whole else [IGNORED] * len(encoded.prompt) + encoded.completion
        row = TokenRow(ids[: self._limit], labels[: self._limit], record.document, len(encoded.prompt))
        if row.supervised == 0:
            self._needed = max(self._needed, len(ids))
            self.drops.add("NoSupervisedToken", f"row {record.row}: its prompt has {len(encoded.prompt)} tokens")
            return None
        self.counts.add(row, truncated=len(ids) > self._limit)
        return row
