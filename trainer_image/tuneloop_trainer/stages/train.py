"""train: the run's objective, with LoRA or of all weights, on what prepare wrote, resumable at any step."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuneloop_trainer import hardware, models
from tuneloop_trainer.contract import ExitCode, Reason, RunConfig, Stage, StageResult, TrainSummary
from tuneloop_trainer.data.shards import read_table, shard_files
from tuneloop_trainer.errors import Invalid, StageError
from tuneloop_trainer.interrupts import Interrupts
from tuneloop_trainer.manifests import publish, staging
from tuneloop_trainer.objectives import Objective, objective_of
from tuneloop_trainer.objectives.objective import Dtype, Parts
from tuneloop_trainer.progress import ProgressWriter
from tuneloop_trainer.results import RESULT_FILE, write_result
from tuneloop_trainer.stages.outputs import require_stage, run_key, stage_folder, told_again
from tuneloop_trainer.stages.prepare import CARD
from tuneloop_trainer.stages.vocabulary import trained_base
from tuneloop_trainer.training.arguments import Settings, resolve, surroundings
from tuneloop_trainer.training.checkpoints import Checkpoint, Checkpoints
from tuneloop_trainer.training.plan import Plan, make_plan
from tuneloop_trainer.training.world import World, join

log = logging.getLogger("tuneloop.train")
SETTINGS = "settings.json"
"""Every value that the run was trained with, and where it came from."""


@dataclass
class Attempt:
    """One attempt's trainer and what it started from."""

    trainer: Any  # Any: Trainer is imported only where torch is needed
    report: Any
    plan: Plan
    checkpoints: Checkpoints
    resumed: Checkpoint | None
    steps_lost: int
    best: Any
    settings: Settings


def train(config: RunConfig, progress: ProgressWriter, interrupts: Interrupts) -> StageResult:
    folder = stage_folder(config, Stage.TRAIN) / "final"
    if (result := told_again(config, Stage.TRAIN, folder)) is not None:
        tidy(config)  # an attempt may have been killed after it published and before it came to this
        return result
    progress.phase("LoadingData")
    manifest, prepared = require_stage(config, Stage.PREPARE)
    base = trained_base(config, manifest)
    progress.phase("WaitingForPeers")
    world = join()
    progress.phase("LoadingModel")
    attempt = assemble(config, prepared, base, progress, interrupts, world)
    started = time.monotonic()
    interrupts.defer()
    run(attempt)
    summary = summarize(attempt, time.monotonic() - started)
    if interrupts.requested and summary.step < summary.max_steps:
        message = f"Saved at step {summary.step} of {summary.max_steps} after SIGTERM."
        return StageResult(stage=Stage.TRAIN, exit_code=ExitCode.INTERRUPTED, reason=Reason.PREEMPTED, message=message, train=summary)
    world.leave()
    if not world.is_first:
        return StageResult(stage=Stage.TRAIN, exit_code=ExitCode.DONE, train=summary)
    progress.phase("Saving")
    return finish(config, attempt, summary, folder)


def run(attempt: Attempt) -> None:
    """Train what is left; nothing, where an attempt was killed between its last checkpoint and the end of the stage."""
    from transformers import TrainerState

    from tuneloop_trainer.training.reporting import telling_failure

    if attempt.resumed is None or attempt.resumed.step < attempt.plan.max_steps:
        with telling_failure(attempt.trainer.callback_handler.callbacks):
            attempt.trainer.train(resume_from_checkpoint=str(attempt.resumed.folder) if attempt.resumed else None)
    else:
        attempt.trainer.state = TrainerState.load_from_json(str(attempt.resumed.folder / "trainer_state.json"))


