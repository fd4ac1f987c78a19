"""Reads the rows of a source: files of a claim, a bucket or the hub, or a gateway's export. Everything read is bounded and hashed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tuneloop_trainer.contract import DataSource, Reason
from tuneloop_trainer.data.exports import open_export
from tuneloop_trainer.data.fetching import KNOWN, MAX_FILES, Remote, Workspace, fetched, refuse_unknown_format
from tuneloop_trainer.data.formats import ALONE, Intake, Values, format_of, read_file, read_json_lines
from tuneloop_trainer.errors import Invalid, StageError

MAX_ROWS = 20_000_000
"""That a pod takes of a source."""
VOLUMES = Path("/volumes")
"""Claims are mounted below it, each in a folder of its name."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its number in the source, from 1, and its columns. `values` is None where it could not be parsed."""

    number: int
    values: dict[str, object] | None
    problem: str = ""
    file: str = ""
    """Name of its file where the source is a folder."""


@dataclass
class Reading:
    """A source while it is read: iterate over `rows()` once, then `digest` is the sha256 of all bytes read."""

    source: DataSource
    work: Workspace = field(default_factory=Workspace)
    _intake: Intake = field(init=False)

    def __post_init__(self) -> None:
        # What people say meanwhile comes into one export and not into another: one pod reads it.
        self._intake = Intake(self.source.uri, ALONE if self.source.feedback is not None else self.work.share)

    @property
    def count(self) -> int:
        """Rows that there are, so far."""
        return self._intake.rows

    def takes(self, row: Row) -> bool:
        """Whether the row is this pod's; it is shown the first one whose columns can be told, whoever's it is."""
        return self._intake.share.takes(row.number)

    @property
    def digest(self) -> str:
        return str(self._intake.hash.hexdigest())

    @property
    def revision(self) -> str | None:
        """The commit that was read, of a source on the hub."""
        asked = self.source.repository
        return None if asked is None else self.work.commits.get((asked.name, asked.revision))

    def rows(self) -> Iterator[Row]:
        intake = self._intake
        most = MAX_ROWS * intake.share.of
        for file, values in self._values():
            intake.rows += 1
            if intake.rows > most:
                raise Invalid(f"Dataset {self.source.uri} has more than {most} rows. Split it, take a sample, or raise data.workers.")
            if not intake.wants(intake.rows):
                continue
            intake.has_begun = intake.has_begun or isinstance(values, dict)
            yield Row(intake.rows, values, file=file) if isinstance(values, dict) else Row(intake.rows, None, values, file)
        feedback = self.source.feedback
        if intake.rows == 0 and (feedback is None or feedback.epoch is None):  # rows of an epoch that is over go with their time
            raise Invalid(f"Dataset {self.source.uri} is empty: it has no rows.", Reason.DATA_EMPTY)

    def _values(self) -> Iterator[tuple[str, Values]]:
        if self.source.feedback is not None:
            with open_export(self.source.feedback, self.source.uri) as response:
                for values in read_json_lines(response, self._intake):
                    yield "", values
                if response.length:
                    raise StageError(f"The export {self.source.uri} broke off {response.length} bytes before its end.")
            return
        remote = remote_of(self.source, self.work)
        if remote is not None:
            for name, path in fetched(remote, self.source.uri, self.work):
                for values in read_file(path, self._intake):
                    yield name, values
            return
        files = files_of(Path(self.source.path or ""), self.source.uri)
        for path in files:
            for values in read_file(path, self._intake):
                yield path.name if len(files) > 1 else "", values


def remote_of(source: DataSource, work: Workspace) -> Remote | None:
    """Where the source's files are fetched from; None for one that lies on a claim."""
    if source.bucket is not None:
        from tuneloop_trainer.data.objects import Objects

        return Objects(source.bucket, source.uri)
    if source.repository is not None:
        from tuneloop_trainer.data.repositories import DataFiles

        return DataFiles(source.repository, source.uri, work.commits)
    return None


def files_of(path: Path, uri: str) -> list[Path]:
    """The file itself, or a folder's files of a known format in the order of their names. Raises Invalid for what leads elsewhere."""
    if ".." in path.parts:
        raise Invalid(f"Dataset {uri} has '..' in its path. Name the file or folder itself.")
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if format_of(entry.name) is not None and not entry.is_dir())
        if not entries:
            raise Invalid(f"Dataset {uri} is a folder without a file that ends in {KNOWN}.", Reason.DATA_EMPTY)
        if len(entries) > MAX_FILES:
            raise Invalid(f"Dataset {uri} is a folder of {len(entries)} files; at most {MAX_FILES} are read. Join them.")
    else:
        entries = [path]
    root = root_of(path)
    for entry in entries:
        if not entry.resolve().is_relative_to(root):
            raise Invalid(f"Dataset {uri}: {entry.name} is a link that leads outside its claim. Copy the file.")
        if not entry.exists():
            raise Invalid(f"Dataset {uri} does not exist." if entry == path else f"Dataset {uri}: {entry.name} is a link to nowhere.")
        if not entry.is_file():
            raise Invalid(f"Dataset {uri}: {entry.name} is no regular file.")
        refuse_unknown_format(entry.name, uri)
    return entries


def root_of(path: Path) -> Path:
    """Links may lead within the claim (as in the hub's cache); outside of a claim, within the source's own folder."""
    if path.is_relative_to(VOLUMES) and len(path.parts) > len(VOLUMES.parts):
        return VOLUMES.joinpath(path.parts[len(VOLUMES.parts)]).resolve()
    return (path.parent.resolve() / path.name) if path.is_dir() else path.parent.resolve()
