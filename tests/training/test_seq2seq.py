"""Seq2Seq: rows of two sides, losses over the targets' tokens, answers that are compared letter by letter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.training.test_objectives import answer, improvement, optimised, run_through
from tests.training.test_training import losses
from tests.unit.trainer.builders import copy_work, make_encoder_decoder, replace, run_stage, write_jsonl
from tests.unit.trainer.objectives import make_run, row

from tuneloop_trainer import models
from tuneloop_trainer.contract import ExitCode, Gate, Lora, Method, Reason, RunConfig, Seq2Seq, Stage
from tuneloop_trainer.data.shards import read_rows
from tuneloop_trainer.evaluation import written
from tuneloop_trainer.objectives import objective_of


def trained(config: RunConfig, **fields: Any) -> RunConfig:
    return replace(config, training=config.training.model_copy(update=fields))


@pytest.mark.long
@pytest.mark.parametrize("method", ["LoRA", "Full"])
@pytest.mark.parametrize("kind", ["T5", "BART"])
def test_a_gate_of_answers_passes_a_model_that_learned_to_write_them(kind: Any, method: Any, tmp_path: Path) -> None:
    folder = make_encoder_decoder(tmp_path / "base" / "tiny", kind)
    config = make_run(tmp_path, folder, "Seq2Seq", steps=60)
    gate = Gate(suite="gate", metric="ChrF", rule="Superior", min_items=10)
    config = replace(config, evaluation=config.evaluation.model_copy(update={"gates": (gate,)}))
    if method == "Full":
        config = trained(replace(config, method=Method(type="Full")), learning_rate=5e-3)

    evaluated = run_through(config)[Stage.EVALUATE].evaluate

    assert improvement(optimised(config)) > 3
    (result,) = evaluated.gates
    assert (result.metric, result.verdict, result.n) == ("ChrF", "Pass", 20)
    assert result.difference > 0.1
    score = evaluated.scores["gate"]
    assert score.chrf == result.candidate > score.baseline_chrf
    assert 0 <= score.bleu <= 1
    assert answer(config, folder, "rainy tea 1001").split()[0] in ("negative", "positive")


def test_the_sides_of_a_row_are_cut_apart_and_a_source_keeps_its_end(tmp_path: Path, encoder_decoder: Path) -> None:
    config = trained(make_run(tmp_path, encoder_decoder, "Seq2Seq"), max_sequence_length=8)
    rows = [{"prompt": "sunny " * 9, "completion": "short"}, *({"prompt": "rain", "completion": f"tea {n}"} for n in range(9))]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)

    summary = run_stage(config, Stage.PREPARE).prepare

    cut = next(made for made in read_rows(tmp_path / "work" / "prepare", "train") if made.prompt_length == 8)
    assert cut.input_ids[7] == 1, "the encoder still sees that the text ends"
    assert cut.labels == [-100] * 8 + cut.input_ids[8:]
    assert cut.labels[-1] == 1, "the answer is whole"
    assert summary.truncated == 1


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        pytest.param(
            lambda n: {"completion": f"a long answer that goes on and on {n}"}, "and with them the end of the answer", id="answers"
        ),
        pytest.param(lambda n: {"completion": "same"}, "there is nothing to learn", id="one answer"),
    ],
)
def test_rows_whose_answers_cannot_be_learned_are_refused(
    edit: Callable[[int], dict[str, object]], sentence: str, tmp_path: Path, encoder_decoder: Path
) -> None:
    config = trained(make_run(tmp_path, encoder_decoder, "Seq2Seq"), max_sequence_length=12)
    write_jsonl(tmp_path / "data" / "train.jsonl", [row("Seq2Seq", number) | edit(number) for number in range(40)])

    result = run_stage(config, Stage.PREPARE)

    assert (result.exit_code, result.reason) == (ExitCode.INVALID, Reason.DATA_INVALID)
    assert sentence in result.message


def test_rows_longer_than_the_positions_of_the_base_are_refused_before_training(tmp_path: Path) -> None:
    config = make_run(tmp_path, make_encoder_decoder(tmp_path / "base" / "tiny", "BART"), "Seq2Seq")

    result = run_stage(trained(config, max_sequence_length=65), Stage.PREPARE)

    assert result.exit_code == ExitCode.INVALID
    assert "has 64 positions" in result.message


def test_the_loss_of_a_step_does_not_depend_on_its_micro_batches(tmp_path: Path, encoder_decoder: Path) -> None:
    config = make_run(tmp_path, encoder_decoder, "Seq2Seq", steps=2, method=Method(type="LoRA", lora=Lora(rank=4, alpha=8)))
    rows = [{"prompt": f"sunny {n}", "completion": "tea " * (1 + n % 5) + str(n)} for n in range(40)]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    assert run_stage(config, Stage.PREPARE).exit_code == ExitCode.DONE
    other = trained(copy_work(config, tmp_path / "other"), micro_batch_size=1)

    for each in (config, other):
        assert run_stage(each, Stage.TRAIN).exit_code == ExitCode.DONE

    assert losses(config) == pytest.approx(losses(other), rel=1e-5)


def test_losses_are_those_of_the_model_whatever_the_padding(tmp_path: Path, encoder_decoder: Path) -> None:
    import torch

    model = models.load_seq2seq(encoder_decoder, "tiny", "float32")
    items = [([5, 6, 7, 1], [9, 1]), ([8, 1], [9, 10, 11, 12, 1]), ([4, 3, 1], [7, 1])]

    found = written.losses(model, items, lambda _: None)

    for (source, target), (loss, count) in zip(items, found, strict=True):
        with torch.inference_mode():
            alone = model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).loss
        assert loss / count == pytest.approx(float(alone), rel=1e-4)
        assert count == len(target)


def test_scores_of_other_beams_are_not_taken_from_the_cache(tmp_path: Path, encoder_decoder: Path) -> None:
    config = make_run(tmp_path, encoder_decoder, "Seq2Seq")
    other = replace(config, seq2seq=Seq2Seq(max_answer_tokens=12, beams=4))

    assert objective_of(config).scoring != objective_of(other).scoring
    assert objective_of(config).scoring != objective_of(trained(config, max_sequence_length=24)).scoring


def test_likeness_of_texts_is_that_of_their_letters() -> None:
    same, near, far = written.chrf(["the day is sunny", "the day was sunny", "x"], ["the day is sunny"] * 3)

    assert same == pytest.approx(1)
    assert 0.5 < near < 1
    assert far < 0.1
    assert written.bleu(["the day is sunny today"], ["the day is sunny today"]) == pytest.approx(1)
