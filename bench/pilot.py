"""The pilot behind the demo's settings: over several seeds, does a model retrained on the drifted domain pass both gates?

For each seed it splits the data anew, fine-tunes a first model on tweets and a second one, from the same base, on half tweets and half
labelled new rows, both by the trainer's own prepare and train stages; then it scores both by label log-probability on the two gate sets
and on held-out documents. The gates are the product's: `old` NonInferior (margin 0.03), `new` Superior, each at alpha 0.05 / 5.
Run as `python -m bench.pilot --out pilot.jsonl`; one JSON line per seed is appended, so that a run cut short loses nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from dev.demo import base_model, data, settings
from dev.demo.packages import TEXTS, cache_folder, fetch, packages_folder
from scipy.stats import binomtest, norm

from tuneloop_trainer import models
from tuneloop_trainer.contract import Base, DataSource, Evaluation, Lora, Method, Paths, RunConfig, Stage, Suite, Template, Training
from tuneloop_trainer.interrupts import Interrupts
from tuneloop_trainer.progress import ProgressWriter

ALPHA = 0.05 / 5
MARGIN = 0.03
SCORING_BATCH = 16
TEMPLATE = Template(prompt=settings.PROMPT, completion="{{ label }}")

Hits = npt.NDArray[np.bool_]
"""Per item: was it right?"""


@dataclass(frozen=True)
class Plan:
    """What may differ between pilots."""

    first_steps: int
    steps: int
    learning_rate: float
    rank: int
    alpha: int
    threads: int


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


def score(base: Path, adapter: Path, rows: dict[str, Sequence[data.Row]]) -> dict[str, Hits]:
    """Per set, whether each row's label is the likelier one, with the model in bf16 as it is served."""
    model = models.load_adapter(models.load_model(base, base.name, "bfloat16"), adapter)
    tokenizer = models.load_tokenizer(base, base.name)
    return {name: _hits(model, tokenizer, items) for name, items in rows.items()}


def _hits(model: Any, tokenizer: Any, rows: Sequence[data.Row]) -> Hits:
    """Both labels are one token each, so the logits behind the prompt say which is likelier."""
    import torch

    choices = [tokenizer.encode(label, add_special_tokens=False) for label in settings.LABELS]
    assert all(len(choice) == 1 for choice in choices)
    prompts = [_prompt_ids(tokenizer, row) for row in rows]
    order = sorted(range(len(rows)), key=lambda at: len(prompts[at]))
    hits = np.zeros(len(rows), dtype=np.bool_)
    for start in range(0, len(rows), SCORING_BATCH):
        picked = order[start : start + SCORING_BATCH]
        longest = max(len(prompts[at]) for at in picked)
        # Padding on the right: causal attention keeps it from what is read.
        ids = torch.tensor([prompts[at] + [0] * (longest - len(prompts[at])) for at in picked])
        with torch.inference_mode():
            hidden = model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(picked)), torch.tensor([len(prompts[at]) - 1 for at in picked])]
            best = model.base_model.model.lm_head(last).float()[:, [choice[0] for choice in choices]].argmax(dim=1)
        for at, choice in zip(picked, best.tolist(), strict=True):
            hits[at] = settings.LABELS[choice] == rows[at].label
    return hits


def _prompt_ids(tokenizer: Any, row: data.Row) -> list[int]:
    user = {"role": "user", "content": settings.PROMPT.replace("{{ text }}", row.text)}
    ids: list[int] = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
    return ids


def compare(candidate: Hits, baseline: Hits) -> dict[str, float | int]:
    """Paired figures of one suite: one-sided exact McNemar p, and Newcombe's lower bound of the difference at ALPHA."""
    up, down = int((candidate & ~baseline).sum()), int((~candidate & baseline).sum())
    return {
        "n": len(candidate),
        "before": round(float(baseline.mean()), 4),
        "after": round(float(candidate.mean()), 4),
        "up": up,
        "down": down,
        "p": float(binomtest(up, up + down, alternative="greater").pvalue) if up + down else 1.0,
        "lower": round(newcombe_lower(candidate, baseline), 4),
    }


def newcombe_lower(candidate: Hits, baseline: Hits) -> float:
    """One-sided lower bound of the difference of two paired proportions (Newcombe 1998, Statistics in Medicine 17:2635, method 10)."""
    n = len(candidate)
    both, up = int((candidate & baseline).sum()), int((candidate & ~baseline).sum())
    down, neither = int((~candidate & baseline).sum()), int((~candidate & ~baseline).sum())
    first, second = (both + up) / n, (both + down) / n
    below, above = first - _wilson(first, n)[0], _wilson(second, n)[1] - second
    cross = float(both * neither - up * down)
    if cross > 0:
        cross = max(cross - n / 2, 0.0)
    scale = float((both + up) * (down + neither) * (both + down) * (up + neither)) ** 0.5
    phi = cross / scale if scale else 0.0
    return float(first - second - (below**2 - 2 * phi * below * above + above**2) ** 0.5)


def _wilson(share: float, n: int) -> tuple[float, float]:
    z = float(norm.ppf(1 - ALPHA))
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def run_seed(seed: int, plan: Plan, corpus: data.Corpus, scratch: Path) -> dict[str, Any]:
    """One seed's two trainings and its verdicts."""
    base = base_model.ensure(cache_folder() / base_model.NAME, packages_folder())
    files = data.build(corpus, seed)
    fresh, gate = data.halves(files["reviews/labelled.jsonl"])
    folder = scratch / f"seed-{seed}"
    rows: dict[str, Sequence[data.Row]] = {"old": files["tweets/gate.jsonl"], "new": gate, "test": files["reviews/test.jsonl"]}
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
    figures = {name: compare(after[name], before[name]) for name in rows}
    passed = {"old": figures["old"]["lower"] > -MARGIN, "new": figures["new"]["p"] < ALPHA}
    return {
        "seed": seed,
        "first_steps": plan.first_steps,
        "steps": plan.steps,
        "fresh_rows": len(fresh),
        **figures,
        "majority": {name: _majority(items) for name, items in rows.items()},
        "passed": passed,
        "both": all(passed.values()),
        "first_seconds": first_seconds,
        "seconds": seconds,
        "scoring_seconds_per_item": round(scoring / sum(map(len, rows.values())), 3),
    }


def _majority(rows: Sequence[data.Row]) -> float:
    positive = sum(row.label == settings.POSITIVE for row in rows) / len(rows)
    return round(max(positive, 1 - positive), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("pilot.jsonl"))
    parser.add_argument("--first-steps", type=int, default=settings.FIRST_STEPS)
    parser.add_argument("--steps", type=int, default=settings.RETRAINING_STEPS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rate = float(settings.LEARNING_RATE)
    plan = Plan(options.first_steps, options.steps, rate, settings.LORA_RANK, settings.LORA_ALPHA, options.threads)
    corpus = data.read_corpus(fetch(TEXTS, packages_folder()))
    for seed in options.seeds:
        line = json.dumps(run_seed(seed, plan, corpus, cache_folder() / "pilot"))
        print(line, flush=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
