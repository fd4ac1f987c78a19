"""prepare: from the user's files to tokenised shards, suite snapshots and a data card. Needs no device."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from tuneloop_trainer import bases, models
from tuneloop_trainer.chat import Formatter
from tuneloop_trainer.contract import PROBE_TEXT, ExitCode, PrepareSummary, Reason, RunConfig, Stage, StageResult, Suite, tokens_digest
from tuneloop_trainer.costs import TooCostly, bounded
from tuneloop_trainer.data import curation, page, schedule
from tuneloop_trainer.data.fetching import Workspace
from tuneloop_trainer.data.formats import ALONE, Share
from tuneloop_trainer.data.packing import pack_stream
from tuneloop_trainer.data.parallel import processes
from tuneloop_trainer.data.parts import Tokenizer, with_tokens
from tuneloop_trainer.data.preflight import MAX_SHOWN, Preflight, read_vocabulary
from tuneloop_trainer.data.records import Record
from tuneloop_trainer.data.reference import write_reference
from tuneloop_trainer.data.samples import Samples
from tuneloop_trainer.data.shards import TokenRow, write_shards
from tuneloop_trainer.data.suites import MAX_ITEMS, Item, items_of, labels_of, needs_labels, suites_of, write_items
from tuneloop_trainer.data.templates import served_prompt
from tuneloop_trainer.data.tokens import TokenCounts, Tokenizing
from tuneloop_trainer.errors import Changed, Invalid
from tuneloop_trainer.hardware import peak_resident_bytes
from tuneloop_trainer.manifests import Metadata, publish, sha256_file, staging
from tuneloop_trainer.objectives import Objective, objective_of
from tuneloop_trainer.objectives.objective import Tokens
from tuneloop_trainer.progress import ProgressWriter
from tuneloop_trainer.results import RESULT_FILE, write_result
from tuneloop_trainer.scratch import read_shape as read_shape_without_weights
from tuneloop_trainer.scratch import write_base
from tuneloop_trainer.shapes import read_shape
from tuneloop_trainer.stages.gathering import Gathered, divide, read_sources, read_suites, take_parts
from tuneloop_trainer.stages.outputs import run_key, stage_folder, told_again
from tuneloop_trainer.stages.parts import all_parts, discard_parts, early_tokenizer, make_part, shelf_of
from tuneloop_trainer.stages.vocabulary import Extended, describe, extend_vocabulary
from tuneloop_trainer.training.arguments import read_arguments

log = logging.getLogger("tuneloop.prepare")
CARD, PAGE = "card.json", "card.html"
SUITES = "suites"


@dataclass(frozen=True)
class Start:
    """What a run begins with, in each of its pods."""

    found: bases.Prepared | None
    objective: Objective
    tokenizer: Tokenizer | None
    """Where several pods may tokenise their rows."""


@dataclass
class Observed:
    """What is noted of the records while they are tokenised."""

    preflight: Preflight
    samples: Samples
    tokenizer: models.Tokenizer
    extended: Extended | None

    def see(self, record: Record, tokens: Tokens) -> None:
        self.preflight.see(record, tokens.rows, tokens.whole)
        self.samples.offer(record.key, record.row, tokens.rows[0])


def prepare(config: RunConfig, progress: ProgressWriter, share: Share = ALONE) -> StageResult:
    """`share` is this pod's among several: the others make parts of the rows, the first one makes its own and then the output of all."""
    result = told_again(config, Stage.PREPARE)
    if result is None:
        try:
            read_arguments(config)
            start = _begin(config, progress)
            if share.number > 0:
                make_part(config, start.objective, start.tokenizer, share, progress)
                return StageResult(stage=Stage.PREPARE, exit_code=ExitCode.DONE, message=f"Part {share.number + 1} is made.")
            result = _prepare(config, start, share, progress)
        except (Invalid, Changed):
            discard_parts(config)  # what was read has to change, or has changed
            raise
    if share.number == 0:
        discard_parts(config)
    return result


def _begin(config: RunConfig, progress: ProgressWriter) -> Start:
    """What cannot be used of the base is told before any row is read."""
    progress.phase("DownloadingModel")
    found = (bases.prepare_base if config.scratch is None else bases.prepare_tokenizer)(config.base, config.paths)
    progress.phase("LoadingModel")
    objective, formatter = objective_of(config), None
    if config.scratch is None and found is not None:
        formatter = objective.formatter(found.folder, models.load_tokenizer(found.folder, config.base.uri))
        _refuse_endless(formatter, config.base.uri)
    return Start(found, objective, early_tokenizer(config, objective, found, formatter))


