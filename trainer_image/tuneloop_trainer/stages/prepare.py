"""prepare: from the user's files to tokenised shards, suite snapshots and a data card. Needs no device."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tuneloop_trainer import bases, models
from tuneloop_trainer.chat import Formatter, stop_ids
from tuneloop_trainer.contract import ExitCode, PrepareSummary, Reason, RunConfig, Stage, StageResult, Suite
from tuneloop_trainer.data import curation, schedule
from tuneloop_trainer.data.packing import pack
from tuneloop_trainer.data.records import Record, RowReader, refuse_if_empty
from tuneloop_trainer.data.shards import TokenRow, write_shards
from tuneloop_trainer.data.suites import Item, items_of, labels_of, needs_labels, suites_of, write_items
from tuneloop_trainer.data.tokens import Tokenizing
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.manifests import Metadata, publish, sha256_file, staging
from tuneloop_trainer.progress import ProgressWriter
from tuneloop_trainer.results import RESULT_FILE, write_result
from tuneloop_trainer.shapes import read_shape
from tuneloop_trainer.stages.outputs import run_key, stage_folder, told_again
from tuneloop_trainer.training.arguments import parse_arguments

log = logging.getLogger("tuneloop.prepare")
CARD = "card.json"
SUITES = "suites"


@dataclass
class Gathered:
    """What was read: training records per source, records per Dataset suite, and what was dropped on the way."""

    train: curation.Sources
    suites: dict[str, list[Record]]
    digests: dict[str, str]
    rows_in: int
    drops: Counter[str]


def prepare(config: RunConfig, progress: ProgressWriter) -> StageResult:
    if (result := told_again(config, Stage.PREPARE)) is not None:
        return result
    parse_arguments(config.training.extra_arguments)
    progress.phase("LoadingModel")
    found = bases.prepare_base(config.base, config.paths)
    base = found.folder
    tokenizer = models.load_tokenizer(base, config.base.uri)
    formatter = Formatter(tokenizer, stop_ids(base, tokenizer), config.prompt_format)

    progress.phase("ReadingData")
    gathered = gather(config)
    train, validation = curate(config, gathered)
    with staging(stage_folder(config, Stage.PREPARE)) as folder:
        suites = snapshot_suites(config, gathered, validation, folder / SUITES)
        summary = tokenize(config, formatter, gathered, train, validation, folder, progress)
        progress.phase("HashingModel")
        summary = summary.model_copy(
            update={
                "base_digest": bases.base_digest(base),
                "model": read_shape(base),
                "base_revision": found.revision,
                "suite_digests": suites,
                "prompt_probe_sha256": hashlib.sha256(formatter.probe.encode()).hexdigest(),
            }
        )
        return finish(config, summary, folder)


def gather(config: RunConfig) -> Gathered:
    """Read every source and every Dataset suite."""
    gathered = Gathered([], {}, {}, 0, Counter())
    for index, source in enumerate(config.train):
        reader = RowReader(source, f"data.train[{index}]")
        gathered.train.append(list(reader.records()))
        gathered.digests[source.uri] = reader.reading.digest
        gathered.rows_in += reader.rows
        gathered.drops.update(reader.drops.counts)
    for index, suite in enumerate(config.evaluation.suites):
        if suite.source is not None:
            suite_reader = RowReader(suite.source, f"evaluation.suites[{index}].dataset")
            gathered.suites[suite.name] = list(suite_reader.records())
    return gathered


def curate(config: RunConfig, gathered: Gathered) -> tuple[curation.Sources, list[Record]]:
    """Training records per source, and the validation split."""
    train, drops = gathered.train, gathered.drops
    if config.curation.deduplicate == "Exact":
        train = curation.deduplicate(train, drops)
    if config.curation.decontaminate:
        train = curation.decontaminate(train, [record.content for records in gathered.suites.values() for record in records], drops)
    train, validation = curation.hold_out(train, config.validation_fraction, config.training.seed)
    if config.curation.decontaminate:
        train = curation.decontaminate(train, [record.content for record in validation], drops)
    refuse_if_empty(sum(map(len, train)), gathered.rows_in, drops)
    if config.validation_fraction > 0 and not validation:
        raise Invalid("data.validation holds out whole documents, and the data has one document only. Set the column 'document'.")
    return train, validation


def snapshot_suites(config: RunConfig, gathered: Gathered, validation: list[Record], folder: Path) -> dict[str, str]:
    """Write every suite's items; returns their digests. Raises Invalid for a suite that could not be scored."""
    folder.mkdir()
    digests = {}
    for suite in suites_of(config):
        items = items_of(gathered.suites[suite.name] if suite.source is not None else validation)
        _refuse_unscorable(suite, items)
        digests[suite.name] = write_items(folder, suite, items)
    return digests


