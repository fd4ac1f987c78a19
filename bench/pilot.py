"""The pilot behind the demo's settings: over several seeds, does a model retrained on the drifted domain pass both gates?

For each seed it splits the data anew, fine-tunes a first model on tweets and a second one, from the same base, on half tweets and half
labelled new rows, both by the trainer's own prepare and train stages; then both are scored by label log-probability on the two gate sets
and on held-out documents, and the trainer's own gates decide: `old` NonInferior (margin 0.03), `new` Superior, each at alpha 0.05 / 5.
Run as `python -m bench.pilot --out pilot.jsonl`; one JSON line per seed is appended, so that a run cut short loses nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from dev.demo import base_model, data, settings
from dev.demo.packages import TEXTS, cache_folder, fetch, packages_folder

from tuneloop_trainer.chat import Formatter
from tuneloop_trainer.contract import Base, DataSource, Evaluation, Gate, Lora, Method, Paths, RunConfig, Stage, Suite, Template, Training
from tuneloop_trainer.evaluation.gates import Paired, decide
from tuneloop_trainer.interrupts import Interrupts
from tuneloop_trainer.progress import ProgressWriter

SCORING_BATCH = 32
TEMPLATE = Template(prompt=settings.PROMPT, completion="{{ label }}")

Hits = npt.NDArray[np.float64]
"""Per item: 1 where the model was right."""


@dataclass(frozen=True)
class Plan:
    """What may differ between pilots."""

    first_steps: int
    steps: int
    learning_rate: float
    rank: int
    alpha: int
    threads: int
    scores_test: bool


def train(config: RunConfig) -> tuple[Path, float]:
    """Prepares and trains as the product does; the adapter's folder and the seconds spent in steps. Done before: done at once."""
    from tuneloop_trainer.stages.prepare import prepare
    from tuneloop_trainer.stages.train import train as train_stage

    work = Path(config.paths.work)
    work.mkdir(parents=True, exist_ok=True)
    prepare(config, ProgressWriter(work / "progress.json", Stage.PREPARE, "pilot"))
    result = train_stage(config, ProgressWriter(work / "progress.json", Stage.TRAIN, "pilot"), Interrupts())
    assert result.train is not None
    return work / Stage.TRAIN.value / "final", result.train.seconds


def source(path: Path, weight: float = 1.0) -> DataSource:
    return DataSource(uri=f"pvc://demo/{path.name}", path=str(path), template=TEMPLATE, weight=weight)


def run_config(
    name: str, work: Path, base: Path, sources: dict[Path, float], suites: dict[str, Path], steps: int, plan: Plan, seed: int
) -> RunConfig:
    """A run as the operator would write it for the demo's manifests."""
    return RunConfig(
        namespace="pilot",
        name=name,
        uid=name,
        paths=Paths(work=str(work), artifact=str(work / "artifact"), cache=str(work / "cache")),
        base=Base(uri=f"pvc://models/{base.name}", path=str(base)),
        method=Method(type="LoRA", lora=Lora(rank=plan.rank, alpha=plan.alpha)),
        train=tuple(source(path, weight) for path, weight in sources.items()),
        training=Training(
            max_steps=steps,
            global_batch_size=settings.BATCH,
            learning_rate=plan.learning_rate,
            warmup_steps=settings.WARMUP_STEPS,
            max_sequence_length=settings.MAX_SEQUENCE_LENGTH,
            seed=seed,
        ),
        evaluation=Evaluation(
            suites=tuple(Suite(name=name, type="Dataset", source=source(path), metrics=("Accuracy",)) for name, path in suites.items())
        ),
        model="pilot",
        output_format="Adapter",
        threads=plan.threads,
    )


def score(base: Path, adapter: Path, rows: Mapping[str, Sequence[data.Row]]) -> dict[str, Hits]:
    """Per set, whether each row's label is the likelier one, with the model in bf16 as it is served."""
    from tuneloop_trainer import models
    from tuneloop_trainer.chat import stop_ids

    model = models.load_adapter(models.load_model(base, base.name, "bfloat16"), adapter)
    tokenizer = models.load_tokenizer(base, base.name)
    formatter = Formatter(tokenizer, stop_ids(base, tokenizer), "Chat")
    return {name: _hits(model, formatter, items) for name, items in rows.items()}


def _hits(model: Any, formatter: Formatter, rows: Sequence[data.Row]) -> Hits:
    """Compares the labels' first tokens, which differ; the trainer's scoring goes on to the stop token, in a second pass."""
    import torch

    encoded = [formatter.encode(settings.PROMPT.replace("{{ text }}", row.text), row.label) for row in rows]
    first = [formatter.encode("", label).completion[0] for label in settings.LABELS]
    order = sorted(range(len(rows)), key=lambda at: len(encoded[at].prompt))
    hits = np.zeros(len(rows))
    for start in range(0, len(rows), SCORING_BATCH):
        picked = order[start : start + SCORING_BATCH]
        lengths = [len(encoded[at].prompt) for at in picked]
        # Padding on the right: causal attention keeps it from what is read.
        ids = torch.tensor([encoded[at].prompt + [0] * (max(lengths) - len(encoded[at].prompt)) for at in picked])
        with torch.inference_mode():
            hidden = model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(picked)), torch.tensor(lengths) - 1]
            best = model.base_model.model.lm_head(last).float()[:, first].argmax(dim=1).tolist()
        for at, choice in zip(picked, best, strict=True):
            hits[at] = settings.LABELS[choice] == rows[at].label
    return hits


