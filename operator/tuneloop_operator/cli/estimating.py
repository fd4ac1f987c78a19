"""`tuneloop estimate`: what a FineTuneJob's training will need, told without a cluster."""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tuneloop_operator.api import finetunejob
from tuneloop_operator.api.finetunejob import FineTuneJob, Resolved
from tuneloop_operator.cli.errors import Failure
from tuneloop_operator.cli.rendering import read_manifests
from tuneloop_operator.domain.decision import Invalid
from tuneloop_operator.domain.finetunejob import sizing
from tuneloop_operator.domain.finetunejob.resolve import refuse_unreadable
from tuneloop_operator.render.run_config import run_config
from tuneloop_operator.settings import read_settings
from tuneloop_trainer.contract import ModelShape

if TYPE_CHECKING:
    from argparse import _SubParsersAction

MAX_CONFIG = 1 << 20
MAX_HEADER = 100 << 20


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "estimate",
        help="tell what a FineTuneJob's training will need",
        description="Prints, as JSON, what status.estimate would say: peak memory, disk, micro-batch, hours and cost. Exits with 1 where "
        "the training does not fit, with the smallest change that does. What prepare would find in the data is given by options.",
    )
    command.add_argument("-f", "--file", required=True, type=Path, metavar="FILE", help="manifest of one FineTuneJob; - reads stdin")
    command.add_argument(
        "--model", required=True, type=Path, metavar="FOLDER", help="the base model: its config.json and *.safetensors (headers are read)"
    )
    command.add_argument("--rows", type=_positive, default=1000, help="training rows (default: %(default)s)")
    command.add_argument("--tokens", type=_positive, help="tokens of a row on average (default: half of the longest)")
    command.add_argument("--longest", type=_positive, help="tokens of the longest row (default: training.maxSequenceLength)")
    command.add_argument("--supervised", type=_share, default=1.0, metavar="SHARE", help="share of tokens that are learned (default: 1)")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """The estimate to stdout. Raises Failure, also where the training does not fit."""
    job = read_job(arguments.file)
    _refuse(job)
    shape = read_shape(arguments.model)
    config = run_config(job, Resolved())
    training = config.training
    longest = min(arguments.longest or training.max_sequence_length, training.max_sequence_length)
    steps = training.max_steps or max(1, round(arguments.rows * training.epochs / training.global_batch_size))
    facts = sizing.Facts(
        shape=shape,
        longest=longest,
        supervised_share=arguments.supervised,
        tokens=arguments.rows * min(arguments.tokens or max(1, longest // 2), longest),
        rows=arguments.rows,
        max_steps=steps,
    )
    found = sizing.size(job, config, facts, read_settings())
    print(json.dumps(found.estimate.model_dump(mode="json", by_alias=True, exclude_none=True), indent=2))
    if found.problem is not None:
        raise Failure(f"DoesNotFit: {found.problem}")


def _refuse(job: FineTuneJob) -> None:
    """What the operator makes no Job for. Raises Failure."""
    try:
        refuse_unreadable(job.spec)
    except Invalid as problem:
        raise Failure(f"{problem.reason}: {problem.message}") from problem


def read_job(path: Path) -> FineTuneJob:
    """The one FineTuneJob of a file. Raises Failure."""
    found = [manifest for manifest in read_manifests(path) if manifest["kind"] == finetunejob.KIND]
    if len(found) != 1:
        raise Failure(f"{path} holds {len(found)} FineTuneJobs; one is estimated at a time.")
    try:
        return FineTuneJob.model_validate(found[0])
    except ValidationError as error:
        wrong = error.errors()[0]
        raise Failure(f"FineTuneJob {found[0]['metadata']['name']}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}.") from error


def read_shape(folder: Path) -> ModelShape:
    """The model's shape, without loading a weight. Raises Failure."""
    try:
        with (folder / "config.json").open("rb") as file:
            config = json.loads(file.read(MAX_CONFIG))
        headers = list(_headers(folder))
    except (OSError, ValueError, struct.error) as error:
        raise Failure(f"cannot read the model in {folder}: {error}.") from error
    shape = ModelShape.of(config, headers) if isinstance(config, dict) else None
    if shape is None:
        raise Failure(f"{folder} has no safetensors weights, or a config.json that does not tell layers, heads and sizes.")
    return shape


def _headers(folder: Path) -> Iterator[dict[str, Any]]:
    """The JSON at the beginning of each safetensors file, behind its length in eight bytes."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise ValueError(f"{path.name} is no safetensors file")
            header = json.loads(file.read(length))
            yield header if isinstance(header, dict) else {}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value
