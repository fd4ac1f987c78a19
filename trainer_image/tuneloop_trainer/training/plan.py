"""The plan of a training run: data order, micro-batch, and the hash by which checkpoints belong to it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tuneloop_trainer.contract import TOKENS_PER_MICRO_BATCH, RunConfig, StageResult
from tuneloop_trainer.data.schedule import Order, by_length_within_batches, sample_order
from tuneloop_trainer.errors import Invalid, StageError
from tuneloop_trainer.stages.outputs import run_key


@dataclass(frozen=True)
class Plan:
    order: Order
    max_steps: int
    global_batch: int
    micro_batch: int
    key: str
    processes: int = 1
    is_sharded: bool = False
    """Whether weights, gradients and optimiser are divided over the processes, and checkpoints written in parts."""

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.micro_batch * self.processes)


def make_plan(
    config: RunConfig,
    prepared: StageResult,
    rows_per_source: list[int],
    lengths: npt.NDArray[np.int64],
    device: str,
    least: int = 1,
    processes: int = 1,
    repeats: int = 1,
) -> Plan:
    """The whole run's sequence of rows; the same for every attempt, whatever its micro-batch and however many processes share it.
    A row stands there as many times as it counts in a batch."""
    if prepared.prepare is None:
        raise StageError("The result of prepare has no summary.")
    steps, batch = prepared.prepare.max_steps, config.training.global_batch_size
    weights = [source.weight for source in config.train]
    rows = batch // repeats
    order = sample_order(rows_per_source, weights, steps * rows, config.training.seed)
    order = np.repeat(by_length_within_batches(order, lengths, rows), repeats)
    content = f"{run_key(config)} {prepared.prepare.shards_digest} {prepared.prepare.base_digest}".encode() + order.tobytes()
    is_sharded = config.training.parallelism == "FSDP"
    if is_sharded:
        content += b"FSDP"  # neither kind of checkpoint is taken for the other
    if batch % processes:
        raise Invalid(f"training.globalBatchSize {batch} cannot be shared by {processes} processes: make it a multiple.")
    micro = micro_batch(batch // processes, config.training.micro_batch_size, int(lengths[order].max()), device, least)
    return Plan(order, steps, batch, micro, hashlib.sha256(content).hexdigest(), processes, is_sharded)


def micro_batch(global_batch: int, configured: int | None, longest: int, device: str, least: int = 1) -> int:
    """The largest divisor of the global batch that is not above what is configured, or fits the device's tokens; the smallest
    that is at least `least` where none is."""
    if global_batch < least:
        raise Invalid(f"This objective needs micro-batches of {least} rows: training.globalBatchSize must be at least {least}.")
    limit = configured if configured is not None else max(1, TOKENS_PER_MICRO_BATCH[device] // max(longest, 1))
    sizes = [size for size in range(least, global_batch + 1) if global_batch % size == 0]
    return max([size for size in sizes if size <= limit], default=sizes[0])
