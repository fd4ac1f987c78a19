"""The names of every metric of a training pod, and how they follow from a `Progress`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from tuneloop_trainer.contract import Progress

# metric -> (field of Progress, help)
GAUGES = {
    "tuneloop_trainer_step": ("step", "Optimizer steps done"),
    "tuneloop_trainer_max_steps": ("max_steps", "Optimizer steps of the whole run"),
    "tuneloop_trainer_progress_ratio": ("percent", "Share of the stage that is done, 0 to 1"),
    "tuneloop_trainer_samples": ("samples", "Rows trained on, or items scored"),
    "tuneloop_trainer_loss": ("loss", "Training loss of the last step, nats per token"),
    "tuneloop_trainer_reward": ("reward", "Mean reward of the last step's completions"),
    "tuneloop_trainer_learning_rate": ("learning_rate", "Learning rate of the last step"),
    "tuneloop_trainer_gradient_norm": ("gradient_norm", "Gradient norm of the last step, before clipping"),
    "tuneloop_trainer_tokens_per_second": ("tokens_per_second", "Tokens trained on a second, padding left out"),
    "tuneloop_trainer_rows_per_second": ("rows_per_second", "Rows tokenized, or items scored, a second"),
    "tuneloop_trainer_remaining_seconds": ("remaining_seconds", "Seconds that the stage will still take"),
    "tuneloop_trainer_checkpoint_step": ("checkpoint_step", "Step of the newest complete checkpoint"),
    "tuneloop_trainer_steps_lost": ("steps_lost", "Steps of the run that had to be done again, over all attempts so far"),
    "tuneloop_trainer_peak_memory_bytes": ("peak_memory_bytes", "Peak memory of the worker: the device's, or resident on a CPU"),
    "tuneloop_trainer_utilisation_ratio": ("utilisation", "Model FLOPs utilisation, 0 to 1; only of devices whose peak is known"),
    "tuneloop_trainer_reports_lost": ("reports_lost", "Events that MLflow or TensorBoard did not get"),
    "tuneloop_trainer_first_step_seconds": ("first_step_seconds", "From the worker's start to the end of its first step"),
}
PERCENT = ("percent", "utilisation")
PHASES = "tuneloop_trainer_phase_seconds"
INFO = "tuneloop_trainer_stage_info"


def render(progress: Progress) -> bytes:
    """The exposition text. A value that is not known yet has no sample, rather than a zero."""
    registry = CollectorRegistry()
    info = Gauge(INFO, "The stage and phase that run now", ["stage", "phase"], registry=registry)
    info.labels(stage=progress.stage.value, phase=progress.phase).set(1)
    for name, (field, text) in GAUGES.items():
        value = getattr(progress, field)
        if value is not None:
            Gauge(name, text, registry=registry).set(value / 100 if field in PERCENT else value)
    phases = Gauge(
        PHASES, "Time that each phase of the stage has taken; the one that runs now is not counted yet", ["phase"], registry=registry
    )
    for phase, seconds in progress.phase_seconds.items():
        phases.labels(phase=phase).set(seconds)
    return generate_latest(registry)
