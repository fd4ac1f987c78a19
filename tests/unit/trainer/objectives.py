"""Runs of every objective: small, and with rows whose answers follow from them."""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.unit.trainer.builders import make_config, replace, write_jsonl

from tuneloop_trainer.contract import (
    HELD_OUT_METRICS,
    Base,
    Checkpoint,
    Classification,
    Custom,
    DataSource,
    Dpo,
    Evaluation,
    ExactMatch,
    Gate,
    Kto,
    Lora,
    Method,
    ObjectiveType,
    Reward,
    Rollouts,
    RunConfig,
    Scratch,
    Seq2Seq,
    Suite,
    Training,
)

THINGS = ("day", "tea", "song", "film", "street", "letter", "garden", "answer", "morning", "story")


def row(objective: str, number: int) -> dict[str, object]:
    """A row whose answer follows from one word of it, in the columns that the objective reads."""
    good = number % 2 == 0
    prompt = f"{'sunny' if good else 'rainy'} {THINGS[number // 2 % 10]} {number}"
    answer, other = ("positive", "negative") if good else ("negative", "positive")
    match objective:
        case "Pretraining":
            return {"text": f"{prompt} is {answer} because the {THINGS[number % 7]} said so. " * (1 + number % 3)}
        case "SequenceClassification":
            return {"text": prompt, "label": answer}
        case "Seq2Seq":
            return {"prompt": prompt, "completion": f"{answer} {THINGS[number // 2 % 10]}"}
        case "DPO" | "RewardModel":
            return {"prompt": prompt, "chosen": answer, "rejected": other}
        case "KTO":
            liked = number // 2 % 2 == 0
            return {"prompt": prompt, "completion": answer if liked else other, "desirable": liked}
    return {"prompt": prompt, "completion": answer}


def source(root: Path, objective: str, name: str, first: int, count: int) -> DataSource:
    path = write_jsonl(root / "data" / f"{name}.jsonl", [row(objective, number) for number in range(first, first + count)])
    return DataSource(uri=f"pvc://data/{name}.jsonl", path=str(path))


# A rate at which the first ten steps are not the whole of what is learned.
RATES = {"SequenceClassification": 2e-3, "RewardModel": 5e-3}
BATCHES = {"GRPO": 32, "RLOO": 32}
WRITING = {"num_generations": 8, "max_completion_length": 4, "beta": 0.001}
FORMATS = {"Seq2Seq": "Text"}
SETTINGS: dict[str, dict[str, Any]] = {
    "SFT": {},
    "Pretraining": {},
    "SequenceClassification": {"classification": Classification(class_weights="Balanced")},
    "Seq2Seq": {"seq2seq": Seq2Seq(max_answer_tokens=12, beams=2)},
    "DPO": {"dpo": Dpo(beta=0.1)},
    "KTO": {"kto": Kto(beta=0.1)},
    "RewardModel": {},
    "GRPO": {"rollouts": Rollouts(rewards=(Reward(exact_match=ExactMatch(match="Contains")),), **WRITING)},
    "RLOO": {"rollouts": Rollouts(rewards=(Reward(exact_match=ExactMatch(match="Contains")),), **WRITING)},
}


def make_run(root: Path, base: Path, objective: ObjectiveType, steps: int = 24, seed: int = 42, **fields: Any) -> RunConfig:
    """A LoRA run over 80 rows, with a suite of 20 unseen ones."""
    batch = BATCHES.get(objective, 8)
    metrics = HELD_OUT_METRICS[objective]
    rate = RATES.get(objective, 1e-2)
    suite = Suite(name="gate", type="Dataset", source=source(root, judged_as(objective), "gate", 1000, 20), metrics=metrics)
    gate = Gate(suite="gate", metric=metrics[0], rule="Superior", min_items=10)  # type: ignore[arg-type]
    values: dict[str, Any] = {
        "objective": objective,
        "method": Method(type="LoRA", lora=Lora(rank=8, alpha=16)),
        "training": Training(
            max_steps=steps,
            global_batch_size=batch,
            learning_rate=rate,
            max_sequence_length=48,
            warmup_steps=2,
            precision="FP32",
            seed=seed,
        ),
        "checkpoint": Checkpoint(every_minutes=None, every_steps=10, keep=2),
        "evaluation": Evaluation(suites=(suite,), gates=(gate,)),
        "output_format": "Merged",
        "prompt_format": FORMATS.get(objective, "Chat"),
        **SETTINGS[objective],
    }
    return make_config(root, base, [source(root, objective, "train", 0, 80)], **(values | fields))


def judged_as(objective: str) -> str:
    """Whose columns a suite of the objective has."""
    return "SFT" if objective == "KTO" else objective


def rewarded(root: Path, base: Path, *rewards: Reward, steps: int = 2, **fields: Any) -> RunConfig:
    return make_run(root, base, "GRPO", steps=steps, rollouts=Rollouts(rewards=rewards, **(WRITING | fields)))


# --- from scratch ---

SMALL = Scratch(
    family="Llama", layers=2, hidden_size=64, heads=4, key_value_heads=2, intermediate_size=128, tie_embeddings=True, vocabulary_size=400
)


def make_scratch(root: Path, asked: Scratch = SMALL, base: Base | None = None, seed: int = 42, steps: int = 60, **fields: Any) -> RunConfig:
    """A run over 200 texts, judged by 40 unseen ones."""
    suite = Suite(name="texts", type="Dataset", source=source(root, "Pretraining", "gate", 1000, 40), metrics=("Loss",))
    gate = Gate(suite="texts", metric="Loss", rule="Superior", min_items=10)
    values: dict[str, Any] = {
        "objective": "Pretraining",
        "scratch": asked,
        "base": base or Base(uri="the training rows"),
        "method": Method(type="Full"),
        "prompt_format": "Text",
        "training": Training(
            max_steps=steps, global_batch_size=8, learning_rate=3e-3, max_sequence_length=64, warmup_steps=2, precision="FP32", seed=seed
        ),
        "checkpoint": Checkpoint(every_minutes=None, every_steps=10, keep=2),
        "evaluation": Evaluation(suites=(suite,), gates=(gate,)),
        "output_format": "Merged",
    }
    return make_config(root, root / "none", [source(root, "Pretraining", "train", 0, 200)], **(values | fields))


def made(config: RunConfig) -> Path:
    return Path(config.paths.work) / "prepare" / "base"


# --- of a derived image ---

PLUGINS = Path(__file__).parents[3] / "examples" / "objectives"


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: str, module: str) -> Path:
    """The example's package, as pip would install it into the image."""
    site, folder = tmp_path / "site", PLUGINS / example
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    about = site / f"{module}-{project['version']}.dist-info"
    about.mkdir(parents=True)
    lines = [f"[{group}]\n{name} = {target}" for group, points in project["entry-points"].items() for name, target in points.items()]
    (about / "entry_points.txt").write_text("\n".join(lines))
    (about / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    shutil.copy(folder / f"{module}.py", site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, module, raising=False)
    return site


def make_custom(root: Path, base: Path, name: str = "dynamic-fine-tuning", **settings: str) -> RunConfig:
    config = make_run(root, base, "SFT")
    return replace(config, objective="Custom", custom=Custom(name=name, settings=settings))
