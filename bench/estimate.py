"""How far the memory estimate is from what training takes: random models on a CPU, each training in a process of its own.

`python -m bench.estimate` makes a Llama for each shape, prepares rows of exactly the wanted length, trains two steps by the trainer's
own stage, and compares the peak of the resident set after imports with the operator's estimate. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from tuneloop_operator.domain.finetunejob import estimates, sizing
from tuneloop_trainer.contract import (
    TOKENS_PER_MICRO_BATCH,
    Base,
    Checkpoint,
    Curation,
    DataSource,
    ExactMatch,
    Lora,
    Method,
    Paths,
    Quantization,
    Reward,
    Rollouts,
    RunConfig,
    Stage,
    Training,
)

STEPS = 2
RANK = 16
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    family: str = "Llama"


SHAPES = {
    "wide": Shape(1024, 2816, 6, 16, 8, 4_000),
    "deep": Shape(512, 1408, 16, 8, 8, 8_000),
    "wordy": Shape(512, 1536, 6, 8, 2, 48_000),
    "t5": Shape(512, 1024, 8, 6, 6, 32_000, "T5"),  # the sizes of flan-t5-small
    "bart": Shape(768, 3072, 6, 12, 12, 16_000, "BART"),
}


@dataclass(frozen=True)
class Point:
    """One training. `batch` is the global one; the micro-batch is the trainer's choice."""

    shape: str
    method: str
    length: int
    """Tokens of a row; of a preference both answers, each with the prompt."""
    batch: int
    objective: Literal["SFT", "DPO", "SequenceClassification", "GRPO"] = "SFT"
    precision: Literal["BF16", "FP32"] = "BF16"
    processes: int = 1
    """More than one divide the model among them (FSDP)."""
    completion: int = 0
    """Tokens of the length that the model writes itself, to one prompt a step."""


GRID = (
    Point("wide", "LoRA", 128, 4),
    Point("wordy", "Full", 512, 2),
    Point("deep", "LoRA", 1024, 1),
    Point("deep", "Full", 256, 2),
    Point("wide", "LoRA", 1024, 2),
    Point("wide", "Full", 1024, 1),
    Point("wordy", "LoRA", 128, 2),
    Point("deep", "Full", 1024, 2),
    Point("deep", "LoRA", 512, 1, precision="FP32"),
    Point("wordy", "LoRA", 1024, 1),
    Point("wordy", "Full", 64, 8),
    Point("wide", "Full", 256, 4),
    Point("deep", "DoRA", 1024, 1),
    Point("wide", "DoRA", 128, 4),
    Point("wide", "QLoRA", 1024, 2),
    Point("t5", "LoRA", 1024, 1),
    Point("t5", "Full", 512, 2),
    Point("bart", "Full", 1024, 1),
    Point("bart", "LoRA", 1024, 2),
    Point("bart", "Full", 256, 2, precision="FP32"),
    Point("wordy", "Full", 64, 8, processes=2),
    Point("wide", "Full", 256, 4, processes=4),
    Point("deep", "Full", 1024, 2, processes=2),
    Point("deep", "LoRA", 512, 2, processes=2),
    Point("deep", "Full", 2048, 1),
    Point("wide", "LoRA", 2048, 1),
    Point("wide", "LoRA", 128, 16),
    Point("wide", "LoRA", 512, 2, "DPO"),
    Point("deep", "Full", 512, 2, "DPO"),
    Point("wordy", "LoRA", 1024, 1, "DPO"),
    Point("wide", "LoRA", 256, 8, "SequenceClassification"),
    Point("deep", "Full", 512, 4, "SequenceClassification"),
    Point("wordy", "Full", 128, 16, "SequenceClassification"),
    Point("deep", "LoRA", 256, 32, "GRPO", completion=192),
    Point("wide", "LoRA", 512, 8, "GRPO", completion=384),
    Point("wordy", "Full", 192, 16, "GRPO", completion=128),
)


def run_config(root: Path, point: Point) -> RunConfig:
    lora = Lora(rank=RANK, alpha=RANK, dora=point.method == "DoRA")
    method = Method(type="Full") if point.method == "Full" else Method(type="LoRA", lora=lora)
    written = None
    if point.completion:
        reward = Reward(exact_match=ExactMatch())
        written = Rollouts(rewards=(reward,), num_generations=point.batch, max_completion_length=point.completion)
    return RunConfig(
        namespace="bench",
        name="estimate",
        uid="0",
        paths=Paths(work=str(root / "work"), artifact=str(root / "artifact"), cache=str(root / "cache")),
        base=Base(uri=f"pvc://models/{point.shape}", path=str(root.parent / point.shape)),
        method=method,
        quantization=Quantization() if point.method == "QLoRA" else None,
        objective=point.objective if SHAPES[point.shape].family == "Llama" else "Seq2Seq",
        rollouts=written,
        loss="FullSequence" if point.objective == "SFT" else "CompletionOnly",
        prompt_format="Text",
        train=(DataSource(uri="pvc://data/rows.jsonl", path=str(root / "rows.jsonl")),),
        training=Training(
            max_steps=STEPS,
            global_batch_size=point.batch,
            max_sequence_length=point.length,
            warmup_steps=0,
            precision=point.precision,
            parallelism="FSDP" if point.processes > 1 else None,
        ),
        curation=Curation(deduplicate="None", decontaminate=False),
        checkpoint=Checkpoint(every_minutes=None),
        model="estimate",
        output_format="Adapter" if point.method in ("LoRA", "QLoRA") else "Merged",
        threads=1,
    )


