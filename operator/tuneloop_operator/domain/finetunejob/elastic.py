"""Elastic training: where nodes are missing, an attempt on those there are takes the place of the one that waits for all."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from tuneloop_operator.api.finetunejob import FineTuneJob
from tuneloop_operator.domain import times
from tuneloop_operator.domain.finetunejob.snapshot import StageRun
from tuneloop_operator.render import together

PLACING_SECONDS = 60.0
"""So long pods may find no node before training goes on without them: what a scheduler needs, not what a new machine does."""


@dataclass(frozen=True)
class Fewer:
    """What a training that lacks nodes could go on with."""

    nodes: int
    seconds_left: float
    """Until it does."""


def fewer(job: FineTuneJob, run: StageRun, now: datetime, *, is_sharded: bool) -> Fewer | None:
    """The most nodes that there are and that share the global batch evenly; None where none are missing, or too many."""
    newest = {pod.index: pod for pod in run.pods}
    missing = [pod for pod in newest.values() if pod.is_unschedulable]
    least = together.fewest_nodes(job, is_sharded=is_sharded)
    batch, processes = job.spec.training.global_batch_size, together.processes_of_node(job)
    counts = range(run.nodes - len(missing), least - 1, -1)
    nodes = next((count for count in counts if batch % (count * processes) == 0), None)
    if not missing or nodes is None:
        return None
    since = max(pod.metadata.creation_timestamp for pod in missing)
    return Fewer(nodes, PLACING_SECONDS - times.seconds_between(since, now))