def verdict(suite: str, candidate: Hits, baseline: Hits, rows: Sequence[data.Row]) -> dict[str, Any]:
    """The product's gate over the suite, and the discordant items either way."""
    gate = Gate(suite=suite, metric="Accuracy", rule="NonInferior" if suite == "old" else "Superior")
    paired = Paired(candidate, baseline, np.ones(len(rows)), [row.document for row in rows])
    result, advice = decide(gate, paired, Evaluation().promotions_per_suite, seed=0)
    return {
        "n": result.n,
        "before": round(result.baseline, 4),
        "after": round(result.candidate, 4),
        "up": int((candidate > baseline).sum()),
        "down": int((candidate < baseline).sum()),
        "lower": round(result.lower, 4),
        "p": result.p,
        "verdict": result.verdict,
        "advice": advice,
    }


def run_seed(seed: int, plan: Plan, corpus: data.Corpus, scratch: Path) -> dict[str, Any]:
    """One seed's two trainings and its verdicts."""
    base = base_model.ensure(cache_folder() / base_model.NAME, packages_folder())
    files = data.build(corpus, seed)
    fresh, gate = data.halves(files["reviews/labelled.jsonl"])
    folder = scratch / f"seed-{seed}"
    rows = {"old": files["tweets/gate.jsonl"], "new": gate}
    if plan.scores_test:
        rows["test"] = files["reviews/test.jsonl"]
    data.write({"train.jsonl": files["tweets/train.jsonl"], "fresh.jsonl": fresh, "old.jsonl": rows["old"], "new.jsonl": gate}, folder)
    suites = {"old": folder / "old.jsonl", "new": folder / "new.jsonl"}
    old = {folder / "train.jsonl": 0.5}

    def run(name: str, sources: dict[Path, float], suites: dict[str, Path], steps: int) -> tuple[dict[str, Hits], float, float]:
        config = run_config(name, folder / name, base, sources, suites, steps, plan, seed)
        adapter, seconds = train(config)
        started = time.monotonic()
        return score(base, adapter, rows), seconds, time.monotonic() - started

    before, first_seconds, _ = run(f"first-{plan.first_steps}", old, {"old": suites["old"]}, plan.first_steps)
    after, seconds, scoring = run(f"retrained-{plan.steps}", old | {folder / "fresh.jsonl": 0.5}, suites, plan.steps)
    figures = {name: verdict(name, after[name], before[name], items) for name, items in rows.items()}
    return {
        "seed": seed,
        "first_steps": plan.first_steps,
        "steps": plan.steps,
        "fresh_rows": len(fresh),
        **figures,
        "majority": {name: _majority(items) for name, items in rows.items()},
        "both": figures["old"]["verdict"] == figures["new"]["verdict"] == "Pass",
        "first_seconds": first_seconds,
        "seconds": seconds,
        "scoring_seconds_per_item": round(scoring / sum(map(len, rows.values())), 3),
    }


def _majority(rows: Sequence[data.Row]) -> float:
    positive = sum(row.label == settings.POSITIVE for row in rows) / len(rows)
    return round(max(positive, 1 - positive), 4)


def table(lines: Sequence[str]) -> str:
    """The figures of an output file as the table of RESULTS-pilot.md."""
    head = ("seed", "old: first", "second", "up/down", "lower", "new: first", "second", "up/down", "p", "n", "both pass")
    body = [head, ("---",) * len(head)]
    for result in sorted(map(json.loads, lines), key=lambda result: int(result["seed"])):
        old, new = result["old"], result["new"]
        pairs = [(f"{suite['before']:.3f}", f"{suite['after']:.3f}", f"{suite['up']}/{suite['down']}") for suite in (old, new)]
        verdict = "yes" if result["both"] else "no"
        body.append((str(result["seed"]), *pairs[0], f"{old['lower']:+.3f}", *pairs[1], f"{new['p']:.0e}", str(new["n"]), verdict))
    return "\n".join(f"| {' | '.join(row)} |" for row in body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("pilot.jsonl"))
    parser.add_argument("--first-steps", type=int, default=settings.FIRST_STEPS)
    parser.add_argument("--steps", type=int, default=settings.RETRAINING_STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the figures in --out as a table, and run nothing")
    parser.add_argument("--gates-only", action="store_true", help="do not score the held-out documents")
    options = parser.parse_args()
    if options.table:
        print(table(options.out.read_text(encoding="utf-8").splitlines()))
        return
    rate = float(settings.LEARNING_RATE)
    plan = Plan(options.first_steps, options.steps, rate, settings.LORA_RANK, settings.LORA_ALPHA, options.threads, not options.gates_only)
    corpus = data.read_corpus(fetch(TEXTS, packages_folder()))
    for seed in options.seeds:
        line = json.dumps(run_seed(seed, plan, corpus, cache_folder() / "pilot"))
        print(line, flush=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
