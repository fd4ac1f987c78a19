"""Runs to disturb, and what can be read of them afterwards."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.training.conftest import Attempt, Zygote, free_port
from tests.unit.trainer.builders import make_config, make_rows, make_source, write_jsonl

from tuneloop_trainer.contract import (
    ENV_NODES,
    ENV_PROCESSES,
    ENV_RENDEZVOUS,
    Checkpoint,
    ExitCode,
    Lora,
    Method,
    RunConfig,
    Stage,
    Training,
    TrainSummary,
)

EVERY_STEPS = 5


class Forward(NamedTuple):
    """One forward pass: which process did it, of which rank, for which step, on which rows."""

    worker: int
    rank: int
    step: int
    rows: tuple[str, ...]


def prepared_run(
    zygote: Zygote, base: Path, root: Path, steps: int, dropout: float = 0.1, method: str = "LoRA", **fields: Any
) -> RunConfig:
    """Two sources, so that the order is not trivial; dropout, so that random numbers count."""
    sources = [
        make_source(write_jsonl(root / "data" / "old.jsonl", make_rows(90)), weight=0.6),
        make_source(write_jsonl(root / "data" / "new.jsonl", make_rows(50, 500)), weight=0.4),
    ]
    config = make_config(
        root,
        base,
        sources,
        method=Method(type="Full") if method == "Full" else Method(type="LoRA", lora=Lora(rank=4, alpha=8, dropout=dropout)),
        training=Training(max_steps=steps, global_batch_size=4, learning_rate=5e-3, max_sequence_length=128, warmup_steps=1),
        checkpoint=Checkpoint(every_minutes=None, every_steps=EVERY_STEPS, keep=2),
        **fields,
    )
    assert zygote.run(config, Stage.PREPARE).exit_code == ExitCode.DONE
    return config


def forwards(config: RunConfig) -> Iterator[Forward]:
    """Every forward pass of every attempt, in their order."""
    file = Path(config.paths.work).parent / "samples.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        entry = json.loads(line)
        yield Forward(entry["worker"], entry["rank"], entry["step"], tuple(entry["rows"]))


def rows_by_attempt(config: RunConfig) -> dict[tuple[int, int], tuple[str, ...]]:
    """(worker, step) -> all rows of the step, micro-batch after micro-batch."""
    found: dict[tuple[int, int], tuple[str, ...]] = {}
    for forward in forwards(config):
        found[forward.worker, forward.step] = found.get((forward.worker, forward.step), ()) + forward.rows
    return found


def rows_of_steps(config: RunConfig) -> dict[int, tuple[str, ...]]:
    """What each step was given in the attempt that did it last: the one that was kept."""
    return {step: rows for (_, step), rows in rows_by_attempt(config).items()}


def losses(config: RunConfig) -> list[float]:
    log = json.loads((Path(config.paths.work) / "train" / "final" / "log.json").read_text())
    return [entry["loss"] for entry in log if "loss" in entry]


def weights(config: RunConfig) -> bytes:
    return (Path(config.paths.work) / "train" / "final" / "adapter_model.safetensors").read_bytes()


# --- several processes --------------------------------------------------------


def together(processes: int = 2) -> dict[str, str]:
    return {ENV_PROCESSES: str(processes), ENV_NODES: "1", ENV_RENDEZVOUS: f"127.0.0.1:{free_port()}"}


def rows_together(config: RunConfig) -> dict[int, list[str]]:
    """Step -> the rows that all processes saw in their last attempt at it, sorted."""
    last: dict[tuple[int, int], tuple[int, list[str]]] = {}
    for forward in forwards(config):
        key = (forward.step, forward.rank)
        worker, rows = last.get(key, (forward.worker, []))
        last[key] = (forward.worker, [*(rows if worker == forward.worker else []), *forward.rows])
    steps = {step for step, _ in last}
    return {step: sorted(row for (of, _), (_, rows) in last.items() if of == step for row in rows) for step in steps}


def wait_for_step(attempt: Attempt, config: RunConfig, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(forward.step >= step for forward in forwards(config)):
        assert not attempt.is_over(), attempt.result().message
        assert time.monotonic() < deadline
        time.sleep(0.01)


def killed_and_resumed(zygote: Zygote, config: RunConfig, rest: int = 2) -> TrainSummary:
    """Of two processes one is killed after the first checkpoint; what the next two, or the one that is left, tell."""
    attempt = zygote.start(config, Stage.TRAIN, **together())
    wait_for_step(attempt, config, EVERY_STEPS + 2)

    attempt.signal_worker(attempt.workers()[1], signal.SIGKILL)
    code = attempt.wait()
    finished = zygote.run(config, Stage.TRAIN, **together(rest)).train

    assert code == ExitCode.OUT_OF_MEMORY, "the one that was killed says why, not the one that lost it"
    assert finished is not None
    return finished
