"""Feedback and labels: taken in once per subject, curated into training and gate rows, exported with safeguards."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tuneloop_gateway.canonical import normalise
from tuneloop_gateway.contract import CapturedRow, ExportRow, FeedbackReport, LabelReceipt, LabelRow
from tuneloop_gateway.database import Database, captured, corrections, feedback, insert_unless_there, labels, upsert
from tuneloop_gateway.drift.process import rfc3339

AGREEMENT = 2
"""Subjects that must give the same correction where none of them is a reviewer."""
CHUNK = 500

Split = Literal["train", "gate"]
Kind = Literal["rating", "preference", "correction"]


@dataclass(frozen=True)
class Vote:
    """One piece of feedback on one response."""

    response_id: str
    subject: str
    reviewer: bool
    kind: Kind
    value: int
    """1 up, -1 down, 0 neither."""
    text: str | None = None


def document_of(text: str) -> str:
    """The document of a text that belongs to none: its own hash."""
    return "text-" + hashlib.sha256(normalise(text).lower().encode()).hexdigest()[:24]


def split_of(document: str) -> Split:
    """Half to train, half to gate, the same in every process and for ever."""
    return "train" if hashlib.sha256(b"split:" + document.encode()).digest()[0] % 2 == 0 else "gate"


@dataclass(frozen=True)
class Asked:
    """Of one captured request."""

    revision: str
    at: float


class NotCaptured(Exception):
    """What was asked is not stored, or not yet."""


class Curation:
    """What people said, in the database. Every method raises Unavailable where that is away."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._report, self._report_key, self._report_at = FeedbackReport(), "", 0.0

    async def add_vote(self, vote: Vote, epoch: str) -> bool:
        """Stores one vote; the same subject's later vote on the response replaces it. True where it is the first.

        Raises NotCaptured, and stores nothing, for a correction of a response whose request is not stored.
        """
        now = time.time()
        async with self._database.begin() as connection:
            row = {
                "response_id": vote.response_id, "subject": vote.subject, "kind": vote.kind, "value": vote.value,
                "text": None if vote.kind == "correction" else vote.text, "reviewer": vote.reviewer, "epoch": epoch, "updated_at": now,
            }  # fmt: skip
            # Which of two replicas is the first is for the database to say.
            is_first = (await connection.execute(insert_unless_there(connection, feedback), row)).rowcount == 1
            if not is_first:
                await connection.execute(upsert(connection, feedback), row)
            if vote.kind == "correction" and vote.text is not None:
                await self._add_correction(connection, vote, vote.text, epoch, now)
        self._report_key = ""
        return is_first

    async def asked(self, response_id: str) -> Asked | None:
        """Which revision answered, and when it was asked; None where that is not stored, or not yet."""
        columns = select(captured.c.revision, captured.c.captured_at).where(captured.c.id == response_id)
        async with self._database.begin() as connection:
            row = (await connection.execute(columns)).first()
        return Asked(row.revision, row.captured_at) if row is not None else None

    async def _add_correction(self, connection: AsyncConnection, vote: Vote, correction: str, epoch: str, now: float) -> None:
        """Keeps the input beside the correction, so that it outlives the raw row."""
        asked = await _asked(connection, [vote.response_id])
        if vote.response_id not in asked:
            raise NotCaptured
        text, asked_by = asked[vote.response_id]
        document = document_of(text)
        row = {
            "response_id": vote.response_id, "subject": vote.subject, "document": document, "text": text, "correction": correction,
            "reviewer": vote.reviewer, "split": split_of(document), "epoch": epoch, "updated_at": now, "asked_by": asked_by,
        }  # fmt: skip
        await connection.execute(upsert(connection, corrections), row)

    async def add_labels(self, rows: Sequence[LabelRow], epoch: str) -> LabelReceipt:
        """Stores reviewers' labels of captured rows; a later label of the same id replaces the earlier."""
        latest = {row.id: row for row in rows}
        splits: Counter[str] = Counter()
        now = time.time()
        async with self._database.begin() as connection:
            for ids in _chunks(list(latest), CHUNK):
                texts = await _asked(connection, ids)
                stored = []
                for id_, (text, asked_by) in texts.items():
                    document = latest[id_].document or document_of(text)
                    split = split_of(document)
                    splits[split] += 1
                    stored.append(
                        {
                            "id": id_, "document": document, "text": text, "label": latest[id_].label,
                            "split": split, "epoch": epoch, "updated_at": now, "asked_by": asked_by,
                        }
                    )  # fmt: skip
                if stored:
                    await connection.execute(upsert(connection, labels), stored)
        self._report_key = ""
        accepted = splits.total()
        return LabelReceipt(accepted=accepted, unknown=len(latest) - accepted, train=splits["train"], gate=splits["gate"])

    async def sample(self, limit: int, since: float, *, uniform: bool) -> list[CapturedRow]:
        """Captured rows that nobody labelled yet: drawn uniformly, or the newest."""
        order: Any = func.random() if uniform else captured.c.captured_at.desc()
        labelled = select(labels.c.id)
        query = select(captured).where(captured.c.captured_at >= since, captured.c.id.not_in(labelled)).order_by(order).limit(limit)
        async with self._database.begin() as connection:
            rows = (await connection.execute(query)).all()
        return [CapturedRow(id=r.id, text=r.text, answer=r.answer, captured_at=rfc3339(r.captured_at)) for r in rows]

    async def export(self, split: Split, epoch: str | None, max_share: float) -> list[ExportRow]:
        """Curated rows by id. A gate is judged by reviewers' labels alone; corrections train only. `epoch` None: all of them."""
        async with self._database.begin() as connection:
            labelled = (await connection.execute(_of(select(labels).where(labels.c.split == split), labels, epoch))).all()
            said: Sequence[Any] = ()
            if split == "train":
                said = (await connection.execute(_of(select(corrections).where(corrections.c.split == split), corrections, epoch))).all()
        rows = {r.id: ExportRow(id=r.id, document=r.document, text=r.text, label=r.label, kind="Label") for r in labelled}
        agreed = [c for c in curate_corrections(said) if c.row.id not in rows]
        for curated in limit_shares(agreed, len(rows), max_share):
            rows[curated.id] = curated
        return [rows[id_] for id_ in sorted(rows)]

    async def report(self, epoch: str, max_share: float) -> FeedbackReport:
        """Counts, from the database at most every five seconds unless something was said here."""
        now, key = time.monotonic(), f"{epoch}/{max_share}"
        if key == self._report_key and now - self._report_at < 5:
            return self._report
        async with self._database.begin() as connection:
            grouped = select(feedback.c.kind, feedback.c.value, func.count()).group_by(feedback.c.kind, feedback.c.value)
            counts = {(kind, value): n for kind, value, n in await connection.execute(grouped)}
        train, gate = [len(await self.export(split, epoch, max_share)) for split in ("train", "gate")]
        self._report = FeedbackReport(
            up=counts.get(("rating", 1), 0),
            down=counts.get(("rating", -1), 0),
            corrections=sum(n for (kind, _), n in counts.items() if kind == "correction"),
            labelled_train=train,
            labelled_gate=gate,
        )
        self._report_key, self._report_at = key, now
        return self._report

    @property
    def last_report(self) -> FeedbackReport:
        """The counts as they were last read."""
        return self._report


