"""What a job's training will need on the devices that it asks for, and the smallest change that makes it fit where it does not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tuneloop_operator.api.finetunejob import Estimate, FineTuneJob
from tuneloop_operator.api.objectives import DIVIDED
from tuneloop_operator.domain.finetunejob import estimates
from tuneloop_operator.domain.finetunejob.devices import CPU_CORE, Device, device_of
from tuneloop_operator.domain.finetunejob.estimates import Workload
from tuneloop_operator.render import together
from tuneloop_operator.settings import Settings
from tuneloop_trainer.contract import TOKENS_PER_MICRO_BATCH, ModelShape, PrepareSummary, RunConfig

SUFFIXES = {"": 1, "m": 0.001, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
QUANTITY = re.compile(r"^([0-9.]+)([A-Za-z]*)$")
SHORTEST = 64
"""Tokens below which a shorter sequence is no remedy."""
WITH_REFERENCE = ("DPO", "KTO")
WITHOUT_TOKENS = ("SequenceClassification", "RewardModel")
FEWEST_ROWS = {"KTO": 2}
"""Rows of a micro-batch below which an objective makes no sense."""
SHORTEST_COMPLETION = 0.1
"""Share of its greatest length that a batch's longest completion may have, in the shortest time."""
SLOWEST_WRITING = 8.0
"""Times that transformers may take for a token of reading all weights once, in the longest time."""
UNKNOWN_CORES = (1.0, 16.0)
"""Where the pod says nothing about CPUs."""


@dataclass(frozen=True)
class Facts:
    """What is known of model and data before training: told by prepare, or given on the command line."""

    shape: ModelShape
    longest: int
    supervised_share: float
    tokens: int
    """Of all rows."""
    rows: int
    max_steps: int
    new_tokens: int = 0
    reward_bytes: int = 0


@dataclass(frozen=True)
class Sizing:
    """The estimate as the status shows it, and what keeps the job from fitting."""

    estimate: Estimate
    problem: str | None = None


def facts_of(summary: PrepareSummary) -> Facts | None:
    """None where the model's shape is not known."""
    if summary.model is None or not summary.longest_row:
        return None
    new_tokens = summary.vocabulary.tokens if summary.vocabulary is not None else 0
    return Facts(
        summary.model,
        summary.longest_row,
        summary.supervised_share,
        summary.tokens,
        summary.rows_kept,
        summary.max_steps,
        new_tokens,
        summary.reward_bytes,
    )


def size(job: FineTuneJob, config: RunConfig, facts: Facts, settings: Settings) -> Sizing:
    """The largest micro-batch that fits, up to the trainer's own choice; a problem where none does."""
    device = _device(job, settings)
    limit = _limit(job, device)
    whole = _workload(job, config, facts)
    choices = [work for shares in _shares(job, config) for work in _smaller(replace(whole, shares=shares), _fewest(config))]
    fitting = next((work for work in choices if limit is None or estimates.needed_of_limit(work) <= limit), None)
    work = fitting or choices[-1]
    problem = _problem(job, work, limit) if fitting is None and limit is not None else None
    return Sizing(_estimate(job, config, work, facts, device, limit), problem)


def _shares(job: FineTuneJob, config: RunConfig) -> tuple[int, ...]:
    """Among how many processes the model is divided, in the order in which it is tried."""
    processes, asked = together.processes(job), job.spec.compute.parallelism
    divided = _shares_when_divided(job)
    is_compared = config.objective in DIVIDED and config.vocabulary is None and config.quantization is None
    if processes == 1 or asked == "DataParallel" or (asked == "Auto" and not is_compared):
        return (1,)
    return (divided,) if asked == "FSDP" else (1, divided)


def _shares_when_divided(job: FineTuneJob) -> int:
    """The fewest: an elastic training has to fit those nodes too that it may come down to."""
    if together.processes(job) == 1:
        return 1
    return together.fewest_nodes(job, is_sharded=True) * together.processes_of_node(job)


# --- the work -----------------------------------------------------------------