def _prepare(config: RunConfig, start: Start, share: Share, progress: ProgressWriter) -> StageResult:
    found, objective = start.found, start.objective
    started = time.monotonic()
    if share.of > 1:
        make_part(config, objective, start.tokenizer, share, progress)
        folders = all_parts(config, share, progress)
    progress.phase("ReadingData")
    with staging(stage_folder(config, Stage.PREPARE)) as folder, scratch(folder) as spool:
        curating = curation.Curating(config.curation, spool, config.training.seed, MAX_ITEMS)
        with closing(curating):
            work = Workspace(spool / "fetched", lambda percent: progress.phase("Fetching", percent=percent), shelf=shelf_of(config))
            items = read_suites(config, objective, work)
            if share.of > 1:
                told = take_parts(config, curating, items, folders, start.tokenizer, progress)
            else:
                told = read_sources(config, objective, curating, items, work, progress)
            gathered = divide(config, objective, curating, items, told)
            if share.of > 1 and start.tokenizer is not None:
                gathered.tokenized = folders
            objective.look_at(gathered.train, [*gathered.validation, *chain.from_iterable(gathered.suites.values())])
            suites = snapshot_suites(config, gathered, folder / SUITES)
            base = found.folder if found is not None else folder / bases.OWN
            if config.scratch is not None:
                progress.phase("MakingTokenizer")
                write_base(config, config.scratch, found.folder if found is not None else None, gathered.train, folder / bases.OWN)
                base = folder / bases.OWN
            tokenizer = models.load_tokenizer(base, config.base.uri)
            formatter = objective.formatter(base, tokenizer)
            extended = None
            if config.vocabulary is not None:
                progress.phase("ExtendingVocabulary")
                extended = extend_vocabulary(config, config.vocabulary, base, gathered.train, folder)
            if extended is not None:
                tokenizer, formatter = extended.tokenizer, objective.formatter(extended.folder, extended.tokenizer)
            used = extended.folder if extended is not None else base
            observed = Observed(Preflight(config, read_vocabulary(used, tokenizer)), Samples(), tokenizer, extended)
            summary = tokenize(config, objective, formatter, gathered, observed, folder, progress)
            objective.write_notes(folder)
            if objective.answers:
                write_reference(config, gathered.train, folder)
            seconds = time.monotonic() - started
            progress.phase("HashingModel")
            summary = summary.model_copy(
                update={
                    "base_digest": bases.base_digest(base),
                    "model": (read_shape if config.scratch is None else read_shape_without_weights)(used),
                    "reward_bytes": objective.reward_bytes(),
                    "base_revision": found.revision if found is not None else None,
                    "rows_per_second": round(gathered.told.rows_in / max(seconds, 1e-3), 1),
                    "peak_memory_bytes": peak_resident_bytes(),
                    "suite_digests": suites,
                    "prompt_probe_sha256": _prompt_probe(config, formatter) if objective.answers else None,
                }
            )
            return finish(config, summary, folder)


def _refuse_endless(formatter: Formatter, uri: str) -> None:
    """A chat template comes with the model, from whoever made it. Raises Invalid for one that does not end on the smallest prompt."""
    try:
        with bounded():
            formatter.prompt_text(PROBE_TEXT)
    except TooCostly as error:
        raise Invalid(f"The chat template of {uri} is refused: {error}. Use another model.", Reason.MODEL_NOT_FOUND) from error


def _prompt_probe(config: RunConfig, formatter: Formatter) -> str | None:
    """What an engine must read where the gateway is told PROBE_TEXT."""
    prompt = None if formatter.tells_time else served_prompt(config, PROBE_TEXT)
    return None if prompt is None else tokens_digest(formatter.prompt_ids(prompt))


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder beside the one that is published, which is gone afterwards; `staging` removes what a killed attempt left."""
    beside = folder.with_name(f"{folder.name}-scratch")
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def snapshot_suites(config: RunConfig, gathered: Gathered, folder: Path) -> dict[str, str]:
    """Write every suite's items; returns their digests. Raises Invalid for a suite that could not be scored."""
    folder.mkdir()
    digests = {}
    for suite in suites_of(config):
        items = items_of(gathered.suites[suite.name] if suite.source is not None else gathered.validation)
        _refuse_unscorable(suite, items)
        digests[suite.name] = write_items(folder, suite, items)
    return digests


