"""The part of prepare that reads: evaluation items, and the training rows that are worth keeping, by one pod or out of several's parts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from tuneloop_trainer.contract import RunConfig
from tuneloop_trainer.data import curation, parts
from tuneloop_trainer.data.fetching import Workspace
from tuneloop_trainer.data.records import Record, RowReader, refuse_if_empty, refuse_if_mostly_bad
from tuneloop_trainer.data.suites import MAX_ITEMS
from tuneloop_trainer.errors import Changed, Invalid
from tuneloop_trainer.objectives import Objective
from tuneloop_trainer.progress import ProgressWriter

ROWS_BETWEEN_SIGNS = 1_000
MAX_SUITE_ROWS = 5 * MAX_ITEMS
"""Rows that are read of a suite, equal ones included."""


@dataclass
class SuiteRows:
    """The records of every Dataset suite by its name, and the digests of what they were read from."""

    records: dict[str, list[Record]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def everything(self) -> Iterator[Record]:
        return chain.from_iterable(self.records.values())


@dataclass
class Told:
    """What is told of the sources, beside the rows that are kept of them."""

    digests: dict[str, str] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    rows_in: int = 0
    found: dict[str, dict[str, int]] = field(default_factory=dict)
    """What the filters found, in rows: kinds of personal data, languages, rules of quality."""
    tools: tuple[str, ...] = ()


@dataclass
class Gathered:
    """What was read and is kept: training records per source, the validation split, and records per Dataset suite."""

    train: curation.Sources
    validation: list[Record]
    suites: dict[str, list[Record]]
    drops: Counter[str]
    told: Told
    tokenized: Sequence[Path] = ()
    """Parts that have the tokens of the records."""


def read_suites(config: RunConfig, objective: Objective, work: Workspace) -> SuiteRows:
    """The records of every Dataset suite."""
    suites = SuiteRows()
    for index, suite in enumerate(config.evaluation.suites):
        if suite.source is not None:
            reader = RowReader(suite.source, f"evaluation.suites[{index}].dataset", objective.suite_shape(suite), work)
            suites.records[suite.name] = list(islice(reader.records(), MAX_SUITE_ROWS + 1))
            suites.digests[suite.name] = reader.reading.digest
            if len(suites.records[suite.name]) > MAX_SUITE_ROWS:
                raise Invalid(f"Suite {suite.name} has more than {MAX_SUITE_ROWS} rows; at most {MAX_ITEMS} are scored. Take a sample.")
    return suites


def divide(config: RunConfig, objective: Objective, curating: curation.Curating, suites: SuiteRows, told: Told) -> Gathered:
    """What is kept, once all sources were read: what is trained on, and what is held out. Raises Invalid where either is empty."""
    train, validation = curating.divide(config.validation_fraction)
    refuse_if_empty(sum(map(len, train)), told.rows_in, curating.drops)
    if config.validation_fraction > 0 and not validation:
        raise Invalid("data.validation holds out whole documents, and the data has one document only. Set the column 'document'.")
    return Gathered(train, objective.judged(validation), suites.records, curating.drops, told)


def read_sources(
    config: RunConfig, objective: Objective, curating: curation.Curating, suites: SuiteRows, work: Workspace, progress: ProgressWriter
) -> Told:
    """All rows of all sources, by this pod alone."""
    judging = curation.Judging(config.curation)
    judging.guard(suites.everything())
    told = Told()
    for index, source in enumerate(config.train):
        reader = RowReader(source, f"data.train[{index}]", objective.shape, work)
        curating.add(signalled(reader.records(), progress, reader, told.rows_in), judging)
        _tell(told, source.uri, parts.ReadSource.of(reader))
        curating.drops.update(reader.drops.counts)
    curating.drops.update(judging.filters.drops)
    told.found = {name: dict(counts) for name, counts in judging.filters.details.items()}
    told.tools = tuple(judging.filters.tools)
    return told


def take_parts(
    config: RunConfig,
    curating: curation.Curating,
    suites: SuiteRows,
    folders: Sequence[Path],
    tokenizer: parts.Tokenizer | None,
    progress: ProgressWriter,
) -> Told:
    """What several pods read, in the order of the rows. Raises Changed where they did not read the same."""
    counts = [parts.read_counts(folder) for folder in folders]
    told, found = Told(tools=counts[0].tools), defaultdict[str, Counter[str]](Counter)
    if any(part.suites != suites.digests for part in counts):
        raise _changed("What evaluation.suites is read from")
    if tokenizer is not None and {part.base for part in counts} != {tokenizer.revision}:
        raise _changed(f"Model {config.base.uri}")
    for index, source in enumerate(config.train):
        known = [part for count in counts if (part := count.sources[index]) is not None]
        if len({part.digest for part in known}) != 1:
            raise _changed(f"Dataset {source.uri}")
        drops = parts.drops_of(known)
        refuse_if_mostly_bad(source, f"data.train[{index}]", known[0].rows, drops)
        progress.phase("JoiningParts", percent=round(100 * index / len(config.train), 1))
        curating.take(parts.merged(folders, index))
        _tell(told, source.uri, known[0])
        curating.drops.update(drops.counts)
    for count in counts:
        curating.drops.update(count.drops)
        for name, details in count.details.items():
            found[name].update(details)
    told.found = {name: dict(details) for name, details in found.items()}
    return told


def signalled(records: Iterator[Record], progress: ProgressWriter, reader: RowReader, before: int) -> Iterator[Record]:
    """A source's records; how many rows were read is a sign of life."""
    for number, record in enumerate(records, start=1):
        if number % ROWS_BETWEEN_SIGNS == 0:
            progress.phase("ReadingData", samples=before + reader.rows)
        yield record


def _tell(told: Told, uri: str, source: parts.ReadSource) -> None:
    told.digests[uri] = source.digest
    if source.revision is not None:
        told.revisions[uri] = source.revision
    told.rows_in += source.rows


def _changed(what: str) -> Changed:
    return Changed(f"{what} changed while several pods read it; it is read again.")
