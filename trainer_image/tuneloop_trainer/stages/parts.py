"""The parts that several pods make of one set: each pod makes its own, and the first one waits for all of them and goes on alone.

A part is published as every stage's output is, so that a pod that starts again finds its own, and a part of another configuration is not
taken. They lie beside the stage's folder until it is published.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tuneloop_trainer.bases import Prepared
from tuneloop_trainer.chat import Formatter
from tuneloop_trainer.contract import Reason, RunConfig, Stage
from tuneloop_trainer.data import curation, parts
from tuneloop_trainer.data.fetching import Workspace
from tuneloop_trainer.data.formats import Share
from tuneloop_trainer.data.records import RowReader
from tuneloop_trainer.data.shelves import Shelf
from tuneloop_trainer.data.sources import files_of
from tuneloop_trainer.errors import Mismatch, Unavailable
from tuneloop_trainer.hardware import cpu_threads
from tuneloop_trainer.manifests import Metadata, publish, read_manifest, sha256_file, staging, verify
from tuneloop_trainer.objectives import Objective
from tuneloop_trainer.progress import ProgressWriter
from tuneloop_trainer.stages.gathering import read_suites, signalled
from tuneloop_trainer.stages.outputs import run_key, stage_folder

log = logging.getLogger("tuneloop.prepare")
FOLDER = "prepare-parts"
LOOK_EVERY_SECONDS = 2.0


def shelf_of(config: RunConfig) -> Shelf:
    """Of the store, beside the base models that its runs share."""
    return Shelf(Path(config.paths.cache) / "rows")


def part_folder(config: RunConfig, share: Share) -> Path:
    return stage_folder(config, Stage.PREPARE).with_name(FOLDER) / f"{share.number}-of-{share.of}"


def early_tokenizer(config: RunConfig, objective: Objective, found: Prepared | None, formatter: Formatter | None) -> parts.Tokenizer | None:
    """What each pod tokenises its rows with; None where that waits for what is learned of all rows: new words, labels, a plug-in's."""
    waits = config.scratch is not None or config.vocabulary is not None or config.objective == "Custom" or objective.tokens_need_all
    if found is None or formatter is None or waits:
        return None
    revision = found.revision or _tokenizer_digest(found.folder)
    return parts.Tokenizer(partial(objective.tokens, formatter), cpu_threads(config.threads), revision)


def make_part(config: RunConfig, objective: Objective, tokenizer: parts.Tokenizer | None, share: Share, progress: ProgressWriter) -> None:
    """Read this pod's rows and publish what they came to; nothing, where that was done before."""
    target = part_folder(config, share)
    key = _key(config) | {"inputs": _inputs(config, tokenizer)}
    if _is_made(target, key) and _verifies(target):
        return
    progress.phase("ReadingData")
    with staging(target) as folder:
        beside = folder.with_name(f"{folder.name}-fetched")
        try:
            _write(config, objective, tokenizer, share, folder, beside, progress)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        publish(folder, target, "dataset", key)
    log.info("part %d of %d is made", share.number + 1, share.of)


def all_parts(config: RunConfig, share: Share, progress: ProgressWriter, pause: Callable[[float], None] = time.sleep) -> list[Path]:
    """The parts of all pods, as soon as they are there. Raises Unavailable for one that is not what its manifest says."""
    folders = [part_folder(config, Share(number, share.of)) for number in range(share.of)]
    for number, folder in enumerate(folders):
        while not _is_made(folder, _key(config)):
            progress.phase("WaitingForParts", percent=round(100 * number / share.of, 1))
            pause(LOOK_EVERY_SECONDS)
        if not _verifies(folder):
            shutil.rmtree(folder, ignore_errors=True)
            raise Unavailable(f"Part {number + 1} of the rows is damaged; it is made again.", Reason.STORE_UNAVAILABLE)
    return folders


def discard_parts(config: RunConfig) -> None:
    """Once they were used, or what they were made of has to change. What a pod is still writing stays."""
    for folder in stage_folder(config, Stage.PREPARE).with_name(FOLDER).glob("[0-9]*-of-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    config: RunConfig,
    objective: Objective,
    tokenizer: parts.Tokenizer | None,
    share: Share,
    folder: Path,
    beside: Path,
    progress: ProgressWriter,
) -> None:
    work = Workspace(beside, lambda percent: progress.phase("Fetching", percent=percent), shelf=shelf_of(config))
    suites = read_suites(config, objective, work)
    judging = curation.Judging(config.curation)
    judging.guard(suites.everything())
    work.share = share
    read: list[parts.ReadSource | None] = []
    before = 0
    for index, source in enumerate(config.train):
        if source.feedback is not None and share.number > 0:
            read.append(None)
            parts.write_source(folder, index, [], None)
            continue
        reader = RowReader(source, f"data.train[{index}]", objective.shape, work)
        records = signalled(reader.own_records(), progress, reader, before)
        parts.write_source(folder, index, judging.judged(records), tokenizer)
        read.append(parts.ReadSource.of(reader))
        before += reader.rows
    parts.write_counts(
        folder, parts.Counts.of(read, suites.digests, judging.filters, tokenizer.revision if tokenizer is not None else None)
    )


def _key(config: RunConfig) -> Metadata:
    """Parts are no output that a later release has to read: one of another image is made anew."""
    return {"run_key": run_key(config), "image": config.image}


def _inputs(config: RunConfig, tokenizer: parts.Tokenizer | None) -> str:
    """What lies on claims may be replaced after pods were killed: an own part of what was there before is made anew. That all pods read
    the same is asked of what they read."""
    files = [file for source in config.train if source.path is not None for file in files_of(Path(source.path), source.uri)]
    state = [(str(file), stat.st_size, stat.st_mtime_ns) for file in files if (stat := file.stat())]
    return _digest([state, tokenizer.revision if tokenizer is not None else None])


def _tokenizer_digest(folder: Path) -> str:
    """Of a base on a claim, which has no commit: all of its files but the weights."""
    suffixes = (".json", ".jinja", ".txt", ".model", ".tiktoken")
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
    return _digest([(path.name, sha256_file(path)) for path in files])


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _is_made(folder: Path, key: Metadata) -> bool:
    """Whether there is a part of this key; its files are not looked at."""
    try:
        return read_manifest(folder).metadata.items() >= key.items()
    except Mismatch:
        return False


def _verifies(folder: Path) -> bool:
    try:
        verify(folder)
    except Mismatch:
        return False
    return True