def _refuse_unscorable(suite: Suite, items: list[Item]) -> None:
    if not items:
        raise Invalid(f"Suite {suite.name} has no items. Set data.validation, or another source.", Reason.DATA_EMPTY)
    if needs_labels(suite):
        labels_of(suite, items)


def tokenize(
    config: RunConfig,
    formatter: Formatter,
    gathered: Gathered,
    train: curation.Sources,
    validation: list[Record],
    folder: Path,
    progress: ProgressWriter,
) -> PrepareSummary:
    """Write the shards; returns the summary but for model and suites."""
    tokenizing = Tokenizing(config, formatter)
    done = progress.counter("Tokenizing", sum(map(len, train)))
    sources = [tokenizing.rows(records, done) for records in train]
    tokenizing.refuse_if_mostly_dropped()
    gathered.drops.update(tokenizing.drops.counts)
    held = Tokenizing(config, formatter).rows(validation, lambda _: None)
    if config.training.packing:
        sources = [pack(rows, config.training.max_sequence_length) for rows in sources]
    digest = write_shards(folder, "train", (row for rows in sources for row in rows))
    write_shards(folder, "validation", held)
    sizes = [len(rows) for rows in sources]
    training, counts = config.training, tokenizing.counts
    (folder / CARD).write_text(json.dumps(_card(config, gathered, tokenizing, sources), indent=1))
    return PrepareSummary(
        rows_in=gathered.rows_in,
        rows_kept=counts.rows,
        dropped=dict(gathered.drops),
        tokens=counts.tokens,
        supervised_share=round(counts.supervised_share, 6),
        truncated=counts.truncated,
        validation_rows=len(validation),
        max_steps=schedule.total_steps(sum(sizes), training.epochs, training.max_steps, training.global_batch_size),
        base_digest="",
        dataset_digests=gathered.digests,
        shards_digest=digest,
        longest_row=max((len(row.input_ids) for rows in sources for row in rows), default=0),
    )


def _card(config: RunConfig, gathered: Gathered, tokenizing: Tokenizing, sources: list[list[TokenRow]]) -> dict[str, object]:
    """The data card: every count, and where the rows of a shard come from."""
    return {
        "sources": [
            {"uri": source.uri, "weight": source.weight, "sha256": gathered.digests[source.uri], "rows": len(rows)}
            for source, rows in zip(config.train, sources, strict=True)
        ],
        "rows_in": gathered.rows_in,
        "dropped": dict(gathered.drops),
        "first_dropped": tokenizing.drops.first,
        "tokens": asdict(tokenizing.counts),
        "packed": config.training.packing,
    }


def finish(config: RunConfig, summary: PrepareSummary, folder: Path) -> StageResult:
    """Publish the folder with its result inside."""
    target = stage_folder(config, Stage.PREPARE)
    result = StageResult(
        stage=Stage.PREPARE, exit_code=ExitCode.DONE, uri=str(target / CARD), sha256=sha256_file(folder / CARD), prepare=summary
    )
    write_result(folder / RESULT_FILE, result)
    metadata: Metadata = {
        "run_key": run_key(config),
        "base_digest": summary.base_digest,
        "base_revision": summary.base_revision,
        "shards_digest": summary.shards_digest,
    }
    publish(folder, target, "dataset", metadata)
    log.info("kept %d of %d rows, %d tokens, %d steps", summary.rows_kept, summary.rows_in, summary.tokens, summary.max_steps)
    return result
