"""Turns rows into records: prompt, completion, document. Counts what is dropped, and refuses data that is mostly unusable."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from jinja2 import TemplateError

from tuneloop_trainer.chat import History
from tuneloop_trainer.contract import DataSource, Reason
from tuneloop_trainer.costs import TooCostly
from tuneloop_trainer.data.conversations import Unusable, read_conversation
from tuneloop_trainer.data.fetching import Workspace
from tuneloop_trainer.data.sources import Reading, Row
from tuneloop_trainer.data.templates import MAX_OUTPUT, RowTemplate
from tuneloop_trainer.errors import Invalid

MESSAGES = "messages"
ROLES = ("prompt", "completion", "chosen", "rejected", "desirable", "text", "label", "document", "system", "group", MESSAGES)
YES, NO = frozenset({"true", "1", "yes"}), frozenset({"false", "0", "no"})
MAX_BAD_SHARE = 0.2
MAX_GROUP = 64
"""Characters of a group's name; what is longer is cut."""
_NAMES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Shape:
    """Which of a row's texts a record is made of. Each is rendered by the template of its name, or read from the column of its role."""

    prompt: str | None
    """None: the record has a completion only."""
    completion: str
    rejected: str | None = None
    desirable: str | None = None
    optional: bool = False
    """Whether a row may do without its completion."""
    messages: bool = False
    """Whether a row may be a conversation instead."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.prompt, self.completion, self.rejected, self.desirable) if name is not None)


PROMPTED = Shape("prompt", "completion")
CONVERSED = Shape("prompt", "completion", messages=True)
PREFERRED = Shape("prompt", "chosen", rejected="rejected")
JUDGED = Shape("prompt", "completion", desirable="desirable")
ASKED = Shape("prompt", "completion", optional=True)
LABELLED = Shape("text", "label")
TEXT = Shape(None, "text")


@dataclass(frozen=True, slots=True)
class Record:
    """One example. `content` is what the row says without the template's words: what near-duplicates are looked for by."""

    prompt: str
    completion: str
    document: str
    content: str
    row: int
    system: str | None = None
    user: str | None = None
    """What a user of the served model would send: the template's `text` where that is all it reads (the gateway applies the same
    template), the prompt where there is none; None where a user's message alone cannot be rendered."""
    rejected: str | None = None
    """The answer that the completion is preferred to."""
    desirable: bool | None = None
    """Whether the completion is an answer to give, or one not to give."""
    history: History = None
    """What was said before the prompt, where the row is a conversation."""
    group: str | None = None
    """What the column that the source names says of who wrote the row; no part of what is learned."""

    @property
    def size(self) -> int:
        """Characters that are tokenised."""
        said = sum(len(turn.content) for turn in self.history or ())
        return said + len(self.prompt) + len(self.completion) + len(self.rejected or "")

    @property
    def key(self) -> bytes:
        """Equal for records that differ in white space only."""
        parts = [self.system or "", self.prompt, self.completion]
        parts += [self.rejected] if self.rejected is not None else []
        parts += [str(self.desirable)] if self.desirable is not None else []
        parts += [part for turn in self.history or () for part in (turn.role, turn.content)]
        text = "\0".join(" ".join(part.split()) for part in parts)
        return hashlib.sha256(text.encode()).digest()


@dataclass
class Drops:
    """Rows dropped by reason, and the first bad one for the message."""

    counts: Counter[str] = field(default_factory=Counter)
    first: str = ""
    first_row: int = 0

    def add(self, reason: str, where: str = "", row: int = 0) -> None:
        self.counts[reason] += 1
        if not self.first:
            self.first, self.first_row = where, row


