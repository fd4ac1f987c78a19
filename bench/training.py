"""How fast the trainer trains, beside TRL and other libraries on the same machine in the same minutes.

`python -m bench.training` fine-tunes one small real model by LoRA on whole reviews, each library in a process and an environment of its
own, in interleaved rounds, and reports supervised tokens a second: tokens of answers that a loss is taken of, without padding. All see
the same rows once, in the same number of steps of the same batch. Their adapters are then judged on the same held-out rows, because
speed that learns less is none. The last line is JSON. `bench/peers.py` has what each library is told.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.environments import ROOT, Source, environment

from tuneloop_trainer.contract import Base, Checkpoint, Curation, DataSource, Lora, Method, Paths, RunConfig, Training

OURS, DEFAULT, TUNED = "ours", "trl_default", "trl_tuned"
PEERS = ("llamafactory", "axolotl", "kaito")
KAITO = Source(
    "kaito",
    "https://github.com/kaito-project/kaito",
    "056b8280b1a8debf644bc6f4399e913a1f9c7e70",
    "presets/workspace/tuning/text-generation",
)
"""Repository, commit and folder of its tuning script, which is in no package."""
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What the base's own chat template begins with."""
RANK, SEED, LEARNING_RATE = 16, 42, 2e-4
HELD_OUT = 48
WORSE = 1.01
"""A ratio is void where our held-out loss is above so many times the other's; another's speed does not count where its own is."""
SENTENCES = (2, 3, 4, 5, 7, 9)
"""Of a row: rows of different lengths, as they are in life."""
Report = dict[str, Any]  # Any: JSON


# --- the job -------------------------------------------------------------------


def write_rows(folder: Path, count: int) -> None:
    """Reviews cut into runs of sentences: the first third is the question, the rest the answer. No review is in both files."""
    from dev.demo.data import read_corpus
    from dev.demo.packages import TEXTS, fetch, packages_folder

    documents: dict[str, list[str]] = {}
    for row in read_corpus(fetch(TEXTS, packages_folder())).reviews:
        documents.setdefault(row.document, []).append(row.text)
    draw = random.Random(SEED)
    reviews = list(documents.values())
    draw.shuffle(reviews)
    rows = [row for review in reviews for row in _rows(review, draw)]
    if len(rows) < count + HELD_OUT:
        raise SystemExit(f"There are {len(rows)} rows, fewer than {count + HELD_OUT}: fewer steps or a smaller batch.")
    _write(folder / "train.jsonl", rows[:count])
    _write(folder / "held-out.jsonl", rows[-HELD_OUT:])
    messages = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in rows[:count]
    ]
    _write(folder / "messages.jsonl", messages)


