"""A model learns each answer of a conversation, is judged by the last one of held-out ones, and resumes to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.training.test_training import InterruptAfter, losses, weights
from tests.unit.trainer.builders import BAD, GOOD, THINGS, copy_work, make_config, make_source, run_stage, write_jsonl

from tuneloop_trainer.contract import Checkpoint, Evaluation, ExitCode, Gate, Lora, Method, RunConfig, Stage, Suite, Training
from tuneloop_trainer.data.shards import read_rows

END = 2
"""The tiny tokenizer's <|im_end|>."""


def talks(count: int, start: int = 0) -> list[dict[str, object]]:
    """Each answer follows from a word of the question before it."""
    rows: list[dict[str, object]] = []
    for number in range(start, start + count):
        good = number % 2 == 0
        first, last = (f"{words[number // 2 % 5]} {THINGS[number // 10 % 10]}" for words in ((BAD, GOOD) if good else (GOOD, BAD)))
        answers = ("negative", "positive") if good else ("positive", "negative")
        turns = [("user", f"{first} {number}"), ("assistant", answers[0]), ("user", last), ("assistant", answers[1])]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns], "document": f"d{number}"})
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunConfig:
    root = tmp_path_factory.mktemp("talks")
    rows = make_source(write_jsonl(root / "data" / "gate.jsonl", talks(40, 1000)), template=None, columns={"messages": "messages"})
    suite = Suite(name="gate", type="Dataset", source=rows, labels=("negative", "positive"), metrics=("Accuracy", "Loss"))
    source = make_source(write_jsonl(root / "data" / "train.jsonl", talks(120)), template=None)
    config = make_config(
        root,
        base,
        [source],
        method=Method(type="LoRA", lora=Lora(rank=16, alpha=32)),
        training=Training(max_steps=30, global_batch_size=8, learning_rate=1e-2, max_sequence_length=96, warmup_steps=2, packing=True),
        checkpoint=Checkpoint(every_minutes=None, every_steps=10, keep=2),
        evaluation=Evaluation(suites=(suite,), gates=(Gate(suite="gate", metric="Loss", rule="Superior", min_items=10),)),
        validation_fraction=0.1,
    )
    for stage in (Stage.PREPARE, Stage.TRAIN, Stage.PACKAGE, Stage.EVALUATE):
        result = run_stage(config, stage)
        assert result.exit_code == ExitCode.DONE, result.message
    return config


def test_the_gate_asks_for_the_last_answer_behind_the_whole_conversation(trained: RunConfig) -> None:
    summary = json.loads((Path(trained.paths.work) / "evaluate" / "result.json").read_text())["evaluate"]

    (gate,) = summary["gates"]
    assert gate["n"] == 40
    assert gate["verdict"] == "Pass"
    assert gate["candidate"] < 0.5 * gate["baseline"]
    assert summary["scores"]["validation"]["loss"] < 0.5 * gate["baseline"]
    assert summary.get("probes") is None, "no user sends a whole conversation as one message"


def test_every_answer_of_a_conversation_is_learned(trained: RunConfig) -> None:
    rows = list(read_rows(Path(trained.paths.work) / "prepare", "train"))
    ends = sum(label == END for row in rows for label in row.labels)
    assert ends == 2 * sum(len(row.sequences) for row in rows), "both answers of each conversation, packed or not"
    assert losses(trained)[-1] < 0.5 * losses(trained)[0]


@pytest.mark.long
def test_a_training_on_conversations_resumes_to_the_last_bit(trained: RunConfig, tmp_path: Path) -> None:
    config = copy_work(trained, tmp_path)
    shutil.rmtree(Path(config.paths.work) / "train")
    assert run_stage(config, Stage.TRAIN, InterruptAfter(15)).exit_code == ExitCode.INTERRUPTED
    assert run_stage(config, Stage.TRAIN).exit_code == ExitCode.DONE
    assert weights(config) == weights(trained)
