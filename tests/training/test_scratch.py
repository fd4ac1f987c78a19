"""Pretraining from scratch: tokenizer and weights of the run's own, the same for the same seed, packaged as any model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import Zygote
from tests.training.test_many_processes import together
from tests.training.test_objectives import improvement, optimised, row, run_through, source
from tests.training.test_sharded import prepare_again
from tests.training.test_training import InterruptAfter, losses
from tests.unit.trainer.builders import copy_work, make_config, run_stage, write_jsonl

from tuneloop_trainer import scratch
from tuneloop_trainer.contract import (
    Base,
    Checkpoint,
    Evaluation,
    ExitCode,
    Gate,
    Method,
    Reason,
    RunConfig,
    Scratch,
    Stage,
    Suite,
    Training,
)
from tuneloop_trainer.data.records import Record
from tuneloop_trainer.manifests import sha256_file

SMALL = Scratch(
    family="Llama", layers=2, hidden_size=64, heads=4, key_value_heads=2, intermediate_size=128, tie_embeddings=True, vocabulary_size=400
)


def make_scratch(root: Path, asked: Scratch = SMALL, base: Base | None = None, seed: int = 42, steps: int = 60, **fields: Any) -> RunConfig:
    """A run over 200 texts, judged by 40 unseen ones."""
    suite = Suite(name="texts", type="Dataset", source=source(root, "Pretraining", "gate", 1000, 40), metrics=("Loss",))
    gate = Gate(suite="texts", metric="Loss", rule="Superior", min_items=10)
    values: dict[str, Any] = {
        "objective": "Pretraining",
        "scratch": asked,
        "base": base or Base(uri="the training rows"),
        "method": Method(type="Full"),
        "prompt_format": "Text",
        "training": Training(
            max_steps=steps, global_batch_size=8, learning_rate=3e-3, max_sequence_length=64, warmup_steps=2, precision="FP32", seed=seed
        ),
        "checkpoint": Checkpoint(every_minutes=None, every_steps=10, keep=2),
        "evaluation": Evaluation(suites=(suite,), gates=(gate,)),
        "output_format": "Merged",
    }
    return make_config(root, root / "none", [source(root, "Pretraining", "train", 0, 200)], **(values | fields))


def made(config: RunConfig) -> Path:
    return Path(config.paths.work) / "prepare" / "base"


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


def test_a_tokenizer_that_needs_code_is_refused(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenizer.Mine", None]}}))
    config = make_scratch(tmp_path, SMALL.model_copy(update={"vocabulary_size": None}), Base(uri="pvc://models/given", path=str(given)))

    result = run_stage(config, Stage.PREPARE)

    assert (result.exit_code, result.reason) == (ExitCode.INVALID, Reason.MODEL_NOT_FOUND)
    assert "needs code of its own (auto_map in tokenizer_config.json)" in result.message


def test_a_link_out_of_a_claim_is_not_copied_into_the_model(tmp_path: Path, decoder: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (given / name).write_bytes((decoder / name).read_bytes())
    (tmp_path / "secret").write_text("token")
    (given / "vocab.json").symlink_to(tmp_path / "secret")
    config = make_scratch(tmp_path, SMALL.model_copy(update={"vocabulary_size": None}), Base(uri="pvc://models/given", path=str(given)))

    result = run_stage(config, Stage.PREPARE)

    assert (result.exit_code, result.reason) == (ExitCode.INVALID, Reason.MODEL_NOT_FOUND)
    assert "vocab.json is a link that leads outside its claim" in result.message
    assert not made(config).exists()


def test_a_base_that_changed_after_prepare_is_not_trained(tmp_path: Path) -> None:
    config = make_scratch(tmp_path)
    assert run_stage(config, Stage.PREPARE).exit_code == ExitCode.DONE
    shape = made(config) / "config.json"
    shape.write_text(shape.read_text().replace('"hidden_size": 64', '"hidden_size": 32'))

    assert run_stage(config, Stage.TRAIN).exit_code != ExitCode.DONE


def records(count: int) -> list[Record]:
    texts = [f"{row('Pretraining', number)['text']} zürich 東京 {number}" for number in range(count)]
    return [Record("", text, str(number), text, number) for number, text in enumerate(texts)]


def test_every_text_comes_back_from_a_tokenizer_that_never_saw_its_letters() -> None:
    tokenizer = scratch.train_tokenizer(lambda: records(50), 400)

    for text in ("sunny day", "Ωmega 🚀 \t  two  spaces\n", "\u0000\u007f"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 400
    assert tokenizer.convert_tokens_to_ids(scratch.END) == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_a_corpus_beyond_the_bound_is_sampled_by_its_content() -> None:
    everything = records(400)
    size = sum(len(record.completion.encode()) for record in everything)

    some = list(scratch.sampled(lambda: everything, size // 4))

    assert 0.5 < sum(map(len, some)) / (size / 4) < 1.5
    assert sorted(some) == sorted(scratch.sampled(lambda: everything[::-1], size // 4)), "the order is not what decides"
    assert len(list(scratch.sampled(lambda: everything, size))) == 400


def test_frequencies_are_those_of_the_training_rows(tmp_path: Path) -> None:
    from tuneloop_trainer.evaluation.frequencies import log_shares

    config = make_scratch(tmp_path)
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": "a a a b " + "c" * number} for number in range(1, 40)])
    assert run_stage(config, Stage.PREPARE).exit_code == ExitCode.DONE

    shares = log_shares(tmp_path / "work" / "prepare", 1)

    assert sum(map(math.exp, shares)) == pytest.approx(1)
