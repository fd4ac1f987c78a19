"""The order in which rows are trained on: one fixed sequence for the whole run, addressed by samples consumed.

A resumed attempt takes the sequence up where the checkpoint's count of samples says, whatever its micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Order = npt.NDArray[np.int64]


def total_steps(rows: int, epochs: float, max_steps: int | None, global_batch: int) -> int:
    """Optimizer steps of the run; the last batch is filled from the next epoch."""
    return max_steps if max_steps is not None else max(1, math.ceil(epochs * rows / global_batch))


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """Samples per source: exactly `total` in all, each within one of its share (largest remainders)."""
    share = sum(weights)
    exact = [total * weight / share for weight in weights]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def sample_order(rows_per_source: Sequence[int], weights: Sequence[float], total: int, seed: int) -> Order:
    """`total` row indices (rows are numbered source after source).

    Each source is walked in a new permutation per epoch, so no row comes up twice more often than another of its source.
    Sources are mixed evenly: the k-th sample of a source with n of them stands near k / n of the run.
    """
    usable = [weight if rows else 0.0 for weight, rows in zip(weights, rows_per_source, strict=True)]
    counts = quotas(usable, total)
    offsets = np.concatenate(([0], np.cumsum(rows_per_source)[:-1]))
    indices, places = [], []
    for source, (rows, count) in enumerate(zip(rows_per_source, counts, strict=True)):
        if count == 0:
            continue
        random = np.random.default_rng([seed, source])
        epochs = [random.permutation(rows) for _ in range(math.ceil(count / rows))]
        indices.append(offsets[source] + np.concatenate(epochs)[:count])
        places.append((np.arange(count) + random.random()) / count)
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.asarray(np.concatenate(indices)[order], dtype=np.int64)


def by_length_within_batches(order: Order, lengths: npt.NDArray[np.int64], global_batch: int) -> Order:
    """The same global batches, each with its longest rows first: micro-batches hold rows of like length, and a step that
    does not fit fails at once."""
    batches = order.reshape(-1, global_batch)
    ranks = np.argsort(-lengths[batches], axis=1, kind="stable")
    return np.asarray(np.take_along_axis(batches, ranks, axis=1).reshape(-1))
