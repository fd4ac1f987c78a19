"""Pretraining from scratch: tokenizer and weights of the run's own, the same for the same seed, packaged as any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import Zygote
from tests.training.runs import together
from tests.training.test_objectives import improvement, optimised, run_through
from tests.training.test_sharded import prepare_again
from tests.training.test_training import InterruptAfter, losses
from tests.unit.trainer.builders import copy_work, run_stage
from tests.unit.trainer.objectives import SMALL, made, make_scratch

from tuneloop_trainer import scratch
from tuneloop_trainer.contract import Base, ExitCode, Stage
from tuneloop_trainer.manifests import sha256_file


def test_a_model_from_scratch_learns_more_than_frequencies_and_loads_as_any_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make_scratch(tmp_path)

    results = run_through(config)

    assert improvement(optimised(config)) > 3
    (result,) = results[Stage.EVALUATE].evaluate.gates
    assert (result.metric, result.verdict, result.n) == ("Loss", "Pass", 40)
    assert result.baseline < 6, "the baseline knows how often each token occurs; drawn weights would be at ln 400 = 6"
    folder = Path(config.paths.artifact)
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["architectures"], saved["model_type"], saved["vocab_size"] % 64) == (["LlamaForCausalLM"], "llama", 0)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) <= saved["vocab_size"] == model.get_input_embeddings().num_embeddings
    said = model.generate(**tokenizer("sunny day 1 is", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(said[0]).startswith("sunny day 1 is")
    summary = results[Stage.PREPARE].prepare
    assert summary.model.parameters == model.num_parameters()
    assert summary.base_digest.startswith("sha256:")


@pytest.mark.long
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_model_from_scratch_learns_with_each_of_three_seeds(family: Any, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        config = make_scratch(tmp_path / str(seed), SMALL.model_copy(update={"family": family, "tie_embeddings": seed == 1}), seed=seed)
        results = run_through(config)
        assert improvement(optimised(config)) > 3
        assert results[Stage.EVALUATE].evaluate.verdict == "Pass"


def test_the_same_seed_gives_the_same_tokenizer_and_the_same_weights(tmp_path: Path) -> None:
    one, again = make_scratch(tmp_path / "one"), make_scratch(tmp_path / "again")
    other = make_scratch(tmp_path / "other", seed=7)
    results = [run_stage(config, Stage.PREPARE) for config in (one, again, other)]

    assert {result.exit_code for result in results} == {ExitCode.DONE}
    digests = [result.prepare.base_digest for result in results]
    assert digests[0] == digests[1] == digests[2], "the seed is no part of architecture and tokenizer"
    drawn = [scratch.draw(made(config), config.training.seed, "float32").state_dict() for config in (one, again, other)]
    assert all(drawn[0][name].equal(drawn[1][name]) for name in drawn[0])
    assert not all(drawn[0][name].equal(drawn[2][name]) for name in drawn[0])


@pytest.mark.long
def test_interrupted_run_from_scratch_ends_bit_equal(tmp_path: Path) -> None:
    config = make_scratch(tmp_path, steps=4)
    assert run_stage(config, Stage.PREPARE).exit_code == ExitCode.DONE
    undisturbed = copy_work(config, tmp_path / "undisturbed")
    assert run_stage(undisturbed, Stage.TRAIN).exit_code == ExitCode.DONE

    stopped = run_stage(config, Stage.TRAIN, InterruptAfter(2))
    resumed = run_stage(config, Stage.TRAIN)

    assert (stopped.exit_code, resumed.exit_code, resumed.train.resumed_from_step) == (ExitCode.INTERRUPTED, ExitCode.DONE, 2)
    assert losses(config) == losses(undisturbed)
    finals = [Path(each.paths.work) / "train" / "final" / "model.safetensors" for each in (config, undisturbed)]
    assert sha256_file(finals[0]) == sha256_file(finals[1])


@pytest.mark.parametrize("training", [{}, {"parallelism": "FSDP"}], ids=["DataParallel", "FSDP"])
def test_several_processes_draw_one_model_and_train_it_as_one_does(zygote: Zygote, tmp_path: Path, training: dict[str, str]) -> None:
    prepared = make_scratch(tmp_path / "prepared", steps=6)
    assert zygote.run(prepared, Stage.PREPARE).exit_code == ExitCode.DONE
    alone = prepare_again(zygote, prepared, tmp_path / "alone")
    assert zygote.run(alone, Stage.TRAIN).exit_code == ExitCode.DONE
    config = prepare_again(zygote, prepared, tmp_path / "together", **training)

    result = zygote.run(config, Stage.TRAIN, **together())

    assert (result.exit_code, result.message) == (ExitCode.DONE, "")
    assert losses(config) == pytest.approx(losses(alone), rel=1e-4)
    found, expected = (load_file(Path(of.paths.work) / "train" / "final" / "model.safetensors") for of in (config, alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.02, atol=1e-4)


def test_a_given_tokenizer_is_taken_without_its_weights(tmp_path: Path, decoder: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (given / name).write_bytes((decoder / name).read_bytes())
    config = make_scratch(tmp_path, SMALL.model_copy(update={"vocabulary_size": None}), Base(uri="pvc://models/given", path=str(given)))

    result = run_stage(config, Stage.PREPARE)

    assert result.exit_code == ExitCode.DONE, result.message
    assert sha256_file(made(config) / "tokenizer.json") == sha256_file(given / "tokenizer.json")
    shape = json.loads((made(config) / "config.json").read_text())
    assert (shape["vocab_size"], shape["eos_token_id"], shape["max_position_embeddings"]) == (384, 2, 64)


def test_a_base_that_changed_after_prepare_is_not_trained(tmp_path: Path) -> None:
    config = make_scratch(tmp_path)
    assert run_stage(config, Stage.PREPARE).exit_code == ExitCode.DONE
    shape = made(config) / "config.json"
    shape.write_text(shape.read_text().replace('"hidden_size": 64', '"hidden_size": 32'))

    assert run_stage(config, Stage.TRAIN).exit_code != ExitCode.DONE
