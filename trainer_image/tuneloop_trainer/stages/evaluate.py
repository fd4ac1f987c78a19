"""evaluate: the packaged artifact against the pinned baseline, on the suites that prepare snapshotted."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Final

from tuneloop_trainer import bases, hardware, models
from tuneloop_trainer.chat import Formatter
from tuneloop_trainer.contract import (
    HELD_OUT_METRICS,
    REFERENCE_FILE,
    Artifact,
    EvaluateSummary,
    ExitCode,
    Gate,
    GateResult,
    RunConfig,
    Stage,
    StageResult,
)
from tuneloop_trainer.data.suites import suites_of
from tuneloop_trainer.errors import StageError
from tuneloop_trainer.evaluation import comparisons, gates
from tuneloop_trainer.evaluation.baselines import SuiteScores, cache_key, read_answers, read_scores, write_answers, write_scores
from tuneloop_trainer.evaluation.groups import grown
from tuneloop_trainer.evaluation.probes import Answers, answer_freely, parse_rate, probes_of
from tuneloop_trainer.evaluation.suites import PreparedSuite, prepare_suite
from tuneloop_trainer.manifests import publish, sha256_file, staging
from tuneloop_trainer.models import Model
from tuneloop_trainer.objectives import Objective, objective_of
from tuneloop_trainer.progress import ProgressWriter
from tuneloop_trainer.report import written_card, written_report
from tuneloop_trainer.results import RESULT_FILE, sentence, write_result
from tuneloop_trainer.stages.outputs import MODEL_CARD, evaluation_key, require_stage, stage_folder, told_again
from tuneloop_trainer.stages.package import published
from tuneloop_trainer.stages.prepare import SUITES
from tuneloop_trainer.stages.vocabulary import trained_base

log = logging.getLogger("tuneloop.evaluate")
DTYPE: Final = "bfloat16"
"""Precision of candidate and baseline alike: the one that is served."""
RESULTS, PROBES, REPORT = "results.json", "probes.json", "report.html"

Scores = dict[str, SuiteScores]


def evaluate(config: RunConfig, progress: ProgressWriter) -> StageResult:
    candidate = packaged(config)
    if (result := told_again(config, Stage.EVALUATE)) is not None and _judged(result) == candidate.manifest_digest:
        return result
    progress.phase("LoadingModel")
    hardware.use_threads(config.threads)
    manifest, prepared = require_stage(config, Stage.PREPARE)
    base = bases.require_prepared(config, manifest)
    objective = objective_of(config, stage_folder(config, Stage.PREPARE))
    trained = trained_base(config, manifest)
    formatter = read_as(objective, candidate, trained, config.base.uri)
    other = read_as(objective, config.evaluation.baseline.artifact, base, config.base.uri)
    digests = prepared.prepare.suite_digests if prepared.prepare else {}
    by_bytes = not same_tokenizer(trained, tokenizer_of(config.evaluation.baseline.artifact, base))
    suites = prepare_suites(config, objective, digests, formatter, by_bytes)
    others = suites if not by_bytes and formatter.before == other.before else prepare_suites(config, objective, digests, other, by_bytes)

    model = load_artifact(objective, candidate, base, config.base.uri)
    scores = {name: suite.score(model, progress, "candidate") for name, suite in suites.items()}
    answers = answer_freely(model, suites, formatter, formatter.stops, progress) if objective.answers else {}
    asked = list(suites)[: comparisons.MAX_SUITES] if objective.answers else []
    after = {name: comparisons.ask(model, suites[name], formatter, formatter.stops, progress) for name in asked}
    del model
    baseline = BaselineModel(config, objective, base, str(manifest.metadata["base_digest"]), progress)
    baseline_scores = score_baseline(baseline, others)
    before = {name: baseline_answers(baseline, others[name], other, other.stops) for name in asked}
    told = [
        comparisons.compare(name, suites[name], scores[name], baseline_scores[name], before.get(name), after.get(name))
        for name in list(suites)[: comparisons.MAX_SUITES]
    ]
    return conclude(config, candidate, suites, scores, baseline_scores, answers, told)


def prepare_suites(
    config: RunConfig, objective: Objective, digests: dict[str, str], formatter: Formatter, by_bytes: bool
) -> dict[str, PreparedSuite]:
    folder = stage_folder(config, Stage.PREPARE) / SUITES
    return {
        suite.name: prepare_suite(config, objective, suite, digests[suite.name], folder, formatter, by_bytes) for suite in suites_of(config)
    }


def tokenizer_of(artifact: Artifact | None, base: Path) -> Path:
    """The folder with a model's tokenizer: whole models bring their own."""
    if artifact is None or artifact.format == "Adapter":
        return base
    own = Path(artifact.path)
    return own if (own / "tokenizer_config.json").is_file() else base