def assemble(
    config: RunConfig, prepared: StageResult, base: Path, progress: ProgressWriter, interrupts: Interrupts, world: World
) -> Attempt:
    """Model, data, callbacks and trainer; and the checkpoint to resume from."""
    from transformers import PrinterCallback

    from tuneloop_trainer.training.callbacks import DecideCheckpoints, ReportProgress
    from tuneloop_trainer.training.reporting import reporters
    from tuneloop_trainer.training.rows import first_steps
    from tuneloop_trainer.training.trainer import trainable_share
    from tuneloop_trainer.training.utilisation import utilisation

    hardware.use_threads(config.threads)
    data = stage_folder(config, Stage.PREPARE)
    objective = objective_of(config, data)
    sources = json.loads((data / CARD).read_text())["sources"]
    lengths = np.asarray(read_table(data, "train")["length"], dtype=np.int64)
    rows = [source["rows"] for source in sources]
    plan = make_plan(config, prepared, rows, lengths, hardware.device(), objective.least_rows, world.size, objective.repeats)
    if world.told_by_first(plan.key) != plan.key:
        raise StageError("The processes of the training do not see the same data: is the store the same for all nodes?")
    checkpoints = Checkpoints(stage_folder(config, Stage.TRAIN) / "checkpoints", plan.key, config.checkpoint.keep, world)
    writing = stage_folder(config, Stage.TRAIN) / "writing"
    if world.is_first:
        shutil.rmtree(writing, ignore_errors=True)
    resumed = checkpoints.newest()
    stop_early = _stop_early(config, resumed)
    settings = resolve(config, plan, objective.defaults, hardware.device())
    log.info("settings: %s", settings.described())
    validation = _dataset(data, "validation") if stop_early is not None else None
    resuming = {
        "order": plan.order,
        "consumed": resumed.samples if resumed else 0,
        "checkpoints": checkpoints,
        "is_sharded": plan.is_sharded,
        "publishes_meanwhile": config.checkpoint.publish == "Asynchronous",
    }
    arguments = settings.values | surroundings(plan, writing, stop_early is not None, hardware.device())
    trainer = make_trainer(objective, base, arguments, _dataset(data, "train"), validation, resuming)
    if objective.new_tokens:
        trainer.learn_rows_first(objective.new_tokens, first_steps(plan.max_steps))
        settings = settings.beside("new_rows_first_steps", trainer.first_steps)
    log.info("trainable share of the weights: %.4f", trainable_share(trainer.model))
    trainer.remove_callback(PrinterCallback)
    spike_ratio = config.training.loss_spike_ratio
    report = ReportProgress(progress, checkpoints, plan.global_batch, trainer.tokens_trained, spike_ratio)
    report.utilisation = utilisation(
        trainer.model.config, float(lengths.mean()), is_frozen=config.method.type == "LoRA", processes=plan.processes
    )
    trainer.figures = report.figures
    decide = DecideCheckpoints(config.checkpoint, interrupts, checkpoints, progress, trainer.settle)
    for callback in filter(None, (stop_early, report, decide)):
        trainer.add_callback(callback)
    for reporter in reporters(config, stage_folder(config, Stage.TRAIN), progress, interrupts) if world.is_first else ():
        trainer.add_callback(reporter)
    if stop_early is not None:
        trainer.best_step = stop_early.best_step
        stop_early.keep = lambda step: setattr(trainer, "best_step", step)
    lost = checkpoints.take_up(resumed.step if resumed else 0)
    progress.update(checkpoint_step=resumed.step if resumed else None, steps_lost=lost)
    return Attempt(trainer, report, plan, checkpoints, resumed, lost, stop_early, settings)


def make_trainer(
    objective: Objective, base: Path, arguments: dict[str, Any], rows: Any, validation: Any, resuming: dict[str, Any]
) -> Any:  # Any: Trainer is imported only where torch is needed
    """The objective's trainer. A model that will be divided stays in the host's memory: each device takes its part, layer by layer."""
    uri = objective.config.base.uri
    with hardware.loading_to("cpu" if arguments.get("fsdp") else hardware.device()):
        model, tokenizer = load(objective, base), models.load_tokenizer(base, uri)
        try:
            return objective.trainer(Parts(base, model, tokenizer, arguments, rows, validation, resuming))
        except ValueError as error:
            raise Invalid(f"{uri} cannot be trained so: {error}", Reason.MODEL_NOT_FOUND) from error


