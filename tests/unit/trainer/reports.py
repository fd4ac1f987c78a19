"""The folders of a run that has ended, written without training anything, with texts that mean no good."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.unit.trainer.builders import make_config, make_source, replace

from tuneloop_trainer.contract import (
    Artifact,
    Estimated,
    EvaluateSummary,
    Evaluation,
    ExitCode,
    Gate,
    GateResult,
    PrepareSummary,
    RunConfig,
    Stage,
    StageResult,
    SuiteScore,
    TrainSummary,
)
from tuneloop_trainer.data import page
from tuneloop_trainer.data.samples import Piece, Sample
from tuneloop_trainer.data.tokens import TokenCounts
from tuneloop_trainer.evaluation.comparisons import Compared, Comparison
from tuneloop_trainer.evaluation.groups import Gap, Group, Grouping
from tuneloop_trainer.manifests import publish
from tuneloop_trainer.results import RESULT_FILE, write_result
from tuneloop_trainer.stages.outputs import stage_folder

EVIL = "<script>alert(1)</script>"
LONG = "W" * 5000
STEPS = 3000


def make_history(steps: int) -> list[dict[str, Any]]:
    """A loss that falls, with a spike, a step that is no number, and what else a run logs."""
    history: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 2 * math.exp(-step / 400) + 0.3 + 0.1 * math.sin(step)
        entry = {"step": step, "loss": loss, "learning_rate": 1e-4 * (1 - step / steps), "grad_norm": 1 + math.cos(step / 9) ** 2}
        history.append(entry | {"tokens_per_second": 1000 + step % 50, EVIL: 1.0})
    history[steps // 2]["loss"] = 9.0
    history[steps // 3]["loss"] = math.nan
    return [*history, {"step": steps, "eval_loss": 0.5}, {"step": steps, "train_runtime": 12.0}]


def make_finished(
    root: Path, text: str = f"{EVIL} {LONG}", steps: int = STEPS
) -> tuple[RunConfig, Artifact, EvaluateSummary, list[Compared]]:
    """Everything that a report is written from; `text` stands wherever users and models write."""
    train = make_source(root / "data" / "train.jsonl")
    gates = (Gate(suite="gate", metric="Accuracy", rule="NonInferior"), Gate(suite="held", metric="Loss", rule="Superior"))
    config = make_config(root, root, [train], evaluation=Evaluation(gates=gates), model="tiny")
    config = replace(config, estimate=Estimated(device="cpu", peak_memory_bytes=10**9, micro_batch_size=4, hours_from=0.1, hours_to=2.5))
    _prepared(stage_folder(config, Stage.PREPARE), text)
    trained = stage_folder(config, Stage.TRAIN) / "final"
    trained.mkdir(parents=True)
    (trained / "log.json").write_text(json.dumps(make_history(steps)))
    (trained / "settings.json").write_text(
        json.dumps({"learning_rate": {"value": 1e-4, "from": "spec"}, "optim": {"value": text, "from": "x"}})
    )
    summary = TrainSummary(step=steps, max_steps=steps, samples=9, loss=0.3, seconds=4000, peak_memory_bytes=2**30, tokens_per_second=1000)
    write_result(trained / RESULT_FILE, StageResult(stage=Stage.TRAIN, exit_code=ExitCode.DONE, train=summary))
    folder = root / "models" / "staged"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    manifest = publish(folder, Path(config.paths.artifact), "model", {})
    artifact = Artifact(path=config.paths.artifact, manifest_digest=manifest.digest(), format="Adapter")
    return config, artifact, _evaluated(artifact), _compared(text)


def _prepared(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    counts = TokenCounts(rows=5, tokens=70, supervised=20, longest=40, histogram=[3, 2, 0, 0, 0, 0, 0, 0, 0, 0])
    sample = Sample(row=1, tokens=2, learned=1, left_out=0, beginning=(Piece(text, False), Piece(text, True)), end=())
    card = {
        "name": "tiny", "objective": "SFT", "method": "LoRA", "base": "pvc://models/base", "warnings": [text[:160]],
        "classes": {f"{text} {number}": number for number in range(30)}, "validation_rows": 3,
        "sources": [{"uri": "pvc://data/train.jsonl", "weight": 1.0, "sha256": "0" * 64, "rows": 5}],
        "rows_in": 9, "dropped": {"Duplicate": 4}, "first_dropped": text[:300], "tokens": asdict(counts), "found": {}, "tools": [],
        "packed": False, "supervised_share": 0.3, "limit": 128, "samples": [asdict(sample)],
    }  # fmt: skip
    (folder / "card.json").write_text(json.dumps(card))
    (folder / page.TEMPLATE).write_text(page.render(card))
    summary = PrepareSummary(
        rows_in=9, rows_kept=5, tokens=70, supervised_share=0.3, max_steps=STEPS, base_digest="sha256:" + "1" * 64, shards_digest="2" * 64,
        dataset_digests={f"pvc://data/{EVIL}|{LONG}": "3" * 64}, suite_digests={"gate": "4" * 64},
    )  # fmt: skip
    write_result(folder / RESULT_FILE, StageResult(stage=Stage.PREPARE, exit_code=ExitCode.DONE, prepare=summary))


def _evaluated(artifact: Artifact) -> EvaluateSummary:
    accuracy = GateResult(
        suite="gate", metric="Accuracy", rule="NonInferior", verdict="Pass", candidate=0.81, baseline=0.8, difference=0.01, lower=-0.02,
        upper=0.04, n=412, detectable=0.02,
    )  # fmt: skip
    loss = GateResult(
        suite="held", metric="Loss", rule="Superior", verdict="Inconclusive", candidate=1.25, baseline=1.5, difference=-0.25, lower=-0.6,
        upper=0.1, n=40, p=0.04,
    )  # fmt: skip
    score = SuiteScore(n=412, accuracy=0.81, baseline_accuracy=0.8, macro_f1=0.79, majority_rate=0.5, parse_rate=0.99)
    return EvaluateSummary(
        verdict="Inconclusive", artifact_digest=artifact.manifest_digest, gates=(accuracy, loss), scores={"gate": score}, message=EVIL
    )


def _compared(text: str) -> list[Compared]:
    labelled = Comparison(text, "positive", "negative", "positive", "newly right")
    groups = (Group(text, 40, 0.875, 0.125, 0.61, 0.85), Group("all others", 372, 0.7, 0.9, -0.3, -0.1))
    labels = Grouping("label", "Accuracy", groups, Gap(0.175, 0.0625, 0.3125, 0.775, -0.75, -0.5))
    return [
        Compared("gate", (labelled,), {"newly right": 1, "newly wrong": 0, "right as before": 400, "wrong as before": 11}, (labels,)),
        Compared("held", (Comparison(text, text, text, text), Comparison("Why?", "Because.", None, "")), {}),
    ]