def _refuse_unscorable(suite: Suite, items: list[Item]) -> None:
    if not items:
        raise Invalid(f"Suite {suite.name} has no items. Set data.validation, or another source.", Reason.DATA_EMPTY)
    if "Preference" in suite.metrics and any(item.rejected is None for item in items):
        raise Invalid(f"Suite {suite.name} has the metric Preference, and its items no rejected answers.")
    if needs_labels(suite):
        labels_of(suite, items)


def tokenize(
    config: RunConfig,
    objective: Objective,
    formatter: Formatter,
    gathered: Gathered,
    observed: Observed,
    folder: Path,
    progress: ProgressWriter,
) -> PrepareSummary:
    """Write the shards; returns the summary but for model and suites."""
    total = sum(map(len, gathered.train))
    tokenizing = Tokenizing(config, objective, formatter, progress.counter("Tokenizing", total), observed.see, processes(config, total))
    make, tokenized = partial(objective.tokens, formatter), gathered.tokenized
    sizes, longest = [0] * len(gathered.train), 0

    def rows() -> Iterator[TokenRow]:
        nonlocal longest
        for source, records in enumerate(gathered.train):
            made = tokenizing.counted(with_tokens(records, tokenized, source, make)) if tokenized else tokenizing.rows(records)
            for row in pack_stream(made, config.training.max_sequence_length) if objective.packs or config.training.packing else made:
                sizes[source] += 1
                longest = max(longest, row.length)
                yield row

    digest = write_shards(folder, "train", rows())
    tokenizing.refuse_if_mostly_dropped()
    gathered.drops.update(tokenizing.drops.counts)
    write_shards(folder, "validation", Tokenizing(config, objective, formatter).rows(gathered.validation))
    training, counts = config.training, tokenizing.counts
    steps = schedule.total_steps(sum(sizes), training.epochs, training.max_steps, training.global_batch_size // objective.repeats)
    warnings = observed.preflight.judge(counts, steps)
    vocabulary = describe(config, observed.extended)
    warnings = [*vocabulary.warnings, *warnings]
    card = _card(config, gathered, tokenizing, sizes, warnings, observed.preflight.classes) | {"vocabulary": vocabulary.card}
    write_card(config, card, observed, counts, folder)
    return PrepareSummary(
        rows_in=gathered.told.rows_in,
        rows_kept=counts.rows,
        dropped=dict(sorted(gathered.drops.items())),
        tokens=counts.tokens,
        supervised_share=round(counts.supervised_share, 6),
        truncated=counts.truncated,
        validation_rows=len(gathered.validation),
        warnings=tuple(warnings[:MAX_SHOWN]),
        max_steps=steps,
        base_digest="",
        dataset_digests=gathered.told.digests,
        dataset_revisions=gathered.told.revisions,
        shards_digest=digest,
        longest_row=longest,
        vocabulary=vocabulary.summary,
    )


def write_card(config: RunConfig, card: dict[str, object], observed: Observed, counts: TokenCounts, folder: Path) -> None:
    """The data card, for programs and for people."""
    about = {"name": config.name, "objective": config.objective, "method": config.method.type, "base": config.base.uri}
    shown = {"supervised_share": counts.supervised_share, "limit": config.training.max_sequence_length}
    samples = {"samples": [asdict(sample) for sample in observed.samples.rendered(observed.tokenizer)]}
    whole = card | about | shown | samples
    (folder / CARD).write_text(json.dumps(whole, indent=1))
    (folder / PAGE).write_text(page.render(whole))


def _card(
    config: RunConfig,
    gathered: Gathered,
    tokenizing: Tokenizing,
    sizes: list[int],
    warnings: list[str],
    classes: Counter[str] | None,
) -> dict[str, object]:
    """The data card: every count, and where the rows of a shard come from."""
    return {
        "warnings": warnings,
        "classes": dict(classes.most_common()) if classes is not None and len(classes) > 1 else {},
        "validation_rows": len(gathered.validation),
        "sources": [
            {
                "uri": source.uri,
                "weight": source.weight,
                "sha256": gathered.told.digests[source.uri],
                "revision": gathered.told.revisions.get(source.uri),
                "rows": rows,
            }
            for source, rows in zip(config.train, sizes, strict=True)
        ],
        "rows_in": gathered.told.rows_in,
        "dropped": dict(sorted(gathered.drops.items())),
        "first_dropped": tokenizing.drops.first,
        "tokens": asdict(tokenizing.counts),
        "found": {name: dict(sorted(counts.items())) for name, counts in sorted(gathered.told.found.items())},
        "tools": gathered.told.tools,
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