# --- in processes of their own ------------------------------------------------


def make(root: Path, points: Sequence[Point]) -> None:
    """Each shape's model once, and for each point rows of exactly the wanted length and the prepare stage. Prints what it told."""
    for name in {point.shape: None for point in points}:
        make_model(root / name, SHAPES[name])
    told = []
    for number, point in enumerate(points):
        write_rows(root / str(number), point)
        result = _stage(root / str(number), point, Stage.PREPARE)
        assert result.prepare is not None, result
        assert result.prepare.longest_row == point.length
        assert result.prepare.model is not None
        told.append({"shape": result.prepare.model.model_dump(), "supervised_share": result.prepare.supervised_share})
    print(json.dumps(told))


def make_model(folder: Path, shape: Shape) -> None:
    """Random weights, and a tokenizer of one token a word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {("</s>", "<unk>")[number] if number < 2 else f"w{number}": number for number in range(shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if shape.family != "Llama":
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<unk>", unk_token="<unk>")
    fast.save_pretrained(folder)
    torch.set_default_dtype(torch.bfloat16)
    _random_model(shape).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def _random_model(shape: Shape):  # type: ignore[no-untyped-def]  # of transformers
    from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    if shape.family == "Llama":
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            tie_word_embeddings=True,
            eos_token_id=0,
            bos_token_id=None,
        )
        return LlamaForCausalLM(config)
    tokens = {"vocab_size": shape.vocabulary, "d_model": shape.hidden, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1}
    if shape.family == "T5":
        sizes = {"d_ff": shape.intermediate, "d_kv": 64, "num_layers": shape.layers, "num_heads": shape.heads}
        return T5ForConditionalGeneration(T5Config(feed_forward_proj="gated-gelu", **sizes, **tokens))
    sizes = {"layers": shape.layers, "ffn_dim": shape.intermediate, "attention_heads": shape.heads}
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}
    return BartForConditionalGeneration(BartConfig(max_position_embeddings=1024, **sides, **tokens))


def write_rows(root: Path, point: Point) -> None:
    root.mkdir()
    draw, shape = random.Random(0), SHAPES[point.shape]
    with (root / "rows.jsonl").open("w") as file:
        for number in range(1 if point.completion else point.batch):
            words = [f"w{draw.randrange(2, shape.vocabulary)}" for _ in range(point.length)]
            file.write(json.dumps(row_of(point, words, number)) + "\n")


def row_of(point: Point, words: list[str], number: int) -> dict[str, str]:
    """Of exactly the point's length: an answer gets one token more, its end."""
    half = point.length // 2
    if SHAPES[point.shape].family != "Llama":  # the source has an end too
        half = (point.length - 2) // 2
        return {"prompt": " ".join(words[:half]), "completion": " " + " ".join(words[half:-2])}
    match point.objective:
        case "SFT":
            return {"prompt": " ".join(words[:half]), "completion": " " + " ".join(words[half:-1])}
        case "DPO":
            prompt, chosen, rejected = words[: half // 2], words[half // 2 : half - 1], words[half : half + half - half // 2 - 1]
            return {"prompt": " ".join(prompt), "chosen": " " + " ".join(chosen), "rejected": " " + " ".join(rejected)}
        case "SequenceClassification":
            return {"text": " ".join(words), "label": ("good", "bad")[number % 2]}
        case "GRPO":
            return {"prompt": " ".join(words[: point.length - point.completion]), "completion": words[-1]}


def train(root: Path, point: Point) -> None:
    """Prints the peak of the resident set over what the imports took, and the seconds of the steps."""
    import datasets  # noqa: F401  # counted as imports
    import peft  # noqa: F401
    import trl  # noqa: F401

    import tuneloop_trainer.stages.train
    import tuneloop_trainer.training.callbacks
    import tuneloop_trainer.training.trainer  # noqa: F401

    imports = _resident("VmRSS")
    result = _stage(root, point, Stage.TRAIN)
    assert result.train is not None, result
    report = {"imports": imports, "measured": _resident("VmHWM") - imports}
    print(json.dumps(report | {"micro_batch": result.train.micro_batch_size, "seconds": result.train.seconds}))


def _stage(root: Path, point: Point, stage: Stage):  # type: ignore[no-untyped-def]  # StageResult: the trainer is imported late
    from tuneloop_trainer.interrupts import Interrupts
    from tuneloop_trainer.progress import ProgressWriter
    from tuneloop_trainer.worker import run

    return run(stage, run_config(root, point), ProgressWriter(root / "progress.json", stage, "bench"), Interrupts())


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


# --- the grid -----------------------------------------------------------------


def measure(root: Path, point: Point, made: dict[str, object]) -> dict[str, object]:
    with ThreadPoolExecutor(point.processes) as pool:
        places = [_place(rank, point.processes) for rank in range(point.processes)]
        port = {"MASTER_PORT": str(_free_port())}
        each = list(pool.map(lambda place: _child("train", root, asdict(point), place | port), places))
    trained = max(each, key=lambda one: one["measured"])
    workload = workload_of(point, made)
    if trained["micro_batch"] != workload.micro_batch:
        raise SystemExit(f"{point}: the trainer took micro-batches of {trained['micro_batch']}, not {workload.micro_batch}")
    predicted = estimates.peak_memory(workload) - estimates.IMPORTS
    measured = trained["measured"]
    flops = estimates.flops_per_token(workload) * STEPS * point.batch * point.length
    return asdict(point) | {
        "predicted_mib": predicted >> 20,
        "measured_mib": measured >> 20,
        "imports_mib": trained["imports"] >> 20,
        "error": round(abs(predicted - measured) / measured, 3),
        "gflops": round(flops / trained["seconds"] / 1e9, 1),
    }


def workload_of(point: Point, made: dict[str, object]) -> estimates.Workload:
    """As the operator would make it of the job and of what prepare told."""
    limit = max(1, TOKENS_PER_MICRO_BATCH["cpu"] // point.length)
    of_process = point.batch // point.processes
    micro = max(size for size in range(1, of_process + 1) if of_process % size == 0 and size <= limit)
    return estimates.Workload(
        shape=estimates.ModelShape.model_validate(made["shape"]),
        method="Full" if point.method == "Full" else "LoRA",
        dora=point.method == "DoRA",
        quantized=point.method == "QLoRA",
        rank=RANK,
        only_attention=False,
        precision=point.precision,
        device="cpu",
        micro_batch=micro,
        accumulation=of_process // micro,
        longest=point.length,
        supervised_share=point.completion / point.length or float(str(made["supervised_share"])),
        checkpointing=False,
        shares=point.processes,
        has_reference=point.method == "Full" and point.objective in sizing.WITH_REFERENCE,
        predicts_tokens=point.objective not in sizing.WITHOUT_TOKENS,
        completion=point.completion,
    )


def _place(rank: int, size: int) -> dict[str, str]:
    """As the launcher tells its workers."""
    if size == 1:
        return {}
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return dict(zip(names, (str(rank), str(rank), str(size), str(size), "127.0.0.1"), strict=True))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(step: str, root: Path, what: object, more: Mapping[str, str] = MappingProxyType({})):  # type: ignore[no-untyped-def]  # JSON of the step
    command = [sys.executable, "-m", "bench.estimate", "--step", step, "--root", str(root), "--what", json.dumps(what)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT | more, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{step} of {what} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.estimate", description=__doc__)
    parser.add_argument("--points", type=int, default=len(GRID), help="measure the first so many points (default: all)")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="measure points of these shapes only (default: all)"
    )
    parser.add_argument("--divided", action="store_true", help="measure only points of several processes")
    parser.add_argument("--after", type=int, default=0, help="leave out the first so many (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time (default: %(default)s)")
    parser.add_argument("--step", choices=("make", "train"), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--what", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.step == "make":
        return make(arguments.root, [Point(**point) for point in arguments.what])
    if arguments.step == "train":
        return train(arguments.root, Point(**arguments.what))
    points = [point for point in GRID if point.processes > 1 or not arguments.divided]
    points = [point for point in points[arguments.after : arguments.points] if point.shape in arguments.shapes]
    found = []
    with tempfile.TemporaryDirectory(prefix="tuneloop-estimate-") as folder, ThreadPoolExecutor(arguments.workers) as pool:
        root = Path(folder)
        made = _child("make", root, [asdict(point) for point in points])
        for row in pool.map(measure, [root / str(number) for number in range(len(points))], points, made):
            print(json.dumps(row), flush=True)
            found.append(row)
    errors = [float(str(row["error"])) for row in found]
    sizes = [int(str(row["measured_mib"])) for row in found]
    print(
        json.dumps(
            {
                "points": len(found),
                "median_error": round(statistics.median(errors), 3),
                "max_error": max(errors),
                "span": round(max(sizes) / min(sizes), 1),
                "imports_mib": max(int(str(row["imports_mib"])) for row in found),
            }
        )
    )


if __name__ == "__main__":
    main()
