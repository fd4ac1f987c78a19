"""How several processes share a training: whole models where they fit, divided ones where only these do, or as asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.finetunejob.builders import World, make_job, make_spec
from tests.unit.finetunejob.test_sizing import CPU_LORA, H100, LLAMA, SMOL, after_prepare

from tuneloop_operator.api.finetunejob import Estimate
from tuneloop_operator.domain.finetunejob import estimates

FULL = {"type": "Full"}


def make_full(**compute: Any) -> World:
    spec = make_spec(compute={"acceleratorsPerNode": 8, "pod": {"nodeSelector": H100}} | compute, method=FULL)
    spec["output"] = {**spec["output"], "format": "Merged"}
    return World(job=make_job(spec))


def estimate_of(found: World) -> Estimate:
    estimate = found.job.status.estimate
    assert estimate is not None
    return estimate


def asked(found: World) -> str | None:
    """What the training's configuration says."""
    parallelism: str | None = found.config(found.current())["training"].get("parallelism")
    return parallelism


def test_eight_billion_weights_are_divided_among_eight_devices_since_one_cannot_hold_them() -> None:
    found = after_prepare(make_full(), LLAMA)
    estimate = estimate_of(found)
    assert estimate.parallelism == "FSDP"
    assert estimate.peak_memory_bytes < 60 << 30
    assert asked(found) == "FSDP"


def test_model_that_fits_a_device_is_left_whole() -> None:
    found = after_prepare(make_full(), SMOL)
    assert estimate_of(found).parallelism == "DataParallel"
    assert asked(found) is None


def test_model_is_divided_where_that_is_asked_for() -> None:
    found = after_prepare(make_full(parallelism="FSDP"), SMOL)
    assert estimate_of(found).parallelism == "FSDP"
    assert asked(found) == "FSDP"


def test_model_is_divided_as_asked_for_where_nothing_can_be_estimated() -> None:
    found = after_prepare(make_full(parallelism="FSDP"), None)
    assert found.job.status.estimate is None
    assert asked(found) == "FSDP"


def test_whole_model_that_was_asked_for_and_does_not_fit_is_told_what_would() -> None:
    found = after_prepare(make_full(parallelism="DataParallel"), LLAMA)
    assert found.job.status.phase == "Stalled"
    assert "Set compute.parallelism to FSDP, or take a larger device" in found.message()


def test_one_process_shares_with_nobody() -> None:
    found = after_prepare(make_full(acceleratorsPerNode=1), SMOL)
    assert estimate_of(found).parallelism is None
    assert asked(found) is None


def test_no_other_stage_is_told() -> None:
    found = after_prepare(make_full(parallelism="FSDP"), SMOL)
    prepare = found.runs["tweets-prepare-1"]
    assert found.config(prepare)["training"]["parallelism"] is None


def test_attempt_after_too_little_memory_stays_divided() -> None:
    found = after_prepare(make_full(), LLAMA)
    micro = found.config(found.current())["training"]["microBatchSize"]
    found.ends(None, 11)
    found.settle()
    assert asked(found) == "FSDP"
    assert found.config(found.current())["training"]["microBatchSize"] == max(1, micro // 2)


@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_more_shares_need_less_memory_down_to_what_each_needs_whole(method: Any) -> None:
    work = replace(CPU_LORA, method=method, shape=LLAMA, device="cuda", checkpointing=True)
    needed = [estimates.peak_memory(replace(work, shares=shares)) for shares in (2, 4, 8, 64)]
    assert needed == sorted(needed, reverse=True)
    assert needed[-1] > 2 * (LLAMA.parameters - 32 * 218_000_000), "embeddings, head and the layer at hand"


def test_divided_model_is_loaded_whole_by_each_process_on_a_cpu() -> None:
    work = replace(CPU_LORA, method="Full", shares=64, longest=1)
    assert estimates.peak_memory(work) >= estimates.IMPORTS + 4 * SMOL.parameters