def read_as(objective: Objective, artifact: Artifact | None, base: Path, uri: str) -> Formatter:
    """How a model reads texts: by its tokenizer, and behind the prompt that it learned. None: the base itself."""
    folder = tokenizer_of(artifact, base)
    formatter = objective.formatter(folder, models.load_tokenizer(folder, uri))
    count = models.virtual_tokens(Path(artifact.path)) if artifact is not None else 0
    if count:
        first = models.vocabulary_size(base)
        formatter.before = tuple(range(first, first + count))
    return formatter


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two models cut texts alike: they were made from the same tokenizer, byte for byte."""
    files = [folder / "tokenizer.json" for folder in (one, other)]
    return one == other or not all(file.is_file() for file in files) or sha256_file(files[0]) == sha256_file(files[1])


class BaselineModel:
    """What the candidate is compared with: told apart by `identity`, loaded when something of it is not known yet."""

    def __init__(self, config: RunConfig, objective: Objective, base: Path, base_digest: str, progress: ProgressWriter) -> None:
        self.config = config
        self.objective = objective
        self.progress = progress
        self.cache = Path(config.paths.cache)
        self.pinned = config.evaluation.baseline.artifact
        self.identity = base_digest if self.pinned is None else f"{self.pinned.manifest_digest}+{base_digest}"
        self._base = base

    @cached_property
    def model(self) -> Model:
        self.progress.phase("LoadingBaseline")
        return _baseline_model(self.config, self.objective, self.pinned, self._base)


def score_baseline(baseline: BaselineModel, suites: dict[str, PreparedSuite]) -> Scores:
    """The pinned baseline's scores, from the cache where another run has made them."""
    if baseline.pinned is None:
        own = {name: baseline.objective.base_scores(suite) for name, suite in suites.items()}
        if all(own.values()):
            return {name: scores for name, scores in own.items() if scores is not None}
    found: Scores = {}
    for name, suite in suites.items():
        key = suite.key(baseline.identity, DTYPE)
        scores = read_scores(baseline.cache, key)
        if scores is None:
            scores = suite.score(baseline.model, baseline.progress, "baseline")
            write_scores(baseline.cache, key, scores)
        found[name] = scores
    return found


def baseline_answers(baseline: BaselineModel, suite: PreparedSuite, formatter: Formatter, stops: frozenset[int]) -> list[str]:
    """The pinned baseline's answers to the items that are shown in the report; from the cache as its scores are."""
    places = comparisons.places_to_ask(suite)
    if not places:
        return []
    key = cache_key(scores=suite.key(baseline.identity, DTYPE), asked=str(places), tokens=comparisons.ANSWER_TOKENS)
    answers = read_answers(baseline.cache, key)
    if answers is None:
        answers = comparisons.ask(baseline.model, suite, formatter, stops, baseline.progress)
        write_answers(baseline.cache, key, answers)
    return answers


def _baseline_model(config: RunConfig, objective: Objective, pinned: Artifact | None, base: Path) -> Model:
    gc.collect()
    if pinned is None:
        return objective.load_base(base, DTYPE)
    below = bases.base_folder(pinned.base, config.paths) if pinned.base is not None else base
    return load_artifact(objective, pinned, below, (pinned.base or config.base).uri)


def load_artifact(objective: Objective, artifact: Artifact, base: Path, base_uri: str) -> Model:
    """A packaged model, verified by its digest, as it is served."""
    folder = bases.require_artifact(artifact)
    if artifact.format == "Merged":
        return objective.load(folder, artifact.path, DTYPE)
    return models.load_adapter(models.load_model(base, base_uri, DTYPE), folder)