@dataclass(frozen=True)
class Curated:
    """A correction that may be learnt from, and who stands behind it (nobody: a reviewer)."""

    row: ExportRow
    subjects: frozenset[str]


def curate_corrections(said: Iterable[Any]) -> list[Curated]:
    """Corrections by a reviewer (the latest counts), and those that enough subjects give alike for the same input."""
    by_document: dict[str, list[Any]] = defaultdict(list)
    for row in said:
        by_document[row.document].append(row)
    result = []
    for document, rows in by_document.items():
        rows.sort(key=lambda r: (r.updated_at, r.response_id, r.subject))
        by_reviewers = [r for r in rows if r.reviewer]
        if by_reviewers:
            last = by_reviewers[-1]
            result.append(Curated(_export(last, document), frozenset()))
            continue
        behind: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            behind[normalise(row.correction)].add(row.subject)
        best = max(behind, key=lambda c: (len(behind[c]), c))
        if len(behind[best]) >= AGREEMENT:
            first = next(r for r in rows if normalise(r.correction) == best)
            result.append(Curated(_export(first, document), frozenset(behind[best])))
    return result


def _export(row: Any, document: str) -> ExportRow:
    return ExportRow(id=row.response_id, document=document, text=row.text, label=row.correction, kind="Correction")


def limit_shares(rows: Sequence[Curated], others: int, max_share: float) -> list[ExportRow]:
    """Rows such that no subject stands behind more than its share of all (at least one); reviewers are not limited."""
    limit = max(1, int(max_share * (len(rows) + others)))
    behind: Counter[str] = Counter()
    kept = []
    for curated in sorted(rows, key=lambda c: c.row.id):
        if all(behind[s] < limit for s in curated.subjects):
            behind.update(curated.subjects)
            kept.append(curated.row)
    return kept


def _of(query: Select[Any], table: Any, epoch: str | None) -> Select[Any]:
    return query if epoch is None else query.where(table.c.epoch == epoch)


async def _asked(connection: AsyncConnection, ids: list[str]) -> dict[str, tuple[str, str | None]]:
    """Text and subject by id."""
    rows = await connection.execute(select(captured.c.id, captured.c.text, captured.c.subject).where(captured.c.id.in_(ids)))
    asked: dict[str, tuple[str, str | None]] = {row.id: (row.text, row.subject) for row in rows}
    missing = [i for i in ids if i not in asked]
    if missing:  # past raw retention, but labelled before
        rows = await connection.execute(select(labels.c.id, labels.c.text, labels.c.asked_by).where(labels.c.id.in_(missing)))
        asked.update({row.id: (row.text, row.asked_by) for row in rows})
    return asked


def _chunks(items: list[str], size: int) -> Iterable[list[str]]:
    return (items[i : i + size] for i in range(0, len(items), size))
