"""The model card: where the model comes from, what it was trained on, and how. It is packaged with the weights; with the figures of the
evaluation, which are not known then, it is beside the evaluation's results and in copies of the model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuneloop_trainer.contract import EvaluateSummary, PrepareSummary, RunConfig, TrainSummary
from tuneloop_trainer.evaluation.groups import Grouping

LICENCE = re.compile(r"^license:\s*[\"']?([A-Za-z0-9][A-Za-z0-9.+-]{0,63})[\"']?\s*$", re.MULTILINE)
MAX_CARD = 1 << 20
MAX_NAME = 80
"""Characters of a group's name."""


def base_licence(folder: Path) -> str | None:
    """What the base model's own card says in its header; None where there is none, or it does not say."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            _, _, rest = file.read(MAX_CARD).partition("---\n")
    except OSError:
        return None
    found = LICENCE.search(rest.partition("\n---")[0])
    return found[1] if found is not None else None


class Code(str):
    """A cell that is set as code: a digest, an address."""


@dataclass(frozen=True)
class Section:
    """A part of the card: a table, a piece of JSON, sentences; whatever of these it has."""

    title: str
    rows: tuple[tuple[str, ...], ...] = ()
    header: tuple[str, ...] = ("", "")
    code: str | None = None
    text: tuple[str, ...] = ()


def model_card(config: RunConfig, data: PrepareSummary, training: TrainSummary, licence: str | None = None) -> str:
    """Markdown, with the header that model hubs read. Holds no row of the data and no path of the store."""
    return markdown(config, sections(config, data, training, licence), licence)


def sections(config: RunConfig, data: PrepareSummary, training: TrainSummary, licence: str | None) -> list[Section]:
    """What the card says, however it is set."""
    settings = {"method": config.method.model_dump(mode="json"), "training": config.training.model_dump(mode="json")}
    return [
        lineage(config, data),
        Section("Data", _told(
            ("rows read", data.rows_in),
            ("rows trained on", data.rows_kept),
            ("rows held out", data.validation_rows),
            *((f"rows dropped: {reason}", count) for reason, count in sorted(data.dropped.items())),
            ("tokens", data.tokens),
            ("share of supervised tokens", f"{data.supervised_share:.3f}"),
            ("truncated rows", data.truncated),
        )),
        Section(
            "Training",
            _told(
                ("objective", _objective(config)),
                ("method", config.method.type),
                ("steps", f"{training.step} of {training.max_steps}"),
                ("samples", training.samples),
                ("last training loss", training.loss),
                ("last held-out loss", training.validation_loss),
            ),
            code=json.dumps(settings, indent=1, sort_keys=True),
        ),
        Section("Licence", text=(
            f"The base model's card says `{licence}`." if licence is not None else "The base model's files do not say; its page does.",
            "The licences of the data are those of its sources, which Tuneloop does not know.",
        )),
        Section("Limits", text=(
            "Evaluated on the suites of its FineTuneJob only: the ModelVersion has the verdict, and MODEL_CARD.md of a copy the figures. "
            "Anything else it says is not measured.",
        )),
    ]  # fmt: skip


def figures(baseline: str, summary: EvaluateSummary, told: Sequence[tuple[str, Grouping]]) -> list[Section]:
    """What the evaluation found: each gate, each suite, and the groups of the suites by name."""
    gates = tuple(
        (gate.suite, gate.metric, gate.rule, gate.verdict, *map(_figure, (gate.candidate, gate.baseline)),
         f"{_figure(gate.lower)} to {_figure(gate.upper)}", str(gate.n), "" if gate.p is None else f"{gate.p:.3g}")
        for gate in summary.gates
    )  # fmt: skip
    scores = tuple(
        (suite, str(score.n), name.replace("_", " "), _figure(value))
        for suite, score in summary.scores.items()
        for name, value in score.model_dump(exclude={"n"}, exclude_none=True).items()
    )
    verdict = (f"Verdict: {summary.verdict}, of the artifact `{summary.artifact_digest}`.",)
    header = ("suite", "metric", "rule", "verdict", "this model", baseline, "difference", "items", "p")
    return [
        Section("Evaluation", gates, header, text=verdict),
        Section("Scores", scores, ("suite", "items", "figure", "value")),
        *(_by_group(suite, grouping, baseline) for suite, grouping in told),
    ]


def _by_group(suite: str, grouping: Grouping, baseline: str) -> Section:
    """Names of groups are words of the data: none of them becomes a link or an image."""
    kind, gap = _words(grouping.kind), grouping.gap
    rows = tuple(
        (_words(group.name), str(group.n), *map(_figure, (group.candidate, group.baseline)), f"{group.lower:.4g} to {group.upper:.4g}")
        for group in grouping.groups
    )
    text = () if gap is None else (
        f"Between the best and the worst: {gap.candidate:.4g} ({gap.lower:.4g} to {gap.upper:.4g}), the baseline's {gap.baseline:.4g}; "
        f"grown by {gap.growth_lower:.4g} to {gap.growth_upper:.4g}. Intervals of 95 %, for any number of groups.",
    )  # fmt: skip
    return Section(f"{grouping.metric} of {suite} by {kind}", rows, (kind, "items", "this model", baseline, "difference"), text=text)


def _words(text: str) -> str:
    """As it is, whatever Markdown it would be. An address is parted by a character of no width, or a hub would make a link of it."""
    text = re.sub(r"(?i):(?=//)|www(?=\.)|(?=@)", "\\g<0>\u2060", text)
    return re.sub(r"([\\`*_\[\]!&])", r"\\\1", " ".join(text.split())[:MAX_NAME]).replace("<", "&lt;")


def _figure(value: float) -> str:
    return f"{value:.4g}"


def lineage(config: RunConfig, data: PrepareSummary) -> Section:
    """What the model is made of, each by a digest."""
    rows = _told(
        ("base model" if config.scratch is None else "tokenizer from", Code(config.base.uri)),
        ("base revision", data.base_revision),
        ("base digest", Code(data.base_digest)),
        ("tokenised data", Code(f"sha256:{data.shards_digest}")),
        ("trainer image", Code(config.image) if config.image else None),
    )
    sources = ((f"source `{uri}`", Code(f"sha256:{digest}")) for uri, digest in data.dataset_digests.items())
    suites = ((f"suite `{name}`", Code(f"sha256:{digest}")) for name, digest in data.suite_digests.items())
    return Section("Lineage", (*rows, *sources, *suites))


def markdown(config: RunConfig, card: Sequence[Section], licence: str | None) -> str:
    """The sections under the header that model hubs read."""
    from_what = f"Fine-tuned from `{config.base.uri}`" if config.scratch is None else f"Trained from scratch ({config.scratch.family})"
    made_by = f"{from_what} by the FineTuneJob `{config.namespace}/{config.name}`."
    lines = [*_header(config, licence), f"# {config.model}", "", made_by, ""]
    for section in card:
        lines += [f"## {section.title}", ""]
        if section.rows:
            lines += [_row(section.header), f"|{'---|' * len(section.header)}", *map(_row, section.rows), ""]
        if section.code is not None:
            lines += ["```json", section.code, "```", ""]
        if section.text:
            lines += [*section.text, ""]
    return "\n".join(lines)


def _row(cells: tuple[str, ...]) -> str:
    """A row of a table. What is not code is kept from ending its cell, its line, or the text around it."""
    set_ = (f"`{cell}`" if isinstance(cell, Code) else " ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(set_)} |".replace("|  |", "| |")


def _header(config: RunConfig, licence: str | None) -> list[str]:
    base = config.base.repository or config.base.uri
    lines = [
        *([f"base_model: {json.dumps(base)}"] if config.scratch is None else []),
        f"library_name: {'peft' if config.output_format == 'Adapter' else 'transformers'}",
        f"tags: {json.dumps(['tuneloop', config.objective.lower(), config.method.type.lower()])}",
    ]
    return ["---", *([f"license: {licence}"] if licence is not None else []), *lines, "---", ""]


def _objective(config: RunConfig) -> str:
    """What was optimised, with the settings that only this objective has."""
    blocks = (config.dpo, config.kto, config.classification, config.seq2seq, config.rollouts, config.custom)
    settings = next((value for value in blocks if value), None)
    values = settings.model_dump(mode="json", exclude={"rewards"}) if settings is not None else {}
    shown = [f"{name} {value}" for name, value in values.items() if value]
    shown += [f"reward {reward.name} x {reward.weight:g}" for reward in config.rollouts.rewards] if config.rollouts is not None else []
    shown += [config.loss] if config.objective == "SFT" else []
    return ", ".join([config.objective, *shown, config.prompt_format])


def _told(*rows: tuple[str, object]) -> tuple[tuple[str, ...], ...]:
    """The rows whose value is known."""
    return tuple((name, value if isinstance(value, str) else str(value)) for name, value in rows if value is not None)
