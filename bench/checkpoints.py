"""How long a training stands still for a checkpoint, published before the next step or beside it.

`python -m bench.checkpoints` trains all weights of one model of `bench/estimate.py` by the trainer's own stages, in rounds that take turns,
and reports the seconds that saves between the first and the last took away from the steps, and those of the whole loop without the last
save, which is always published before the run ends. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from bench.estimate import SHAPES, Point, make_model, run_config, write_rows

from tuneloop_trainer.contract import Checkpoint, ExitCode, RunConfig, Stage
from tuneloop_trainer.interrupts import Interrupts
from tuneloop_trainer.progress import ProgressWriter
from tuneloop_trainer.worker import run

Publish = Literal["Asynchronous"] | None
NAMES: dict[Publish, str] = {None: "synchronous", "Asynchronous": "asynchronous"}


def measure(root: Path, point: Point, publish: Publish, options: argparse.Namespace) -> dict[str, Any]:
    """One training. The disk has nothing to write when it begins."""
    from tuneloop_trainer.training.trainer import Resumable

    stalls: list[float] = []
    original = Resumable._save_checkpoint

    def timed(self: Any, *args: Any, **kwargs: Any) -> None:
        started = time.monotonic()
        original(self, *args, **kwargs)
        stalls.append(time.monotonic() - started)

    config = _config(root, point, publish, options)
    write_rows(root, point)
    _run(config, root, Stage.PREPARE)
    os.sync()
    Resumable._save_checkpoint = timed  # type: ignore[method-assign]
    try:
        seconds = _run(config, root, Stage.TRAIN).train.seconds
    finally:
        Resumable._save_checkpoint = original  # type: ignore[method-assign]
    mib = sum(path.stat().st_size for path in root.rglob("final/*")) >> 20
    shutil.rmtree(root)
    *between, last = stalls
    return {
        "publish": NAMES[publish],
        "stalls": [round(stall, 2) for stall in between],
        "stall_seconds": round(statistics.median(between), 3),
        "loop_seconds": round(seconds - last, 2),
        "weights_mib": mib,
    }


def _config(root: Path, point: Point, publish: Publish, options: argparse.Namespace) -> RunConfig:
    config = run_config(root, point)
    return config.model_copy(
        update={
            "training": config.training.model_copy(update={"max_steps": options.every * options.checkpoints + 1}),
            "checkpoint": Checkpoint(every_minutes=None, every_steps=options.every, keep=1, publish=publish),
            "threads": options.threads,
        }
    )


def _run(config: RunConfig, root: Path, stage: Stage) -> Any:
    result = run(stage, config, ProgressWriter(root / "progress.json", stage, "bench"), Interrupts())
    if result.exit_code != ExitCode.DONE:
        raise SystemExit(result.message)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.checkpoints", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoints", type=int, default=3, help="before the last one (default: %(default)s)")
    parser.add_argument("--every", type=int, default=8, help="steps (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--store", type=Path, help="a folder of the file system to measure (default: that of temporary files)")
    options = parser.parse_args(argv)
    point, ratios, loops, found = Point(options.shape, "Full", 64, 2), [], [], []
    with tempfile.TemporaryDirectory(prefix="tuneloop-checkpoints-", dir=options.store) as folder:
        root = Path(folder)
        make_model(root / point.shape, SHAPES[point.shape])
        for number in range(options.rounds):
            order: tuple[Publish, ...] = (None, "Asynchronous") if number % 2 == 0 else ("Asynchronous", None)
            of = {publish: measure(root / "run", point, publish, options) for publish in order}
            for one in of.values():
                print(json.dumps(one), flush=True)
            ratios.append(of[None]["stall_seconds"] / of["Asynchronous"]["stall_seconds"])
            loops.append(of[None]["loop_seconds"] / of["Asynchronous"]["loop_seconds"])
            found.append(of)
    report = {f"{NAMES[publish]}_stall_seconds": statistics.median(of[publish]["stall_seconds"] for of in found) for publish in NAMES}
    print(json.dumps(report | {"stall_ratio": round(statistics.median(ratios), 2), "loop_ratio": round(statistics.median(loops), 3)}))


if __name__ == "__main__":
    main()