def _rows(review: list[str], draw: random.Random) -> list[dict[str, str]]:
    found, left = [], review
    while len(left) >= SENTENCES[0]:
        size = draw.choice(SENTENCES)
        part, left = left[:size], left[size:]
        if len(part) >= SENTENCES[0]:
            cut = max(1, len(part) // 3)
            found.append({"prompt": f"Continue this review: {' '.join(part[:cut])}", "completion": " ".join(part[cut:])})
    return found


def _write(path: Path, rows: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def run_config(folder: Path, model: str, data: Path, options: argparse.Namespace) -> RunConfig:
    return RunConfig(
        namespace="bench",
        name="training",
        uid="0",
        paths=Paths(work=str(folder / "work"), artifact=str(folder / "artifact"), cache=str(folder / "cache")),
        base=Base(uri="pvc://models/base", path=model),
        method=Method(type="LoRA", lora=Lora(rank=RANK, alpha=RANK)),
        train=(DataSource(uri="pvc://data/train.jsonl", path=str(data / "train.jsonl")),),
        training=Training(
            max_steps=options.steps,
            global_batch_size=options.batch,
            learning_rate=LEARNING_RATE,
            warmup_steps=1,
            max_sequence_length=1024,
            seed=SEED,
        ),
        curation=Curation(deduplicate="None", decontaminate=False),
        checkpoint=Checkpoint(),
        model="bench",
        output_format="Adapter",
        threads=options.threads,
    )


# --- environments ----------------------------------------------------------------


def available(wanted: Sequence[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Interpreters of the libraries that can be run, and why the others cannot."""
    found, missing = {name: Path(sys.executable) for name in (OURS, DEFAULT, TUNED)}, {}
    for name in wanted:
        try:
            found[name] = environment(name)
            if name == "kaito":
                KAITO.fetch()
        except (subprocess.SubprocessError, OSError) as error:
            missing[name] = f"cannot be installed: {error}"[:200]
    return found, missing


# --- one training ------------------------------------------------------------------


def child(python: Path, module: Sequence[str], folder: Path, threads: int, log: Path) -> None:
    """Raises CalledProcessError."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "HF_", "PYTHON"))}
    path = [str(ROOT), *(str(ROOT / part) for part in ("operator", "trainer_image", "gateway_image"))]
    settings = {
        "PYTHONPATH": os.pathsep.join(path if python == Path(sys.executable) else path[:1]),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(folder / "hub"),
        "TOKENIZERS_PARALLELISM": "false",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    with log.open("ab") as file:
        command = [str(python), "-m", *module]
        subprocess.run(
            command, cwd=folder, env=kept | settings, stdout=file, stderr=file, stdin=subprocess.DEVNULL, check=True, timeout=1200
        )


def measure(name: str, python: Path, job: dict[str, Any], folder: Path, threads: int) -> Report:
    """One training by one library: the meter's report. Raises CalledProcessError or TimeoutExpired."""
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job | {"folder": str(folder)}))
    log, started = folder / "log", time.time()
    call = ["bench.peers", name, str(folder / "job.json"), str(folder / "report.json")]
    prepared = 0.0
    if name == OURS:
        child(python, ["bench.peers", "prepare", *call[2:], str(started)], folder, threads, log)
        prepared, started = time.time() - started, time.time()
    child(python, [*call, str(started)], folder, threads, log)
    report: Report = json.loads((folder / "report.json").read_text())
    report |= {"prepare_seconds": prepared, "seconds": time.time() - started + prepared}
    if name == OURS:
        report["micro_batch"] = json.loads((folder / "work" / "train" / "final" / "result.json").read_text())["train"]["microBatchSize"]
    return report


def judge(model: str, rows: Path, adapters: dict[str, str]) -> None:
    """Prints the held-out loss by token of each adapter, and of none."""
    import torch
    from peft import PeftModel

    from tuneloop_trainer import models
    from tuneloop_trainer.chat import Formatter, stop_ids
    from tuneloop_trainer.evaluation.scoring import held_out_losses

    tokenizer = models.load_tokenizer(Path(model), model)
    formatter = Formatter(tokenizer, stop_ids(Path(model), tokenizer), "Chat")
    items = [formatter.encode(row["prompt"], row["completion"]) for row in map(json.loads, rows.read_text().splitlines())]
    found = {}
    for name, folder in {"base": "", **adapters}.items():
        judged = models.load_model(Path(model), model, "bfloat16").eval()
        if folder:
            judged = PeftModel.from_pretrained(judged, folder).eval()
        with torch.inference_mode():
            losses = held_out_losses(judged, items, 1024, lambda _: None)
        found[name] = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    Path("judged.json").write_text(json.dumps(found))


# --- rounds ----------------------------------------------------------------------


def rounds(options: argparse.Namespace, root: Path) -> tuple[dict[str, list[Report]], dict[str, float], dict[str, str]]:
    """Reports by library and round, held-out losses, and what did not run."""
    from dev.demo import base_model
    from dev.demo.packages import cache_folder, packages_folder

    pythons, missing = available([name for name in options.peers.split(",") if name])
    model = str(options.model or base_model.ensure(cache_folder() / base_model.NAME, packages_folder()))
    write_rows(root, options.steps * options.batch)
    reports: dict[str, list[Report]] = {name: [] for name in pythons}
    adapters = {}
    names = list(pythons)
    for turn in range(options.rounds):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            if name in missing:
                continue
            folder = root / str(turn) / name
            job = job_of(options, model, root, folder)
            try:
                report = measure(name, pythons[name], job, folder, options.threads)
            except subprocess.SubprocessError as error:
                if name in (OURS, DEFAULT, TUNED):
                    raise SystemExit(f"{name} failed: {error}\n{(folder / 'log').read_text()[-3000:]}") from error
                missing[name] = f"did not run: {(folder / 'log').read_text().strip().splitlines()[-1][:200]}"
                print(f"{name} {missing[name]}", flush=True)
                if options.keep:
                    print((folder / "log").read_text()[-3000:])
                continue
            if name == OURS:
                options.micro_batch = report["micro_batch"]
            adapters.setdefault(name, str(folder / "work" / "train" / "final") if name == OURS else job["adapter"])
            reports[name].append(report)
            print(json.dumps({"round": turn + 1, "name": name} | {key: _short(value) for key, value in report.items()}), flush=True)
    if options.rounds:
        child(Path(sys.executable), ["bench.training", "--judge", json.dumps([model, str(root / "held-out.jsonl"), adapters])], root,
              options.threads, root / "judge.log")  # fmt: skip
    return {name: found for name, found in reports.items() if found}, json.loads((root / "judged.json").read_text()), missing


def job_of(options: argparse.Namespace, model: str, root: Path, folder: Path) -> dict[str, Any]:
    return {
        "model": model,
        "train": str(root / "train.jsonl"),
        "messages": str(root / "messages.jsonl"),
        "adapter": str(folder / "adapter"),
        "steps": options.steps,
        "batch": options.batch,
        "micro_batch": options.micro_batch,
        "padding_free": False,
        "learning_rate": LEARNING_RATE,
        "rank": RANK,
        "seed": SEED,
        "system": SYSTEM,
        "kaito": str(KAITO.folder),
        "run_config": run_config(folder, model, root, options).model_dump(mode="json"),
    }


def _short(value: object) -> object:
    if isinstance(value, list):
        return [_short(item) for item in value]
    return round(value, 2) if isinstance(value, float) else value


# --- what is told -------------------------------------------------------------------


def summarize(reports: dict[str, list[Report]], losses: dict[str, float], tokens: int) -> dict[str, Any]:
    """Ratios are medians over the rounds, each of two trainings of the same round."""
    speeds = {name: [tokens / report["loop_seconds"] for report in found] for name, found in reports.items()}
    ratios = {
        name: statistics.median(mine / other for mine, other in zip(speeds[OURS], speeds[name], strict=False))
        for name in speeds
        if name != OURS
    }
    void = [name for name in ratios if losses[OURS] > WORSE * losses[name]]
    counted = {name: ratio for name, ratio in ratios.items() if losses[name] <= WORSE * losses[OURS]}
    peers = {name: ratio for name, ratio in counted.items() if name not in (DEFAULT, TUNED)}
    mine = reports[OURS]

    def middle(name: str, key: str) -> float:
        return float(statistics.median(report[key] for report in reports[name]))

    return {
        "ratio_to_trl_default": round(ratios[DEFAULT], 2),
        "ratio_to_trl_tuned": round(ratios[TUNED], 2),
        "ratio_to_best_peer": round(min(peers.values()), 2) if peers else None,
        "best_peer": min(peers, key=peers.__getitem__) if peers else None,
        "peers_run": [name for name in reports if name not in (OURS, DEFAULT, TUNED)],
        "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "void": void,
        "not_counted": [name for name in ratios if name not in counted],
        "callback_overhead": round(statistics.median(report["callback_seconds"] / report["loop_seconds"] for report in mine), 5),
        "time_to_first_step_seconds": round(statistics.median(r["prepare_seconds"] + r["first_step_seconds"] for r in mine), 1),
        "first_step_seconds": {name: round(middle(name, "prepare_seconds") + middle(name, "first_step_seconds"), 1) for name in reports},
        "supervised_tokens_per_second": {name: round(statistics.median(found), 1) for name, found in speeds.items()},
        "peak_mib": {name: round(middle(name, "peak_bytes")) >> 20 for name in reports},
        "held_out_loss": {name: round(loss, 4) for name, loss in losses.items()},
        "noise": round(max(max(found) / min(found) for found in speeds.values()), 2),
        "rounds": len(mine),
    }


def supervised_tokens(root: Path) -> int:
    """Of all rows, as prepare counted them."""
    result = json.loads(next(root.glob(f"*/{OURS}/work/prepare/result.json")).read_text())["prepare"]
    return round(result["tokens"] * result["supervisedShare"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.set_defaults(micro_batch=1)  # until ours, which comes first, has chosen its own
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="folder of another base than the demo's")
    parser.add_argument("--keep", type=Path, help="leave everything in this folder")
    parser.add_argument("--judge", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.judge:
        return judge(options.judge[0], Path(options.judge[1]), options.judge[2])
    print(f"machine: {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f}", flush=True)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="tuneloop-training-"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        reports, losses, missing = rounds(options, folder.resolve())
        figures = summarize(reports, losses, supervised_tokens(folder)) | {"left_out": missing}
    finally:
        if options.keep is None:
            shutil.rmtree(folder)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
