"""What people thought of answers, as rows to learn from: answers found good or bad (KTO), and the better of two (DPO).

Only callers with a key are heard. An answer that was cut off is no example of one, and rows of the gate's half never train.
Raw requests and answers are kept for `retentionDays`: a vote on one that is gone is counted, and teaches nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tuneloop_gateway.contract import ExportRow
from tuneloop_gateway.curation import Curated, Split, document_of, limit_shares, split_of
from tuneloop_gateway.database import Database, captured, feedback

MAX_VOTES = 200_000
"""The newest votes that are looked at."""
WHOLE = "stop"
"""Finish reason of an answer that ended by itself."""

Rows = Literal["Ratings", "Preferences"]


class Opinions:
    """Votes, in the database. Raises Unavailable where that is away."""

    def __init__(self, database: Database, anonymous: str) -> None:
        """`anonymous`: the subject of all who have no key."""
        self._database, self._anonymous = database, anonymous

    async def export(self, rows: Rows, split: Split, epoch: str | None, max_share: float) -> list[ExportRow]:
        """Rows in the order of ids. `epoch` None: all of them."""
        find = _ratings if rows == "Ratings" else _preferences
        async with self._database.begin() as connection:
            found = await find(connection, epoch, self._anonymous)
        kept = [one for one in found if split_of(one.row.document) == split]
        return sorted(limit_shares(kept, 0, max_share), key=lambda row: row.id)


async def _ratings(connection: AsyncConnection, epoch: str | None, anonymous: str) -> list[Curated]:
    query = _votes("rating", epoch, anonymous).add_columns(captured.c.text, captured.c.answer)
    query = query.join(captured, captured.c.id == feedback.c.response_id).where(captured.c.finish_reason == WHOLE, feedback.c.value != 0)
    result = []
    for votes in _grouped((await connection.execute(query)).all(), lambda vote: vote.response_id):
        sign, behind = _verdict([(vote.subject, vote.reviewer, vote.value) for vote in votes])
        if sign:
            first = votes[0]
            row = ExportRow(
                id=first.response_id, document=document_of(first.text), text=first.text, kind="Rating", completion=first.answer,
                desirable=sign > 0,
            )  # fmt: skip
            result.append(Curated(row, behind))
    return result


async def _preferences(connection: AsyncConnection, epoch: str | None, anonymous: str) -> list[Curated]:
    """Pairs of different answers to one text. Whoever prefers the other way round votes against."""
    better, worse = captured.alias("better"), captured.alias("worse")
    query = _votes("preference", epoch, anonymous).add_columns(
        better.c.text, better.c.answer.label("chosen"), worse.c.answer.label("rejected"), worse.c.id.label("other")
    )
    query = query.join(better, better.c.id == feedback.c.response_id).join(worse, worse.c.id == feedback.c.text)
    query = query.where(
        better.c.text == worse.c.text, better.c.answer != worse.c.answer, better.c.finish_reason == WHOLE, worse.c.finish_reason == WHOLE
    )
    result = []
    for votes in _grouped((await connection.execute(query)).all(), lambda vote: tuple(sorted((vote.response_id, vote.other)))):
        first = votes[0]
        sign, behind = _verdict([(v.subject, v.reviewer, 1 if v.response_id == first.response_id else -1) for v in votes])
        if sign:
            chosen, rejected = (first.chosen, first.rejected) if sign > 0 else (first.rejected, first.chosen)
            row = ExportRow(
                id="-".join(sorted((first.response_id, first.other))), document=document_of(first.text), text=first.text,
                kind="Preference", chosen=chosen, rejected=rejected,
            )  # fmt: skip
            result.append(Curated(row, behind))
    return result


def _votes(kind: str, epoch: str | None, anonymous: str) -> Select[Any]:
    query = select(feedback.c.response_id, feedback.c.subject, feedback.c.reviewer, feedback.c.value)
    query = query.where(feedback.c.kind == kind, feedback.c.subject != anonymous)
    query = query.order_by(feedback.c.updated_at.desc(), feedback.c.response_id, feedback.c.subject).limit(MAX_VOTES)
    return query if epoch is None else query.where(feedback.c.epoch == epoch)


def _grouped(votes: Iterable[Any], key: Callable[[Any], Hashable]) -> Iterable[list[Any]]:
    groups: dict[Hashable, list[Any]] = defaultdict(list)
    for vote in votes:
        groups[key(vote)].append(vote)
    return groups.values()


def _verdict(votes: Sequence[tuple[str, bool, int]]) -> tuple[int, frozenset[str]]:
    """The sign of the sum, and who stands behind it (nobody: a reviewer). Where reviewers voted, they alone decide."""
    reviewers = [value for _, reviewer, value in votes if reviewer]
    total = sum(reviewers) if reviewers else sum(value for _, _, value in votes)
    sign = (total > 0) - (total < 0)
    behind = () if reviewers else (subject for subject, _, value in votes if value * sign > 0)
    return sign, frozenset(behind)