def load(objective: Objective, base: Path) -> models.Model:
    """LoRA, PromptTuning: the base to be frozen in bf16 under what is learned in fp32. Full: fp32 masters; bf16 is autocast's."""
    import torch

    config = objective.config
    # The adapter's random initialisation is drawn after this.
    torch.manual_seed(config.training.seed)
    frozen_in_half = config.method.type != "Full" and config.training.precision == "BF16"
    dtype: Dtype = "bfloat16" if frozen_in_half else "float32"
    model = objective.load_base(base, dtype) if config.quantization is None else objective.load_quantized(base, dtype)
    return model.train() if config.method.type == "Full" else model


def summarize(attempt: Attempt, seconds: float) -> TrainSummary:
    state, report = attempt.trainer.state, attempt.report
    return TrainSummary(
        step=state.global_step,
        max_steps=attempt.plan.max_steps,
        samples=state.global_step * attempt.plan.global_batch,
        loss=next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None),
        reward=report.reward,
        validation_loss=next((entry["eval_loss"] for entry in reversed(state.log_history) if "eval_loss" in entry), None),
        tokens_per_second=report.tokens_per_second(),
        seconds=round(seconds, 1),
        resumed_from_step=attempt.resumed.step if attempt.resumed else None,
        steps_lost=attempt.steps_lost,
        peak_memory_bytes=hardware.peak_memory_bytes(),
        micro_batch_size=attempt.plan.micro_batch,
    )


def finish(config: RunConfig, attempt: Attempt, summary: TrainSummary, folder: Path) -> StageResult:
    """Publish the weights of the last, or best, checkpoint with the run's log; the checkpoints are no longer needed."""
    state = attempt.trainer.state
    step = attempt.best.best_step if attempt.best is not None and attempt.best.best_step else state.global_step
    with staging(folder) as temporary:
        checkpoint = attempt.checkpoints.get(step)
        if attempt.plan.is_sharded:
            attempt.trainer.write_weights(checkpoint.folder, temporary)
        else:
            attempt.checkpoints.link_weights(checkpoint, temporary)
        (temporary / "log.json").write_text(json.dumps(state.log_history, indent=1))
        (temporary / SETTINGS).write_text(json.dumps(attempt.settings.record(), indent=1))
        result = StageResult(stage=Stage.TRAIN, exit_code=ExitCode.DONE, uri=str(folder / "log.json"), train=summary)
        write_result(temporary / RESULT_FILE, result)
        publish(temporary, folder, "checkpoint", {"run_key": run_key(config), "step": step, "method": config.method.type})
    tidy(config)
    return result


def tidy(config: RunConfig) -> None:
    """Remove what only a run needs that is not over."""
    for name in ("checkpoints", "writing"):
        shutil.rmtree(stage_folder(config, Stage.TRAIN) / name, ignore_errors=True)


def _stop_early(config: RunConfig, resumed: Checkpoint | None) -> Any:
    from tuneloop_trainer.training.callbacks import StopEarly

    patience = config.training.early_stopping_patience
    if patience is None or config.validation_fraction <= 0:
        return None
    if resumed is None:
        return StopEarly(patience)
    saved = json.loads((resumed.folder / "trainer_state.json").read_text())["stateful_callbacks"].get("StopEarly")
    return StopEarly.from_state(saved) if saved else StopEarly(patience)


def _dataset(folder: Path, name: str) -> Any:
    from datasets import Dataset, concatenate_datasets

    return concatenate_datasets([Dataset.from_file(path) for path in shard_files(folder, name)])