def conclude(
    config: RunConfig,
    candidate: Artifact,
    suites: dict[str, PreparedSuite],
    scores: Scores,
    baseline: Scores,
    answers: Answers,
    told: list[comparisons.Compared],
) -> StageResult:
    """Gates, summary, probes, the full results and the report of the run, published."""
    chosen = gates_of(config)
    decided = [_decide(config, gate, suites[gate.suite], scores[gate.suite], baseline[gate.suite]) for gate in chosen]
    summaries = {name: suite.summary(scores[name], baseline[name], parse_rate(suite, answers.get(name))) for name, suite in suites.items()}
    target = stage_folder(config, Stage.EVALUATE)
    probes = probes_of(chosen, suites, scores, answers)
    reference = stage_folder(config, Stage.PREPARE) / REFERENCE_FILE
    summary = EvaluateSummary(
        verdict=gates.overall([result.verdict for result, _ in decided]),
        artifact_digest=candidate.manifest_digest,
        gates=tuple(result for result, _ in decided),
        scores=summaries,
        probes=str(target / PROBES) if probes else None,
        has_reference=reference.is_file(),
        message=sentence(" ".join([*(advice for _, advice in decided if advice), *_grown(told)]), 300),
    )
    with staging(target) as folder:
        (folder / RESULTS).write_text(json.dumps(_full(summary, suites, scores, baseline, answers, told), ensure_ascii=False))
        if summary.has_reference:
            shutil.copyfile(reference, folder / REFERENCE_FILE)
        if probes:
            (folder / PROBES).write_text(json.dumps([probe.model_dump(mode="json", by_alias=True) for probe in probes], ensure_ascii=False))
        if (page := written_report(config, candidate, summary, told)) is not None:
            (folder / REPORT).write_text(page, encoding="utf-8")
            summary = summary.model_copy(update={"page": REPORT})
        if (card := written_card(config, candidate, summary, told)) is not None:
            (folder / MODEL_CARD).write_text(card, encoding="utf-8")
        result = StageResult(
            stage=Stage.EVALUATE, exit_code=ExitCode.DONE, uri=str(target / RESULTS), sha256=sha256_file(folder / RESULTS), evaluate=summary
        )
        write_result(folder / RESULT_FILE, result)
        publish(folder, target, "dataset", {"run_key": evaluation_key(config), "artifact_digest": candidate.manifest_digest})
    return result


def _grown(told: list[comparisons.Compared]) -> list[str]:
    return [said for compared in told for said in grown(compared.suite, compared.groupings)]


def gates_of(config: RunConfig) -> tuple[Gate, ...]:
    """The configured gates; a validation split without any gate is tested for what its objective improves."""
    if config.evaluation.gates or config.validation_fraction <= 0:
        return config.evaluation.gates
    validation = next(suite for suite in suites_of(config) if suite.type == "Validation")
    metric = HELD_OUT_METRICS[config.objective][0]
    return (Gate(suite=validation.name, metric=metric, rule="Superior"),) if metric in validation.metrics else ()


def _decide(config: RunConfig, gate: Gate, suite: PreparedSuite, candidate: SuiteScores, baseline: SuiteScores) -> tuple[GateResult, str]:
    paired = suite.paired(gate.metric, candidate, baseline)
    return gates.decide(gate, paired, config.evaluation.promotions_per_suite, config.training.seed)


def _full(
    summary: EvaluateSummary,
    suites: dict[str, PreparedSuite],
    scores: Scores,
    baseline: Scores,
    answers: Answers,
    told: list[comparisons.Compared],
) -> dict[str, object]:
    """Every item's scores, so that any figure can be made again. Items are named by their place in the snapshot."""
    return {
        "summary": summary.model_dump(mode="json", by_alias=True),
        "groups": {compared.suite: [asdict(grouping) for grouping in compared.groupings] for compared in told},
        "suites": {
            name: {
                "digest": suite.digest,
                "labels": suite.labels,
                "documents": [item.document for item in suite.items],
                "expected": suite.expected if suite.labels else [],
                "candidate": scores[name].model_dump(mode="json"),
                "baseline": baseline[name].model_dump(mode="json"),
                "answered": list(answers.get(name, {})),
                "answers": [answer.text for answer in answers.get(name, {}).values()],
            }
            for name, suite in suites.items()
        },
    }


def packaged(config: RunConfig) -> Artifact:
    """The artifact that package published for this configuration, every file verified. Raises StageError."""
    manifest = published(config)
    if manifest is None:
        raise StageError("There is no packaged model of this run that verifies; nothing is evaluated.")
    return Artifact(path=config.paths.artifact, manifest_digest=manifest.digest(), format=config.output_format, base=config.base)


def _judged(result: StageResult) -> str | None:
    return result.evaluate.artifact_digest if result.evaluate else None
