"""Every method trains, resumes to the last bit, and leaves a model that says what the trained one said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.training.test_objectives import answer, improvement, make_run, optimised, run_through
from tests.training.test_training import InterruptAfter, losses, weights
from tests.unit.trainer.builders import copy_work, run_stage

from tuneloop_trainer import models
from tuneloop_trainer.contract import ExitCode, Lora, Method, RunConfig, Stage
from tuneloop_trainer.manifests import verify

DORA = Method(type="LoRA", lora=Lora(rank=8, alpha=16, dora=True))


def logits(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def trained_logits(config: RunConfig, base: Path, ids: list[int]) -> Any:
    """Of the base with what was trained on it, in fp32."""
    return logits(models.load_adapter(models.load_model(base, "base", "float32"), Path(config.paths.work) / "train" / "final"), ids)


def packaged_logits(config: RunConfig, ids: list[int]) -> Any:
    verify(Path(config.paths.artifact))
    return logits(models.load_model(Path(config.paths.artifact), "merged", "float32"), ids)


# --- DoRA ------------------------------------------------------------------------------------------


def test_dora_learns_and_its_merged_model_says_what_the_adapter_said(tmp_path: Path, base: Path) -> None:
    from peft import PeftModel

    config = make_run(tmp_path, base, "SFT", method=DORA)

    run_through(config)

    assert improvement(optimised(config)) > 3
    assert answer(config, base, "rainy tea 1001") in ("negative", "positive")
    ids = list(range(3, 40))
    trained, merged = trained_logits(config, base, ids), packaged_logits(config, ids)
    before = logits(models.load_model(base, "base", "float32"), ids)
    error, learned = (merged - trained).abs().mean(), (trained - before).abs().mean()
    assert error < 0.02 * learned, "what is left of the difference is the rounding to bf16"

    adapter = PeftModel.from_pretrained(models.load_model(base, "base", "float32"), Path(config.paths.work) / "train" / "final")
    lengths = {name: value for name, value in adapter.named_parameters() if "lora_magnitude_vector" in name}
    assert len(lengths) == 14, "one of each of seven layers in two"
    for value in lengths.values():
        value.data.mul_(1.05)
    assert (logits(adapter, ids) - trained).abs().mean() > 0.02 * learned, "lengths that were lost in the merge would be seen"


@pytest.mark.long
def test_interrupted_run_of_dora_ends_bit_equal(tmp_path: Path, base: Path) -> None:
    config = make_run(tmp_path, base, "SFT", steps=4, method=Method(type="LoRA", lora=Lora(rank=4, alpha=8, dropout=0.1, dora=True)))
    run_stage(config, Stage.PREPARE)
    undisturbed = copy_work(config, tmp_path / "undisturbed")
    run_stage(undisturbed, Stage.TRAIN)

    stopped = run_stage(config, Stage.TRAIN, InterruptAfter(2))
    resumed = run_stage(config, Stage.TRAIN)

    assert (stopped.exit_code, resumed.exit_code, resumed.train.resumed_from_step) == (ExitCode.INTERRUPTED, ExitCode.DONE, 2)
    assert losses(config) == losses(undisturbed)
    assert weights(config) == weights(undisturbed)
