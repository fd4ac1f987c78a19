"""What a training will need is told before it starts, and one that does not fit is not started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.finetunejob.builders import SETTINGS, World, make_job, make_spec, prepared, trained

from tuneloop_operator.domain.finetunejob import estimates, sizing
from tuneloop_operator.domain.finetunejob.devices import device_of
from tuneloop_operator.domain.finetunejob.estimates import Workload
from tuneloop_operator.domain.finetunejob.resolve import config_digest
from tuneloop_operator.render.names import IGNORE_ESTIMATE_ANNOTATION
from tuneloop_trainer.contract import ModelShape, Progress, Stage

SMOL = ModelShape(
    parameters=134_515_008,
    hidden_size=576,
    intermediate_size=1536,
    layers=30,
    heads=9,
    key_value_heads=3,
    head_size=64,
    vocabulary=49_152,
)
LLAMA = ModelShape(
    parameters=8_030_261_248,
    hidden_size=4096,
    intermediate_size=14_336,
    layers=32,
    heads=32,
    key_value_heads=8,
    head_size=128,
    vocabulary=128_256,
)
CPU_LORA = Workload(
    shape=SMOL,
    method="LoRA",
    rank=16,
    only_attention=False,
    precision="BF16",
    device="cpu",
    micro_batch=1,
    accumulation=16,
    longest=512,
    supervised_share=0.1,
    checkpointing=False,
)
H100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
MIB = 1 << 20


def make_world(memory: str | None = "8Gi", compute: dict[str, Any] | None = None, **changes: Any) -> World:
    pod: dict[str, Any] = {"resources": {"limits": {"cpu": "2", "memory": memory}}} if memory is not None else {}
    given = compute or {"acceleratorsPerNode": 0, "pod": pod}
    return World(job=make_job(make_spec(compute=given, **changes)))


def after_prepare(world: World, shape: ModelShape | None = SMOL, longest: int = 512) -> World:
    world.settle()
    world.ends(prepared(model=shape, longest_row=longest))
    world.settle()
    return world


# --- arithmetic ---------------------------------------------------------------


def test_lora_trains_rank_times_inputs_and_outputs_of_each_layer() -> None:
    assert estimates.trained_parameters(CPU_LORA) == 4_884_480, "peft's own count for SmolLM2-135M at rank 16, all linear layers"
    assert estimates.trained_parameters(replace(CPU_LORA, shape=LLAMA, rank=32)) == 83_886_080
    assert estimates.trained_parameters(replace(CPU_LORA, dora=True)) == 4_884_480 + 155_520, "a length for each column"
    assert estimates.trained_parameters(replace(CPU_LORA, method="Full")) == SMOL.parameters


def test_a_full_step_holds_weights_gradients_and_two_moments_in_fp32() -> None:
    small = replace(CPU_LORA, method="Full", longest=1, accumulation=1)
    taken = estimates.peak_memory(small) - estimates.IMPORTS - estimates.STARTED
    assert taken == pytest.approx(16 * SMOL.parameters, rel=0.05)


@pytest.mark.parametrize(
    ("change", "grows"),
    [
        ({"longest": 1024}, True),
        ({"method": "Full"}, True),
        ({"precision": "FP32"}, True),
        ({"checkpointing": True}, False),
        ({"optimizer": "sgd"}, False),
        ({"only_attention": True}, False),
        ({"supervised_share": 0.0}, False),
        ({"predicts_tokens": False}, False),
        ({"has_reference": True, "method": "Full"}, True),
        ({"dora": True}, True),
        ({"new_tokens": 500}, True),
        ({"quantized": True}, False),
        ({"rank": 0, "virtual_tokens": 20}, False),
    ],
)
def test_each_setting_moves_the_peak_the_way_it_should(change: dict[str, Any], grows: bool) -> None:
    before, after = estimates.peak_memory(CPU_LORA), estimates.peak_memory(replace(CPU_LORA, **change))
    assert after > before if grows else after < before


def test_eight_billion_weights_on_one_h100() -> None:
    work = replace(CPU_LORA, shape=LLAMA, rank=32, device="cuda", micro_batch=2, longest=4096, checkpointing=True)
    assert 17 < estimates.peak_memory(work) / 2**30 < 30, "LoRA takes little more than the 15 GiB of the weights"
    assert estimates.needed_of_limit(replace(work, method="Full")) > 80 << 30, "fp32 masters and Adam alone take 120 GiB"


def test_operations_for_each_token_follow_the_method() -> None:
    weights = float(SMOL.parameters)
    attention = 6.0 * 30 * 9 * 64 * 512
    assert estimates.flops_per_token(CPU_LORA) == 4 * weights + attention
    assert estimates.flops_per_token(replace(CPU_LORA, method="Full", checkpointing=True)) == 8 * weights + attention


def test_a_reference_costs_the_weights_once_more() -> None:
    full = replace(CPU_LORA, method="Full")
    assert estimates.peak_memory(replace(full, has_reference=True)) - estimates.peak_memory(full) == 2 * SMOL.parameters


@pytest.mark.parametrize(("text", "value"), [("8Gi", 8 << 30), ("500m", 0.5), ("1.5G", 1.5e9), ("2", 2)])
def test_quantities_are_read_as_kubernetes_writes_them(text: str, value: float) -> None:
    assert sizing.quantity(text) == value


def test_a_device_is_found_by_the_longest_name() -> None:
    assert [
        found.name for label in ("NVIDIA-A100-80GB-PCIe", "nvidia-tesla-a100", "NVIDIA-L40S", "nvidia-l4") if (found := device_of([label]))
    ] == [
        "a100-80gb",
        "a100",
        "l40s",
        "l4",
    ]
    assert device_of(["team-a"]) is None


# --- in a job's life ----------------------------------------------------------


def test_the_estimate_stands_in_status_before_the_training_job() -> None:
    world = make_world()
    world.settle()
    world.ends(prepared(model=SMOL, longest_row=512))
    decision = world.decide()

    estimate = decision.status["estimate"]
    assert isinstance(estimate, dict)
    assert (estimate["device"], estimate["microBatchSize"], estimate["accumulationSteps"]) == ("cpu", 1, 16)
    assert 1000 * MIB < estimate["peakMemoryBytes"] < 4000 * MIB
    assert estimate["memoryLimitBytes"] == 8 << 30
    assert 0 < float(estimate["hoursFrom"]) < float(estimate["hoursTo"])
    assert estimate["hoursBasis"] == "DeviceTable"
    assert "costFrom" not in estimate


def test_the_training_takes_the_estimated_micro_batch_and_half_of_it_after_too_little_memory() -> None:
    world = after_prepare(make_world(), longest=100)
    assert world.config(world.current())["training"]["microBatchSize"] == 4
    world.ends(None, 137)
    world.settle()
    assert world.config(world.current())["training"]["microBatchSize"] == 2


def test_the_trainer_is_told_the_first_estimate_for_its_report() -> None:
    world = after_prepare(make_world(), longest=100)
    told, estimate = world.config(world.current())["estimate"], world.job.status.estimate
    assert estimate is not None
    assert (told["device"], told["peakMemoryBytes"], told["microBatchSize"]) == ("cpu", estimate.peak_memory_bytes, 4)
    assert told["hoursFrom"] == float(estimate.hours_from or 0)
    world.ends(None, 137)
    world.settle()
    assert world.config(world.current())["estimate"] == told


def test_a_smaller_micro_batch_is_chosen_where_it_fits() -> None:
    roomy = after_prepare(make_world("8Gi", training={"maxSequenceLength": 32}), longest=32).job.status.estimate
    assert roomy is not None
    assert roomy.micro_batch_size == 16
    needed = roomy.peak_memory_bytes - estimates.FILE_PAGES
    world = after_prepare(make_world(f"{needed // MIB - 100}Mi", training={"maxSequenceLength": 32}), longest=32)
    estimate = world.job.status.estimate
    assert estimate is not None
    assert world.current().stage is Stage.TRAIN
    assert estimate.micro_batch_size < 16
    assert estimate.micro_batch_size * estimate.accumulation_steps == 16


def test_what_does_not_fit_is_stalled_before_any_training_job() -> None:
    world = after_prepare(make_world("2Gi", method={"type": "Full"}))
    assert world.condition("Stalled") == ("True", "DoesNotFit")
    assert world.condition("DataReady") == ("True", "Completed")
    assert world.condition("Trained") == ("False", "DoesNotFit")
    assert [run.stage for run in world.runs.values()] == [Stage.PREPARE]
    assert world.job.status.started_at is None
    assert "Set method.type to LoRA, or raise compute.pod.resources.limits.memory" in world.message()
    assert "2 GiB" in world.message()


def test_the_smallest_change_is_told_first() -> None:
    world = after_prepare(make_world("1400Mi", training={"maxSequenceLength": 2048}), longest=2048)
    assert "Set training.extraArguments.gradient_checkpointing to 'true'" in world.message()


def test_a_limit_below_everything_is_told_as_such() -> None:
    world = after_prepare(make_world("512Mi"))
    assert "No single change makes it fit: raise compute.pod.resources.limits.memory" in world.message()


def test_more_memory_lets_a_stalled_job_go_on() -> None:
    world = after_prepare(make_world("2Gi", method={"type": "Full"}))
    world.edit(make_spec(method={"type": "Full"}, compute={"acceleratorsPerNode": 0, "pod": {"resources": {"limits": {"memory": "16Gi"}}}}))
    world.settle()
    assert world.current().stage is Stage.TRAIN
    assert world.condition("Stalled") is None


def test_the_annotation_trains_all_the_same() -> None:
    world = after_prepare(make_world("2Gi", method={"type": "Full"}))
    world.edit(annotations={IGNORE_ESTIMATE_ANNOTATION: "true"})
    world.settle()
    assert world.current().stage is Stage.TRAIN
    assert world.job.status.estimate is not None


@pytest.mark.parametrize("shape", [None, SMOL])
def test_nothing_is_refused_where_shape_or_limit_are_unknown(shape: ModelShape | None) -> None:
    world = after_prepare(make_world(None, method={"type": "Full"}), shape=shape)
    assert world.current().stage is Stage.TRAIN
    assert (world.job.status.estimate is None) == (shape is None)


def test_a_device_too_small_stalls_the_job_and_a_price_gives_the_cost() -> None:
    compute = {"acceleratorsPerNode": 1, "costPerAcceleratorHour": "2.50", "pod": {"nodeSelector": {"gpu": "nvidia-l4"}}}
    small = after_prepare(make_world(compute=compute, method={"type": "Full"}), shape=LLAMA)
    assert small.condition("Stalled") == ("True", "DoesNotFit")
    assert "or take a larger device" in small.message()

    large = after_prepare(make_world(compute=compute | {"acceleratorsPerNode": 2, "pod": {"nodeSelector": H100}}), shape=LLAMA)
    estimate = large.job.status.estimate
    assert estimate is not None
    assert (estimate.device, estimate.memory_limit_bytes) == ("h100", 80 << 30)
    assert estimate.hours_to is not None
    assert estimate.cost_to is not None
    assert float(estimate.cost_to) == pytest.approx(2.5 * 2 * float(estimate.hours_to), rel=0.02)


def test_the_operators_setting_names_the_device_where_the_job_does_not() -> None:
    world = make_world(compute={"acceleratorsPerNode": 1})
    world.settings = SETTINGS.model_copy(update={"device": "nvidia-h100-80gb"})
    estimate = after_prepare(world, shape=LLAMA).job.status.estimate
    assert estimate is not None
    assert estimate.device == "h100"


def test_hours_are_the_measured_ones_after_twenty_steps_and_stay() -> None:
    world = after_prepare(make_world())
    world.pod_runs()
    for step, remaining, basis in ((19, 10.0, "DeviceTable"), (20, 720.0, "Measured"), (40, 9999.0, "Measured")):
        world.progress = Progress(
            pod_uid="x", stage=Stage.TRAIN, phase="Training", step=step, max_steps=100, percent=step, remaining_seconds=remaining
        )
        world.settle()
        assert world.job.status.estimate is not None
        assert world.job.status.estimate.hours_basis == basis
    assert (world.job.status.estimate.hours_from, world.job.status.estimate.hours_to) == ("0.25", "0.25")


def test_how_far_the_table_was_off_is_told_when_its_hours_are_replaced() -> None:
    world = after_prepare(make_world())
    table = world.job.status.estimate
    assert table is not None
    assert table.hours_from is not None
    assert table.hours_to is not None
    assert table.hours_ratio is None
    world.pod_runs()
    world.progress = Progress(pod_uid="x", stage=Stage.TRAIN, phase="Training", step=20, max_steps=100, percent=20, remaining_seconds=720.0)
    world.settle()
    estimate = world.job.status.estimate
    assert estimate is not None
    assert estimate.hours_ratio is not None
    expected = (float(table.hours_from) * float(table.hours_to)) ** 0.5 / 0.25
    assert float(estimate.hours_ratio) == pytest.approx(expected, rel=0.01)
    said = trained()
    assert said.train is not None
    world.ends(said.model_copy(update={"train": said.train.model_copy(update={"seconds": 36_000})}))
    world.settle()
    assert world.job.status.estimate is not None
    assert world.job.status.estimate.hours_ratio == estimate.hours_ratio, "measured against the table, not against the first 20 steps"


@pytest.mark.parametrize(("resumed_from", "is_told"), [(None, True), (10, False)])
def test_a_short_run_tells_at_its_end_unless_its_last_attempt_was_not_all_of_it(resumed_from: int | None, is_told: bool) -> None:
    world = after_prepare(make_world())
    said = trained()
    assert said.train is not None
    world.ends(said.model_copy(update={"train": said.train.model_copy(update={"seconds": 1800, "resumed_from_step": resumed_from})}))
    world.settle()
    assert world.job.status.estimate is not None
    assert (world.job.status.estimate.hours_ratio is not None) == is_told


def test_what_was_taken_stands_beside_what_was_estimated() -> None:
    world = after_prepare(make_world())
    said = trained()
    assert said.train is not None
    world.ends(said.model_copy(update={"train": said.train.model_copy(update={"peak_memory_bytes": 5 << 30, "seconds": 1800})}))
    world.settle()
    estimate = world.job.status.estimate
    assert estimate is not None
    assert (estimate.measured_peak_memory_bytes, estimate.measured_hours) == (5 << 30, "0.5")
    assert estimate.peak_memory_ratio is not None
    assert float(estimate.peak_memory_ratio) == pytest.approx(estimate.peak_memory_bytes / (5 << 30), rel=0.01)


def test_a_price_changes_no_digest() -> None:
    priced = make_job(make_spec(compute={"costPerAcceleratorHour": "3"}))
    assert config_digest(priced.spec) == config_digest(make_job().spec)


def test_an_objective_that_needs_two_rows_gets_two() -> None:
    kto = {"type": "KTO"}
    world = after_prepare(make_world(objective=kto, evaluation={}), longest=512)
    estimate = world.job.status.estimate
    assert estimate is not None
    assert estimate.micro_batch_size == 2


WRITES = {"rewards": [{"type": "ExactMatch"}], "numGenerations": 4, "maxCompletionLength": 256}


def test_completions_that_the_model_writes_cost_memory_for_the_whole_batch_and_time() -> None:
    shorter = {"type": "GRPO", "grpo": WRITES | {"maxCompletionLength": 64}}
    longer = {"type": "GRPO", "grpo": WRITES}
    worlds = [after_prepare(make_world(objective=objective, evaluation={}), longest=512) for objective in (shorter, longer)]
    brief, long = (world.job.status.estimate for world in worlds)
    assert brief is not None
    assert long is not None
    assert float(brief.hours_to or 0) < float(long.hours_to or 0)
    cache = 16 * 512 * 2 * 2 * SMOL.layers * SMOL.key_value_heads * SMOL.head_size
    writing = replace(CPU_LORA, shape=LLAMA, completion=256, accumulation=512, longest=2048, device="cuda")
    assert estimates.peak_memory(replace(writing, shape=SMOL, accumulation=16, longest=512)) >= cache
    assert estimates.peak_memory(writing) > 100 << 30, "512 completions' keys and values do not fit beside the weights"
    assert estimates.peak_memory(writing) - estimates.peak_memory(replace(writing, accumulation=256)) == pytest.approx(
        256 * (2048 * 2 * 2 * LLAMA.layers * LLAMA.key_value_heads * LLAMA.head_size + 16 * LLAMA.vocabulary), rel=1e-3
    )


def test_a_reward_model_stands_beside_the_model() -> None:
    judged = replace(CPU_LORA, reward_bytes=300 * MIB)
    assert estimates.peak_memory(judged) - estimates.peak_memory(CPU_LORA) == 300 * MIB
    full = {"method": {"type": "Full"}, "evaluation": {}}
    held, free = (
        after_prepare(make_world(objective={"type": "GRPO", "grpo": WRITES | {"beta": beta}}, **full)).job.status.estimate
        for beta in ("0.04", "0")
    )
    assert held is not None
    assert free is not None
    assert held.peak_memory_bytes - free.peak_memory_bytes == 2 * SMOL.parameters, "beta needs the base beside the weights"
