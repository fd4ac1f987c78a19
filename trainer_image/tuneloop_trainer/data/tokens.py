"""Records to token rows: labels, truncation, and what the data card says about them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter

from tuneloop_trainer.chat import Formatter
from tuneloop_trainer.contract import RunConfig
from tuneloop_trainer.data.parallel import InOrder
from tuneloop_trainer.data.records import MAX_BAD_SHARE, Drops, Record
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.objectives import Objective
from tuneloop_trainer.objectives.objective import Tokens

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
    histogram: list[int] = field(default_factory=lambda: [0] * (len(HISTOGRAM_BOUNDS) + 1))

    def add(self, row: TokenRow, truncated: bool) -> None:
        length = len(row.input_ids)
        self.rows += 1
        self.tokens += length
        self.supervised += row.supervised
        self.truncated += truncated
        self.with_end += not truncated
        self.longest = max(self.longest, length)
        self.histogram[bisect_left(HISTOGRAM_BOUNDS, length)] += 1

    @property
    def supervised_share(self) -> float:
        return self.supervised / self.tokens if self.tokens else 0.0


class Tokenizing:
    """Turns records into rows of at most `max_sequence_length` tokens."""

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        formatter: Formatter,
        done: Callable[[int], None] = lambda _: None,
        see: Callable[[Record, Tokens], None] | None = None,
        workers: int = 1,
    ) -> None:
        self.counts = TokenCounts()
        self.drops = Drops()
        self._tokens = InOrder(partial(objective.tokens, formatter), attrgetter("size"), workers)
        self._limit = config.training.max_sequence_length
        self._needed = 0
        self._done = done
        self._see = see
        self._records = 0

    def rows(self, records: Iterable[Record]) -> Iterator[TokenRow]:
        return self.counted(self._tokens.results(records))

    def counted(self, pairs: Iterable[tuple[Record, Tokens]]) -> Iterator[TokenRow]:
        """The rows of records that are tokenised already."""
        for record, tokens in pairs:
            yield from self._rows(record, tokens)
            self._records += 1
            if self._records % 100 == 0:
                self._done(self._records)

    def refuse_if_mostly_dropped(self) -> None:
        """Raises Invalid if more than 20 % of the rows have no token to learn from within the sequence length."""
        dropped = sum(self.drops.counts.values())
        total = dropped + self.counts.rows
        if dropped > MAX_BAD_SHARE * total:
            raise Invalid(
                f"{dropped} of {total} rows have no supervised token within training.maxSequenceLength {self._limit}; "
                f"{self.drops.first}. Set training.maxSequenceLength to at least {self._needed}."
            )

    def _rows(self, record: Record, tokens: Tokens) -> list[TokenRow]:
        if not tokens.rows:
            self._needed = max(self._needed, tokens.whole)
            self.drops.add("NoSupervisedToken", f"row {record.row}: with its answer it has {tokens.whole} tokens")
        elif self._see is not None:
            self._see(record, tokens)
        for row in tokens.rows:
            self.counts.add(row, truncated=tokens.whole > self._limit)
        return tokens.rows
