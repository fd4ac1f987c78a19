"""The report of a finished run: one page of HTML with its curves, data, evaluation, answers before and after, and lineage.

Written from what the stages published, so that it says what they said; every text of users and models is cut and escaped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from markupsafe import Markup

from tuneloop_trainer import pages
from tuneloop_trainer.card import Code, Section, base_licence, figures, markdown, sections
from tuneloop_trainer.contract import Artifact, EvaluateSummary, GateResult, PrepareSummary, RunConfig, Stage, TrainSummary
from tuneloop_trainer.data import page
from tuneloop_trainer.errors import StageError
from tuneloop_trainer.evaluation.comparisons import Compared
from tuneloop_trainer.manifests import read_manifest
from tuneloop_trainer.pages.charts import Curve, Point, chart, interval, smoothed
from tuneloop_trainer.results import RESULT_FILE, read_result
from tuneloop_trainer.stages.outputs import stage_folder

log = logging.getLogger("tuneloop.report")
MAX_TEXT = 1200
"""Characters of a prompt or an answer."""
SMOOTH_FROM = 60
"""A loss of so many steps is drawn smoothed, over a twentieth of them, with the steps behind it."""
CURVES = {
    "loss": "Loss",
    "eval_loss": "Held-out loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOPs utilisation, percent",
    "rewards/margins": "Reward margin",
    "rewards/accuracies": "Preference accuracy",
    "reward": "Reward",
    "kl": "Divergence from the base (KL)",
}
"""What is drawn of the log, in this order; a run has some of them."""
RULES = {"Superior": "better than the baseline", "NonInferior": "no worse than the baseline by more than the margin"}


def written_report(config: RunConfig, candidate: Artifact, summary: EvaluateSummary, told: Sequence[Compared]) -> str | None:
    """The page; None where it cannot be made, which is no reason to lose an evaluation."""
    return _written(lambda: pages.render("report.html", context(config, candidate, summary, told)), "report")


def written_card(config: RunConfig, candidate: Artifact, summary: EvaluateSummary, told: Sequence[Compared]) -> str | None:
    """The packaged model card, and what the evaluation found; None as in `written_report`."""

    def write() -> str:
        prepared, trained = stage_folder(config, Stage.PREPARE), stage_folder(config, Stage.TRAIN) / "final"
        licence = base_licence(Path(candidate.path))
        *known, limits = sections(config, _prepare_summary(prepared), _train_summary(trained), licence)
        found = figures(config.evaluation.baseline.name, summary, [(one.suite, part) for one in told for part in one.groupings])
        return markdown(config, [*known, *found, limits], licence)

    return _written(write, "model card")


def _written(write: Callable[[], str], what: str) -> str | None:
    try:
        return write()
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError, StageError, TemplateError):
        log.exception("the %s cannot be made; the results are complete without it", what)
        return None


def context(config: RunConfig, candidate: Artifact, summary: EvaluateSummary, told: Sequence[Compared]) -> dict[str, Any]:
    """All that the template reads."""
    prepared, trained = stage_folder(config, Stage.PREPARE), stage_folder(config, Stage.TRAIN) / "final"
    data, training = _prepare_summary(prepared), _train_summary(trained)
    card = sections(config, data, training, base_licence(Path(candidate.path)))
    manifest = read_manifest(Path(candidate.path))
    size = sum(file.size for file in manifest.files)
    return {
        "config": config,
        "summary": summary,
        "data": data,
        "training": training,
        "size": pages.bytes_of(size),
        "memory": pages.bytes_of(training.peak_memory_bytes),
        "gates": [_gate(config, gate) for gate in summary.gates],
        "told": told,
        "limit": MAX_TEXT,
        "curves": list(curves(json.loads((trained / "log.json").read_text()))),
        "estimates": estimates(config, training),
        "settings": json.loads((trained / "settings.json").read_text()),
        "data_card": _data_card(prepared),
        "lineage": _lineage(card[0], candidate, config),
        "card": card[1:],
        "is_code": lambda cell: isinstance(cell, Code),
    }


def curves(history: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Title, drawing and a line of figures for each value that the run logged."""
    for key, title in CURVES.items():
        points = [(float(entry["step"]), float(entry[key])) for entry in history if _is_number(entry.get(key)) and "step" in entry]
        drawing = chart(_lines(key, points), title)
        if drawing:
            values = [value for _, value in points]
            told = (
                f"{pages.short(values[0])} → {pages.short(values[-1])}, between {pages.short(min(values))} and {pages.short(max(values))}"
            )
            yield {"title": title, "drawing": drawing, "told": told if len(values) > 1 else pages.short(values[0])}


def estimates(config: RunConfig, training: TrainSummary) -> list[tuple[str, str, str]]:
    """What was expected, and what came; nothing where the operator had no estimate."""
    expected = config.estimate
    if expected is None:
        return []
    hours = [hours for hours in (expected.hours_from, expected.hours_to) if hours is not None]
    span = " to ".join(dict.fromkeys(pages.duration(3600 * value) for value in hours)) or "–"
    measured = training.peak_memory_bytes
    off = f" ({measured / expected.peak_memory_bytes - 1:+.0%})" if measured and expected.peak_memory_bytes else ""
    return [
        (f"peak memory ({expected.device})", pages.bytes_of(expected.peak_memory_bytes), pages.bytes_of(measured) + off),
        ("rows at a time", str(expected.micro_batch_size), str(training.micro_batch_size)),
        ("time of the last attempt", span, pages.duration(training.seconds)),
    ]


def _lines(key: str, points: list[Point]) -> list[Curve]:
    if key != "loss" or len(points) < SMOOTH_FROM:
        return [Curve("main", points)]
    return [Curve("pale", points), Curve("main", smoothed(points, len(points) // 20))]


def _gate(config: RunConfig, result: GateResult) -> dict[str, Any]:
    key = (result.suite, result.metric, result.rule)
    asked = next((gate for gate in config.evaluation.gates if (gate.suite, gate.metric, gate.rule) == key), None)
    is_loss = result.metric == "Loss"
    margin = 0.0 if asked is None or asked.rule == "Superior" else (asked.margin if is_loss else -asked.margin)
    drawing = interval(result.lower, result.upper, result.difference, margin, "left" if is_loss else "right")
    return {"result": result, "asked": asked, "wants": RULES.get(result.rule, result.rule), "drawing": drawing}


def _data_card(prepared: Path) -> Markup:
    """The body of the data card; nothing of one that an earlier release wrote, which holds less."""
    card = json.loads((prepared / "card.json").read_text())
    if "samples" not in card:
        return Markup("")
    return Markup(pages.render("card_body.html", page.context(card) | {"level": 3}))  # rendered with escapes


def _lineage(made_of: Section, candidate: Artifact, config: RunConfig) -> Section:
    baseline = config.evaluation.baseline
    rows = (
        ("artifact", Code(candidate.manifest_digest)),
        ("FineTuneJob", f"{config.namespace}/{config.name}"),
        ("compared with", baseline.name),
        *((("its digest", Code(baseline.artifact.manifest_digest)),) if baseline.artifact is not None else ()),
    )
    return Section(made_of.title, (*rows, *made_of.rows))


def _prepare_summary(folder: Path) -> PrepareSummary:
    result = read_result(folder / RESULT_FILE)
    if result is None or result.prepare is None:
        raise StageError("prepare left no summary.")
    return result.prepare


def _train_summary(folder: Path) -> TrainSummary:
    result = read_result(folder / RESULT_FILE)
    if result is None or result.train is None:
        raise StageError("train left no summary.")
    return result.train


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) != float("inf")
