"""The model card that is packaged with the weights: where the model comes from, what it was trained on, and how."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tuneloop_trainer.contract import PrepareSummary, RunConfig, TrainSummary

LICENCE = re.compile(r"^license:\s*[\"']?([A-Za-z0-9][A-Za-z0-9.+-]{0,63})[\"']?\s*$", re.MULTILINE)
MAX_CARD = 1 << 20


def base_licence(folder: Path) -> str | None:
    """What the base model's own card says in its header; None where there is none, or it does not say."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            _, _, rest = file.read(MAX_CARD).partition("---\n")
    except OSError:
        return None
    found = LICENCE.search(rest.partition("\n---")[0])
    return found[1] if found is not None else None


def model_card(config: RunConfig, data: PrepareSummary, training: TrainSummary, licence: str | None = None) -> str:
    """Markdown, with the header that model hubs read. Holds no row of the data and no path of the store."""
    return "\n".join(
        [
            *_header(config, licence),
            f"# {config.model}",
            "",
            f"Fine-tuned from `{config.base.uri}` by the FineTuneJob `{config.namespace}/{config.name}`.",
            "",
            "## Lineage",
            "",
            *_table(
                ("base model", f"`{config.base.uri}`"),
                ("base revision", data.base_revision),
                ("base digest", f"`{data.base_digest}`"),
                ("tokenised data", f"`sha256:{data.shards_digest}`"),
                ("trainer image", f"`{config.image}`" if config.image else None),
                *((f"source `{uri}`", f"`sha256:{digest}`") for uri, digest in data.dataset_digests.items()),
                *((f"suite `{name}`", f"`sha256:{digest}`") for name, digest in data.suite_digests.items()),
            ),
            "",
            "## Data",
            "",
            *_table(
                ("rows read", data.rows_in),
                ("rows trained on", data.rows_kept),
                ("rows held out", data.validation_rows),
                *((f"rows dropped: {reason}", count) for reason, count in sorted(data.dropped.items())),
                ("tokens", data.tokens),
                ("share of supervised tokens", f"{data.supervised_share:.3f}"),
                ("truncated rows", data.truncated),
            ),
            "",
            "## Training",
            "",
            *_table(
                ("objective", _objective(config)),
                ("method", config.method.type),
                ("steps", f"{training.step} of {training.max_steps}"),
                ("samples", training.samples),
                ("last training loss", training.loss),
                ("last held-out loss", training.validation_loss),
            ),
            "",
            "```json",
            json.dumps(
                {"method": config.method.model_dump(mode="json"), "training": config.training.model_dump(mode="json")},
                indent=1,
                sort_keys=True,
            ),
            "```",
            "",
            "## Licence",
            "",
            f"The base model's card says `{licence}`." if licence is not None else "The base model's files do not say; its page does.",
            "The licences of the data are those of its sources, which Tuneloop does not know.",
            "",
            "## Limits",
            "",
            "Evaluated on the suites of its FineTuneJob only: the ModelVersion has the verdict. Anything else it says is not measured.",
            "",
        ]
    )


def _header(config: RunConfig, licence: str | None) -> list[str]:
    base = config.base.repository or config.base.uri
    lines = [
        f"base_model: {json.dumps(base)}",
        f"library_name: {'peft' if config.output_format == 'Adapter' else 'transformers'}",
        f"tags: {json.dumps(['tuneloop', config.objective.lower(), config.method.type.lower()])}",
    ]
    return ["---", *([f"license: {licence}"] if licence is not None else []), *lines, "---", ""]


def _objective(config: RunConfig) -> str:
    """What was optimised, with the settings that only this objective has."""
    settings = next((value for value in (config.dpo, config.kto, config.classification, config.rollouts, config.custom) if value), None)
    values = settings.model_dump(mode="json", exclude={"rewards"}) if settings is not None else {}
    shown = [f"{name} {value}" for name, value in values.items() if value]
    shown += [f"reward {reward.name} x {reward.weight:g}" for reward in config.rollouts.rewards] if config.rollouts is not None else []
    shown += [config.loss] if config.objective == "SFT" else []
    return ", ".join([config.objective, *shown, config.prompt_format])


def _table(*rows: tuple[str, object]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value is not None)]