def _workload(job: FineTuneJob, config: RunConfig, facts: Facts) -> Workload:
    training, method = config.training, config.method
    on: Literal["cpu", "cuda"] = "cuda" if job.spec.compute.accelerators_per_node else "cpu"
    extra = {name: str(value).strip().lower() for name, value in training.extra_arguments.items()}
    of_device = max(1, training.global_batch_size // together.processes(job))
    allowed = max(1, TOKENS_PER_MICRO_BATCH[on] // facts.longest)
    rollouts = config.rollouts
    sizes = [rows for rows in range(_fewest(config), of_device + 1) if of_device % rows == 0]
    micro = max((rows for rows in sizes if rows <= allowed), default=min(sizes, default=1))
    return Workload(
        shape=facts.shape,
        method="Full" if method.type == "Full" else "LoRA",
        quantized=config.quantization is not None,
        virtual_tokens=method.prompt_tuning.virtual_tokens if method.prompt_tuning is not None else 0,
        rank=method.lora.rank if method.lora is not None else 0,
        only_attention=method.lora is not None and method.lora.target_modules == "Attention",
        precision=training.precision,
        device=on,
        micro_batch=micro,
        accumulation=of_device // micro,
        longest=facts.longest,
        supervised_share=facts.supervised_share if rollouts is None else rollouts.max_completion_length / facts.longest,
        checkpointing=extra.get("gradient_checkpointing", "true" if on == "cuda" else "false") == "true",
        optimizer=extra.get("optim", "adamw_torch"),
        has_reference=method.type == "Full" and _has_reference(config),
        dora=method.lora is not None and method.lora.dora,
        new_tokens=facts.new_tokens,
        predicts_tokens=config.objective not in WITHOUT_TOKENS,
        completion=rollouts.max_completion_length if rollouts is not None else 0,
        reward_bytes=facts.reward_bytes,
    )


def _has_reference(config: RunConfig) -> bool:
    return config.rollouts.beta > 0 if config.rollouts is not None else config.objective in WITH_REFERENCE


def _fewest(config: RunConfig) -> int:
    return FEWEST_ROWS.get(config.objective, 1)


def _smaller(work: Workload, fewest: int) -> Iterator[Workload]:
    """The same global batch in ever smaller micro-batches."""
    for rows in range(work.micro_batch, min(fewest, work.micro_batch) - 1, -1):
        if work.global_batch % rows == 0:
            yield replace(work, micro_batch=rows, accumulation=work.global_batch // rows)


# --- what there is ------------------------------------------------------------


def _device(job: FineTuneJob, settings: Settings) -> Device | None:
    """None for a device that nobody named."""
    compute = job.spec.compute
    if not compute.accelerators_per_node:
        return CPU_CORE
    return device_of([*compute.pod.node_selector.values(), *([settings.device] if settings.device else [])])


def _limit(job: FineTuneJob, device: Device | None) -> int | None:
    """Memory in bytes: the pod's limit on a CPU, else the device's."""
    if device is not CPU_CORE:
        return device.memory if device is not None else None
    resources = job.spec.compute.pod.resources
    text = resources.limits.get("memory") if resources is not None else None
    return int(quantity(text)) if text is not None else None


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number. Raises ValueError."""
    found = QUANTITY.match(text)
    if found is None or found[2] not in SUFFIXES:
        raise ValueError(f"{text} is no quantity")
    return float(found[1]) * SUFFIXES[found[2]]


def _rates(job: FineTuneJob, device: Device | None) -> tuple[float, float] | None:
    """FLOP/s from and to, of all devices together."""
    if device is None:
        return None
    if device is not CPU_CORE:
        count = together.processes(job)
        return device.slowest * count, device.fastest * count
    resources = job.spec.compute.pod.resources
    text = (resources.limits.get("cpu") or resources.requests.get("cpu")) if resources is not None else None
    least, most = (quantity(text),) * 2 if text is not None else UNKNOWN_CORES
    least, most = least * job.spec.compute.nodes, most * job.spec.compute.nodes
    return device.slowest * least, device.fastest * most


# --- what is told -------------------------------------------------------------


def _estimate(job: FineTuneJob, config: RunConfig, work: Workload, facts: Facts, device: Device | None, limit: int | None) -> Estimate:
    hours = _hours(job, config, work, facts, device)
    return Estimate(
        device=device.name if device is not None else "unknown",
        peak_memory_bytes=estimates.peak_memory(work),
        memory_limit_bytes=limit,
        disk_bytes=estimates.disk(work, config.checkpoint.keep, facts.tokens, config.output_format == "Merged"),
        micro_batch_size=work.micro_batch,
        accumulation_steps=work.accumulation,
        gradient_checkpointing=work.checkpointing,
        parallelism=None if together.processes(job) == 1 else "DataParallel" if work.shares == 1 else "FSDP",
        hours_from=number(hours[0]) if hours is not None else None,
        hours_to=number(hours[1]) if hours is not None else None,
        hours_basis="DeviceTable" if hours is not None else None,
        cost_from=cost(job, hours[0]) if hours is not None else None,
        cost_to=cost(job, hours[1]) if hours is not None else None,
    )


def _hours(job: FineTuneJob, config: RunConfig, work: Workload, facts: Facts, device: Device | None) -> tuple[float, float] | None:
    rates = _rates(job, device)
    if rates is None:
        return None
    rows = facts.max_steps * config.training.global_batch_size
    # Packed rows are not counted by prepare's rows: they are about as long as a row may be.
    tokens = rows * (facts.longest if config.training.packing else facts.tokens / max(facts.rows, 1))
    flops = tokens * estimates.flops_per_token(work)
    if config.rollouts is None or device is None:
        return flops / rates[1] / 3600, flops / rates[0] / 3600
    # Completions are learned as prompts are, and read once by the reference; each token of a step's completions reads all weights.
    flops += rows * work.completion * estimates.flops_per_token(work) + 2 * (tokens + rows * work.completion) * work.shape.parameters
    reading = facts.max_steps * work.completion * estimates.weight_bytes(work) / device.bandwidth
    return (flops / rates[1] + SHORTEST_COMPLETION * reading) / 3600, (flops / rates[0] + SLOWEST_WRITING * reading) / 3600


def hours_ratio(estimate: Estimate, measured: float) -> str | None:
    """The middle of the table's interval over the measured hours; what is known already where the interval is the table's no more."""
    if estimate.hours_basis != "DeviceTable" or estimate.hours_from is None or estimate.hours_to is None or measured <= 0:
        return estimate.hours_ratio
    return number(math.sqrt(float(estimate.hours_from) * float(estimate.hours_to)) / measured)


def number(value: float) -> str:
    """Three digits, never in a form that the API refuses."""
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e+" in text else text


def cost(job: FineTuneJob, hours: float) -> str | None:
    price = job.spec.compute.cost_per_accelerator_hour
    devices = job.spec.compute.nodes * job.spec.compute.accelerators_per_node
    return number(float(price) * devices * hours) if price is not None and devices else None


def _problem(job: FineTuneJob, work: Workload, limit: int) -> str:
    needed = estimates.needed_of_limit(work)
    where = "the pod's memory limit" if work.device == "cpu" else "the device's memory"
    remedy = next(
        (words for words, smaller in _remedies(work, _shares_when_divided(job)) if estimates.needed_of_limit(smaller) <= limit), None
    )
    more = "raise compute.pod.resources.limits.memory" if work.device == "cpu" else "take a larger device"
    what = f"{remedy}, or {more}" if remedy is not None else f"No single change makes it fit: {more}"
    return (
        f"Training needs about {_gib(needed)} with {_rows(work)} at a time, and {where} is {_gib(limit)}. {what}; "
        "the annotation tuneloop.dev/ignore-estimate: 'true' trains all the same."
    )


def _remedies(work: Workload, processes: int) -> Iterator[tuple[str, Workload]]:
    """From the smallest change on. The micro-batch is one row already."""
    checkpointed = replace(work, checkpointing=True)
    if work.shares < processes and not work.new_tokens and not work.quantized:
        yield "Set compute.parallelism to FSDP", replace(work, shares=processes)
    if not work.checkpointing:
        yield "Set training.extraArguments.gradient_checkpointing to 'true'", checkpointed
    lengths = [length for halvings in range(1, 12) if (length := work.longest >> halvings) >= SHORTEST]
    for length in lengths:
        yield f"Set training.maxSequenceLength to {length}", replace(work, longest=length)
    adapted = replace(work, method="LoRA", rank=16)
    if work.method == "Full":
        yield "Set method.type to LoRA", adapted
        yield "Set method.type to LoRA and training.extraArguments.gradient_checkpointing to 'true'", replace(adapted, checkpointing=True)
    for length in lengths:
        words = f"Set training.maxSequenceLength to {length} and training.extraArguments.gradient_checkpointing to 'true'"
        yield words, replace(checkpointed, longest=length)


def _rows(work: Workload) -> str:
    return "one row" if work.micro_batch == 1 else f"{work.micro_batch} rows"


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.2g} GiB" if count < 100 << 30 else f"{count / (1 << 30):.0f} GiB"