class RowReader:
    """Reads a source into records. `where` is the field of the spec that the user would change, such as data.train[0]."""

    def __init__(self, source: DataSource, where: str, shape: Shape = PROMPTED, work: Workspace | None = None) -> None:
        self.reading = Reading(source, work or Workspace())
        self.drops = Drops()
        self._source = source
        self._where = where
        self._shape = shape
        asked = source.template.model_dump(exclude_none=True) if source.template else {}
        self._converses = MESSAGES in source.columns
        if self._converses and not shape.messages:
            raise Invalid(f"{where}.columns.messages is not read: these rows have {', '.join(shape.names)}.")
        if self._converses and asked:
            raise Invalid(f"{where}.columns.messages names whole conversations, which no template renders. Remove {where}.template.")
        unread = sorted(asked.keys() - set(shape.names))
        if unread:
            raise Invalid(f"{where}.template.{unread[0]} is not read: these rows have {', '.join(shape.names)}.")
        try:
            self._templates = {name: RowTemplate(text) for name, text in asked.items()}
        except TemplateError as error:
            raise Invalid(f"The template of {where} is not valid Jinja: {error}. Set {where}.template.") from error
        except TooCostly as error:
            raise Invalid(f"The template of {where} is refused: {error}. Set {where}.template.") from error
        read = {name for name in shape.names if name not in self._templates}
        # Where the spec names its column or a template for it, the completion is meant to be there.
        self._spared = {shape.completion} & (read - source.columns.keys()) if shape.optional else set()
        self._columns_read = read - self._spared
        for template in self._templates.values():
            self._columns_read |= template.variables
        self._input = self._templates.get(shape.prompt or shape.completion)

    @property
    def rows(self) -> int:
        """That there are, those of other pods included."""
        return self.reading.count

    def records(self) -> Iterator[Record]:
        """Every usable row. Raises Invalid if a needed column is missing or more than 20 % of the rows are unusable."""
        yield from self.own_records()
        refuse_if_mostly_bad(self._source, self._where, self.rows, self.drops)

    def own_records(self) -> Iterator[Record]:
        """As `records`, of this pod's rows; whether too many of all are unusable has to be asked of all pods."""
        checked = False
        for row in self.reading.rows():
            if row.values is not None and not checked:
                self._check_columns(row.values)
                checked = True
            record = self._record(row) if self.reading.takes(row) else None
            if record is not None:
                yield record

    def _check_columns(self, values: dict[str, object]) -> None:
        # Without a word about columns, a row that has no prompt is the conversation that it has.
        silent = self._shape.messages and not self._templates and not self._source.columns.keys() & set(self._shape.names)
        self._converses |= silent and MESSAGES in values and not values.keys() >= set(self._shape.names)
        read = {MESSAGES} if self._converses else self._columns_read
        needed = read | {role for role in self._source.columns if role in ROLES}
        for name in sorted(needed):
            column = self._source.columns.get(name, name)
            if column not in values:
                names = ", ".join(str(key)[:40] for key in list(values)[:_NAMES_SHOWN])
                raise Invalid(f"Dataset {self._source.uri} has no column '{column}'; it has {names}. Set {self._where}.columns.")

    def _record(self, row: Row) -> Record | None:
        if row.values is None:
            return self._drop("Malformed", row, row.problem)
        context = row.values | {role: row.values.get(column) for role, column in self._source.columns.items()}
        if self._converses:
            return self._conversation(row, context)
        needed = [name for name in sorted(self._columns_read) if name in ROLES]
        missing = next((name for name in needed if _text(context.get(name)) is None), None)
        if missing is not None:
            column = self._source.columns.get(missing, missing)
            return self._drop("MissingValue", row, f"column '{column}' has {_shown(context.get(missing))} where text is needed")
        try:
            texts = {name: self._render(name, context) for name in self._shape.names}
        except TemplateError as error:
            return self._drop("Malformed", row, f"the template fails on it: {error}")
        except TooCostly as error:
            raise Invalid(f"The template of {self._where} is refused at row {row.number}: {error}. Set {self._where}.template.") from error
        return self._made(row, context, texts)

    def _conversation(self, row: Row, context: dict[str, object]) -> Record | None:
        try:
            said = read_conversation(context.get(MESSAGES))
        except Unusable as error:
            return self._drop(error.reason, row, f"column '{self._source.columns.get(MESSAGES, MESSAGES)}' has {error}")
        content = "\n".join([*(turn.content for turn in said.history), said.prompt])
        if len(content) + len(said.completion) + len(said.system or "") > MAX_OUTPUT:
            return self._drop("TooLong", row, f"its conversation is longer than {MAX_OUTPUT} characters")
        document = _text(context.get("document")) or _own_document(content)
        user = None if said.history else said.prompt
        history, group = said.history or None, self._group(row)
        return Record(said.prompt, said.completion, document, content, row.number, said.system, user, history=history, group=group)

    def _made(self, row: Row, context: dict[str, object], texts: dict[str, str]) -> Record | None:
        shape = self._shape
        empty = next((name for name, text in texts.items() if not text.strip() and name not in self._spared), None)
        if empty is not None:
            return self._drop("Empty", row, f"its {empty} is empty")
        long = next((name for name, text in texts.items() if len(text) > MAX_OUTPUT), None)
        if long is not None:
            return self._drop("TooLong", row, f"its {long} is longer than {MAX_OUTPUT} characters")
        prompt, completion = texts[shape.prompt] if shape.prompt else "", texts[shape.completion]
        rejected = texts[shape.rejected] if shape.rejected else None
        if rejected is not None and " ".join(rejected.split()) == " ".join(completion.split()):
            return self._drop("EqualAnswers", row, "its chosen and rejected answers are equal")
        judged = texts[shape.desirable].strip().lower() if shape.desirable else None
        if judged is not None and judged not in YES | NO:
            return self._drop("Malformed", row, f"column 'desirable' has {_shown(judged)} where true or false is needed")
        system, document = _text(context.get("system")), _text(context.get("document"))
        read = self._input
        own = prompt or completion
        content = own if read is None else " ".join(_text(context.get(name)) or "" for name in sorted(read.variables)) or own
        user = own if read is None else _text(context.get("text")) if read.variables == {"text"} else None
        desirable = None if judged is None else judged in YES
        document = document or _own_document(content)
        return Record(prompt, completion, document, content, row.number, system, user, rejected, desirable, group=self._group(row))

    def _group(self, row: Row) -> str | None:
        """Read where the source names a column for it alone, so that nobody is divided by a column that happens to have this name."""
        named = (row.values or {}).get(self._source.columns.get("group", ""))
        return " ".join((_text(named) or "").split())[:MAX_GROUP] or None

    def _render(self, name: str, context: dict[str, object]) -> str:
        template = self._templates.get(name)
        return (_text(context.get(name)) or "") if template is None else template.render(context)

    def _drop(self, reason: str, row: Row, problem: str) -> Record | None:
        self.drops.add(reason, f"row {row.number}{f' ({row.file[:60]})' if row.file else ''}: {problem}", row.number)
        return None


def refuse_if_mostly_bad(source: DataSource, where: str, rows: int, drops: Drops) -> None:
    """Raises Invalid."""
    bad = sum(drops.counts.values())
    if bad > MAX_BAD_SHARE * rows:
        raise Invalid(
            f"Dataset {source.uri}: {bad} of {rows} rows cannot be used; {drops.first}. "
            f"Correct the rows, or set {where}.columns or {where}.template."
        )


def refuse_if_empty(records: int, rows: int, drops: Counter[str]) -> None:
    """Raises Invalid where nothing is left to train on."""
    if records == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in drops.most_common())
        raise Invalid(f"No row is left to train on: all {rows} were dropped ({reasons}).", Reason.DATA_EMPTY)


def _text(value: object) -> str | None:
    """A column's value as text; None where it is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return None


def _shown(value: object) -> str:
    """The value for a message: short, and never the whole of a long text."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _own_document(content: str) -> str:
    """Rows without a document id are documents of their own; equal texts are one."""
    return hashlib.sha256(" ".join(content.split()).lower().encode()).hexdigest()[:16]
