"""The hub: which commit a revision is, and a snapshot of a model. What it refuses is named; while it is down, it is asked a few times."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TypeVar

from tuneloop_trainer.contract import Base, Reason
from tuneloop_trainer.errors import Invalid, Unavailable

log = logging.getLogger("tuneloop.hub")
COMMIT = re.compile(r"^[0-9a-f]{40}$")
TIMEOUT_SECONDS = 20.0
DELAYS = (2.0, 5.0, 15.0, 30.0)
"""Seconds between attempts; after the last one the stage ends, and the operator decides when to try again."""
DENIED = (401, 403)
TRY_AGAIN = (408, 429)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for, for messages: `kind` is Model or Dataset, `missing` the reason where there is no such one."""

    uri: str
    kind: str
    revision: str | None
    missing: Reason


def resolve(base: Base) -> str:
    """The commit that the base's revision is now (absent: the default branch). Raises Invalid or Unavailable."""
    if base.revision is not None and COMMIT.match(base.revision):
        return base.revision
    return _look_up(base, base.revision)[0]


def download(base: Base, commit: str, folder: Path, patterns: Iterable[str]) -> None:
    """Fetch the files of the repository's top folder that match. Raises Invalid or Unavailable.

    File by file: the client's own download of a snapshot takes the empty folder for the snapshot when the hub does not answer.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    patterns = tuple(patterns)
    for name in _look_up(base, commit)[1]:
        if "/" not in name and any(fnmatch(name, pattern) for pattern in patterns):
            fetch = partial(api.hf_hub_download, base.repository or "", name, revision=commit, local_dir=folder)
            ask(_asked(base), fetch)
    # The hub's client keeps notes below a local folder; they are no part of the model.
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _look_up(base: Base, revision: str | None) -> tuple[str, list[str]]:
    """(commit, names of its files)"""
    from huggingface_hub import HfApi

    info = ask(_asked(base), lambda: HfApi().model_info(base.repository or "", revision=revision, timeout=TIMEOUT_SECONDS))
    if info.sha is None or not COMMIT.match(info.sha):
        raise Unavailable(f"The hub does not say which commit {base.uri} is.", Reason.SOURCE_UNAVAILABLE)
    return info.sha, [sibling.rfilename for sibling in info.siblings or ()]


def _asked(base: Base) -> Asked:
    return Asked(base.uri, "Model", base.revision, Reason.MODEL_NOT_FOUND)


def ask(asked: Asked, call: Callable[[], T]) -> T:
    """What the hub answers, asked a few times. Raises Invalid or Unavailable."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HFValidationError

    for delay in (*DELAYS, None):
        try:
            return call()
        except HFValidationError as error:
            raise Invalid(f"{asked.uri} names no repository of the hub.", asked.missing) from error
        except (OSError, TransportError) as error:
            if (refused := _refusal(asked, error)) is not None:
                raise refused from error
            if not _is_transient(error):
                raise
            if delay is None:
                raise Unavailable(f"The hub does not answer for {asked.uri}: {_kind(error)}.", Reason.SOURCE_UNAVAILABLE) from error
            log.warning("the hub does not answer (%s); again in %.0f s", _kind(error), delay)
            time.sleep(delay)
    raise AssertionError("the last attempt returns or raises")


def _refusal(asked: Asked, error: Exception) -> Invalid | None:
    """What the hub says no to."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = _status(error)
    if isinstance(error, GatedRepoError):
        return Invalid(f"{asked.kind} {asked.uri} is gated: the token may not read it.", Reason.ACCESS_DENIED)
    if status in DENIED:
        # The hub answers 401 for what does not exist too, to whoever may not know.
        return Invalid(f"{asked.kind} {asked.uri} may not be read with this token, or does not exist.", Reason.ACCESS_DENIED)
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)) or status == 404:
        return Invalid(f"{asked.kind} {asked.uri} does not exist at revision {asked.revision or 'main'}.", asked.missing)
    return None


def _is_transient(error: Exception) -> bool:
    """Whether asking again may help: no connection, no answer in time, or an error of the server's own; not a full disk."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    status = _status(error)
    if status is not None:
        return status >= 500 or status in TRY_AGAIN
    is_of_disk = isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError, LocalEntryNotFoundError))
    return not is_of_disk


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error, or what caused it, carries."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__
    return None


def _kind(error: Exception) -> str:
    status = _status(error)
    return f"HTTP status {status}" if status is not None else type(error.__cause__ or error).__name__
