"""Rows of a data set on the hub: files of known formats at one commit. Loading scripts are never fetched, let alone run.

What the hub's cache of the machine has (HF_HOME, HF_HUB_CACHE) is read there; with HF_HUB_OFFLINE nothing else is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from tuneloop_trainer import hub
from tuneloop_trainer.contract import Reason, Repository
from tuneloop_trainer.data.fetching import KNOWN, Pace, RemoteFile, refuse_unknown_format
from tuneloop_trainer.data.formats import format_of
from tuneloop_trainer.errors import Invalid, Unavailable
from tuneloop_trainer.stores.credentials import read_key

CHUNK = 1 << 20
TRAINING = re.compile(r"(?:^|[/._-])train(?:ing)?(?:[/._-]|$)")
OTHER_SPLITS = re.compile(r"(?:^|[/._-])(?:valid|validation|val|dev|test|testing|eval|evaluation)(?:[/._-]|$)")
"""As the hub tells the splits of a repository without a description: by words in the names of files and folders."""
_NAMES_SHOWN = 5


class DataFiles:
    """The files of one source. `commits` is shared by the sources of a run: a repository is at one commit for all of them."""

    def __init__(self, asked: Repository, uri: str, commits: dict[tuple[str, str | None], str]) -> None:
        self._asked, self._uri, self._commits = asked, uri, commits
        self._token = read_key(asked.credentials, "token", owner=uri)
        self._about = hub.Asked(uri, "Dataset", asked.revision, Reason.DATA_INVALID)
        self._known: dict[str, Any] = {}  # Any: what the hub's client says of a file
        self._snapshot: Path | None = None

    def files(self) -> list[RemoteFile]:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            self._snapshot = self._cached_snapshot()
            names = [path.relative_to(self._snapshot).as_posix() for path in self._snapshot.rglob("*") if path.is_file()]
            return [RemoteFile(name, None) for name in chosen(names, self._asked.path, self._uri)]
        self._known = self._look_up()
        found = chosen(list(self._known), self._asked.path, self._uri)
        return [RemoteFile(name, None if self._cached(name) else self._known[name].size) for name in found]

    def identity(self, file: RemoteFile) -> str | None:
        if self._snapshot is not None or self._cached(file.name) is not None:
            return None
        return "\0".join((self._token or "", self._asked.name, self._commit, file.name))

    def fetch(self, file: RemoteFile, target: Path, pace: Pace) -> Path:
        if self._snapshot is not None:
            return self._snapshot / file.name
        if (cached := self._cached(file.name)) is not None:
            return cached
        from huggingface_hub import HfApi

        fetch = partial(HfApi(token=self._token).hf_hub_download, self._asked.name, file.name, repo_type="dataset", revision=self._commit)
        path = Path(hub.ask(self._about, partial(fetch, local_dir=target.parent, tqdm_class=_bar(pace))))
        self._verify(path, file.name)
        return path

    @property
    def _commit(self) -> str:
        return self._commits[self._asked.name, self._asked.revision]

    def _look_up(self) -> dict[str, Any]:
        """What there is at the commit, by name."""
        from huggingface_hub import HfApi

        key = (self._asked.name, self._asked.revision)
        revision = self._commits.get(key, self._asked.revision)
        look = partial(HfApi(token=self._token).dataset_info, self._asked.name, revision=revision)
        info = hub.ask(self._about, partial(look, timeout=hub.TIMEOUT_SECONDS, files_metadata=True))
        if info.sha is None or not hub.COMMIT.match(info.sha):
            raise Unavailable(f"The hub does not say which commit {self._uri} is.", Reason.SOURCE_UNAVAILABLE)
        self._commits[key] = info.sha
        return {sibling.rfilename: sibling for sibling in info.siblings or () if _is_inside(sibling.rfilename)}

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self._asked.name, name, revision=self._commit, repo_type="dataset")
        return Path(found) if isinstance(found, str) else None

    def _cached_snapshot(self) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        revision = self._commits.get((self._asked.name, self._asked.revision), self._asked.revision)
        try:
            folder = Path(snapshot_download(self._asked.name, repo_type="dataset", revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError) as error:
            raise Invalid(f"Dataset {self._uri} is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it.") from error
        self._commits[self._asked.name, self._asked.revision] = folder.name
        return folder

    def _verify(self, path: Path, name: str) -> None:
        """Raises Unavailable for what is not what the hub says that it has: by sha256 of large files, by git's own hash of others."""
        known = self._known[name]
        if known.lfs is not None and known.lfs.sha256:
            found, wanted = _hash(path, hashlib.sha256()), known.lfs.sha256
        elif known.blob_id:
            found, wanted = _hash(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size)), known.blob_id
        else:
            return
        if found != wanted:
            raise Unavailable(f"Dataset {self._uri}: {name[-80:]} came otherwise than the hub has it.", Reason.SOURCE_UNAVAILABLE)


def chosen(names: list[str], path: str, uri: str) -> list[str]:
    """Of a repository's files those to read, in order: the one at the path, those that fit it as a pattern, or those of the folder,
    of which the training split where names tell splits apart. Raises Invalid where it is not plain what is meant."""
    path = path.strip("/")
    if path in names:
        refuse_unknown_format(path, uri)
        return [path]
    known = sorted(name for name in names if format_of(name) is not None)
    if "*" in path:
        return [name for name in known if fnmatchcase(name, path) and name.count("/") == path.count("/")]
    inside = [name for name in known if name.startswith(f"{path}/")] if path else known
    if not inside:
        raise Invalid(f"Dataset {uri} has no file that ends in {KNOWN}; loading scripts are not run.", Reason.DATA_EMPTY)
    start = len(path) + 1 if path else 0
    files = [name for name in inside if TRAINING.search(name[start:])]
    if not files:
        other = [name for name in inside if OTHER_SPLITS.search(name[start:])]
        if other:
            raise Invalid(f"Dataset {uri} has no training split; it has {_shown(inside)}. Name one of them in the uri.")
        files = inside
    folders = sorted({str(PurePosixPath(name).parent) for name in files})
    if len(folders) > 1:
        raise Invalid(f"Dataset {uri} has files in {len(folders)} folders: {_shown(folders)}. Name one of them in the uri.")
    return files


def _shown(names: list[str]) -> str:
    more = ", …" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(name[-60:] for name in names[:_NAMES_SHOWN]) + more


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _hash(path: Path, hashed: Any) -> str:  # Any: hashlib's own type is private
    with path.open("rb") as file:
        while content := file.read(CHUNK):
            hashed.update(content)
    return str(hashed.hexdigest())


def _bar(pace: Pace) -> Callable[..., Any]:
    """What the hub's client shows its progress on, as a class of tqdm's: the pace is told instead."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **(settings | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            pace.copied(int(n or 0))
            return None

    return Bar
