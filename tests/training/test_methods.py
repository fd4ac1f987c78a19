"""Every method trains, resumes to the last bit, and leaves a model that says what the trained one said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.training.test_objectives import OBJECTIVES, answer, improvement, optimised, run_through
from tests.training.test_training import InterruptAfter, losses, weights
from tests.unit.trainer.builders import copy_work, make_base, make_config, replace, run_stage, write_jsonl
from tests.unit.trainer.objectives import THINGS, make_run

from tuneloop_trainer import models
from tuneloop_trainer.contract import (
    Curation,
    DataSource,
    Evaluation,
    ExitCode,
    Gate,
    Lora,
    Method,
    ObjectiveType,
    PromptTuning,
    Quantization,
    RunConfig,
    Stage,
    Suite,
    Training,
    Vocabulary,
)
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


def assert_ends_bit_equal_though_interrupted(config: RunConfig, beside: Path) -> None:
    run_stage(config, Stage.PREPARE)
    undisturbed = copy_work(config, beside)
    run_stage(undisturbed, Stage.TRAIN)

    stopped = run_stage(config, Stage.TRAIN, InterruptAfter(2))
    resumed = run_stage(config, Stage.TRAIN)

    assert (stopped.exit_code, resumed.exit_code, resumed.train.resumed_from_step) == (ExitCode.INTERRUPTED, ExitCode.DONE, 2)
    assert losses(config) == losses(undisturbed)
    assert weights(config) == weights(undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "SFT"])
def test_dora_goes_with_every_objective(objective: ObjectiveType, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue("encoder_decoder" if objective == "Seq2Seq" else "decoder")
    config = make_run(tmp_path, base, objective, method=DORA)

    run_through(config)

    assert improvement(optimised(config)) > 2, "two standard errors: RLOO's rewards scatter"


@pytest.mark.long
def test_interrupted_run_of_dora_ends_bit_equal(tmp_path: Path, base: Path) -> None:
    config = make_run(tmp_path, base, "SFT", steps=4, method=Method(type="LoRA", lora=Lora(rank=4, alpha=8, dropout=0.1, dora=True)))
    assert_ends_bit_equal_though_interrupted(config, tmp_path / "undisturbed")


# --- a new vocabulary ------------------------------------------------------------------------------

STEMS = ("cardi", "neph", "hepat", "gastr", "osteo", "derm", "neur", "pulmon", "angi", "myel", "cyst", "arthr")
ENDS = ("oplasty", "ectomia", "ography", "opathia")
COMPLAINTS = tuple(stem + end for stem in STEMS for end in ENDS)


def note(number: int) -> dict[str, object]:
    """A note of a domain whose words the base's tokenizer never saw."""
    first, second = COMPLAINTS[number % 48], COMPLAINTS[number * 7 % 48]
    return {"text": f"the {THINGS[number % 10]} says {first} and {second} follow a {THINGS[number // 3 % 10]} with {first}."}


def notes_run(root: Path, base: Path, method: Method, vocabulary: Vocabulary | None, steps: int, rate: float, **fields: Any) -> RunConfig:
    train = write_jsonl(root / "data" / "train.jsonl", [note(number) for number in range(400)])
    held = write_jsonl(root / "data" / "gate.jsonl", [note(number) | {"id": number} for number in range(5003, 5033)])
    suite = Suite(name="gate", type="Dataset", source=DataSource(uri="pvc://data/gate.jsonl", path=str(held)), metrics=("Loss",))
    values: dict[str, Any] = {
        "objective": "Pretraining",
        "method": method,
        "vocabulary": vocabulary,
        "curation": Curation(decontaminate=False),
        "training": Training(
            max_steps=steps, global_batch_size=8, learning_rate=rate, max_sequence_length=64, warmup_steps=2, precision="FP32"
        ),
        "evaluation": Evaluation(suites=(suite,), gates=(Gate(suite="gate", metric="Loss", rule="Superior", min_items=10),)),
        "output_format": "Merged",
    }
    return make_config(root, base, [DataSource(uri="pvc://data/train.jsonl", path=str(train))], **(values | fields))


OLD = 369
"""Tokens of the base's tokenizer; its matrices have 400 rows."""
VOCABULARY = Vocabulary(min_count=5, min_fertility=3, max_tokens=60)
FULL, LORA = Method(type="Full"), Method(type="LoRA", lora=Lora(rank=8, alpha=16))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("untied") / "tiny", tie_word_embeddings=False)


def rows_of(folder: Path) -> dict[str, Any]:
    """The matrices with a row for each token."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.float() for name, tensor in tensors.items() if "embed_tokens" in name or "lm_head" in name}


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_new_rows_begin_as_the_mean_of_the_rows_their_words_were_made_of(is_tied: bool, tmp_path: Path, base: Path, untied: Path) -> None:
    folder = base if is_tied else untied
    config = notes_run(tmp_path, folder, LORA, VOCABULARY, steps=4, rate=1e-2)

    result = run_stage(config, Stage.PREPARE)

    told = json.loads((tmp_path / "work" / "prepare" / "vocabulary.json").read_text())
    assert result.prepare.vocabulary.tokens == len(told["ids"]) == len(told["terms"])
    assert {f" {word}" for word in COMPLAINTS} <= {term["text"] for term in told["terms"]}
    assert result.prepare.vocabulary.sample_after < 0.6 * result.prepare.vocabulary.sample_before
    before, after = rows_of(folder), rows_of(tmp_path / "work" / "prepare" / "base")
    assert len(after) == (1 if is_tied else 2)
    old = models.load_tokenizer(folder, "old")
    assert told["ids"] == list(range(OLD, OLD + len(told["ids"]))), "rows that stood unused behind the old tokens come first"
    for name, rows in after.items():
        assert rows.shape[0] == told["ids"][-1] + 1 > before[name].shape[0]
        assert rows[:OLD].equal(before[name][:OLD]), "the old rows are as they were"
        for id_, term in zip(told["ids"], told["terms"], strict=True):
            mean = before[name][old(term["text"])["input_ids"]].mean(0).bfloat16().float()
            assert rows[id_].equal(mean)


def test_packaged_vocabulary_loads_with_its_model_and_reads_old_texts_as_before(tmp_path: Path, base: Path) -> None:
    config = notes_run(tmp_path, base, LORA, VOCABULARY, steps=4, rate=1e-2)
    for stage in (Stage.PREPARE, Stage.TRAIN, Stage.PACKAGE):
        assert run_stage(config, stage).exit_code == ExitCode.DONE

    old, new = models.load_tokenizer(base, "old"), models.load_tokenizer(Path(config.paths.artifact), "new")
    model = models.load_model(Path(config.paths.artifact), "new", "bfloat16")
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(new)
    plain, noted = "Sentiment of: a lovely day", str(note(3)["text"])
    assert new(plain)["input_ids"] == old(plain)["input_ids"]
    ids = new(noted)["input_ids"]
    assert len(ids) < 0.6 * len(old(noted)["input_ids"])
    assert new.decode(ids) == noted
    assert "cardioplasty" not in new.decode(new("the cardioplasti")["input_ids"])


@pytest.mark.parametrize("method", [pytest.param(LORA, id="LoRA"), pytest.param(FULL, id="Full", marks=pytest.mark.long)])
def test_new_words_shorten_texts_and_lower_the_loss_of_each_byte(method: Method, tmp_path: Path, base: Path) -> None:
    rate = 1e-2 if method is LORA else 3e-3
    losses_of = {}
    for name, vocabulary in (("with", VOCABULARY), ("without", None)):
        config = notes_run(tmp_path / name, base, method, vocabulary, steps=40, rate=rate)
        results = run_through(config)
        assert results[Stage.EVALUATE].evaluate.gates[0].difference < 0, "better than the base, which cuts the texts as it always did"
        told = json.loads((tmp_path / name / "work" / "evaluate" / "results.json").read_text())["suites"]["gate"]["candidate"]["losses"]
        size = sum(len(str(note(number)["text"]).encode()) for number in range(5003, 5033))
        losses_of[name] = sum(loss for loss, _ in told) / size
        if vocabulary is not None:
            assert sum(count for _, count in told) == size, "losses are told for each byte"
    assert losses_of["with"] < 0.9 * losses_of["without"]


@pytest.mark.parametrize("is_tied", [True, pytest.param(False, marks=pytest.mark.long)], ids=["tied", "untied"])
def test_only_the_new_rows_are_learned_at_first(is_tied: bool, tmp_path: Path, base: Path, untied: Path) -> None:
    config = notes_run(tmp_path, base if is_tied else untied, FULL, VOCABULARY, steps=20, rate=1e-2)
    run_stage(config, Stage.PREPARE)

    run_stage(config, Stage.TRAIN, InterruptAfter(2))

    from safetensors.torch import load_file

    before = load_file(tmp_path / "work" / "prepare" / "base" / "model.safetensors")
    after = load_file(tmp_path / "work" / "train" / "checkpoints" / "step-2" / "model.safetensors")
    for name, tensor in after.items():
        start = before[name].float()
        if "embed_tokens" in name or "lm_head" in name:
            assert tensor[:OLD].equal(start[:OLD])
            assert not tensor[OLD:].equal(start[OLD:])
        else:
            assert tensor.equal(start), name
    run_stage(config, Stage.TRAIN, InterruptAfter(2))
    later = load_file(tmp_path / "work" / "train" / "checkpoints" / "step-4" / "model.safetensors")
    assert not later["model.layers.0.mlp.up_proj.weight"].equal(after["model.layers.0.mlp.up_proj.weight"]), "then the method's weights too"


@pytest.mark.parametrize("is_tied", [True, pytest.param(False, marks=pytest.mark.long)], ids=["tied", "untied"])
def test_rows_beside_an_adapter_are_merged_and_resumed(is_tied: bool, tmp_path: Path, base: Path, untied: Path) -> None:
    folder = base if is_tied else untied
    config = notes_run(tmp_path, folder, LORA, VOCABULARY, steps=20, rate=1e-2)
    run_stage(config, Stage.PREPARE)
    undisturbed = copy_work(config, tmp_path / "undisturbed")
    run_stage(undisturbed, Stage.TRAIN)

    run_stage(config, Stage.TRAIN, InterruptAfter(1))
    run_stage(config, Stage.TRAIN, InterruptAfter(1))
    resumed = run_stage(config, Stage.TRAIN)
    run_stage(config, Stage.PACKAGE)

    assert resumed.train.resumed_from_step == 2, "where the rows are no longer alone"
    assert losses(config) == losses(undisturbed)
    assert weights(config) == weights(undisturbed)
    ids = [*range(3, 20), *range(OLD, OLD + 48)]
    trained, merged = trained_logits(config, tmp_path / "work" / "prepare" / "base", ids), packaged_logits(config, ids)
    before = logits(models.load_model(tmp_path / "work" / "prepare" / "base", "base", "float32"), ids)
    assert (merged - trained).abs().mean() < 0.02 * (trained - before).abs().mean()
    rows = rows_of(Path(config.paths.artifact))
    start = rows_of(tmp_path / "work" / "prepare" / "base")
    assert all(rows[name][:OLD].equal(start[name][:OLD]) and not rows[name][OLD:].equal(start[name][OLD:]) for name in start)


def test_corpus_without_such_words_keeps_its_vocabulary(tmp_path: Path, base: Path) -> None:
    config = notes_run(tmp_path, base, LORA, Vocabulary(min_count=5000), steps=4, rate=1e-2)

    result = run_stage(config, Stage.PREPARE)

    assert result.prepare.vocabulary.tokens == 0
    assert any("the vocabulary stays as it is" in warning for warning in result.prepare.warnings)
    assert not (tmp_path / "work" / "prepare" / "base").exists()
    assert run_stage(config, Stage.TRAIN).exit_code == ExitCode.DONE


# --- prompt tuning ---------------------------------------------------------------------------------

PROMPT = Method(type="PromptTuning", prompt_tuning=PromptTuning(virtual_tokens=8))


def prompt_run(root: Path, base: Path, steps: int = 40) -> RunConfig:
    config = make_run(root, base, "SFT", steps=steps, method=PROMPT, output_format="Adapter")
    return replace(config, training=config.training.model_copy(update={"learning_rate": 0.1}))


def test_learned_prompt_is_kept_alone_and_read_as_it_was_trained(tmp_path: Path, base: Path) -> None:
    from peft import PeftModel

    from tuneloop_trainer.objectives import objective_of
    from tuneloop_trainer.stages.evaluate import load_artifact, packaged, read_as

    config = prompt_run(tmp_path, base)

    results = run_through(config)

    assert improvement(optimised(config)) > 3
    assert results[Stage.EVALUATE].evaluate.gates[0].difference < 0, "better than the base without it"
    artifact, objective = packaged(config), objective_of(config, tmp_path / "work" / "prepare")
    assert artifact.format == "Adapter"
    formatter = read_as(objective, artifact, base, "base")
    ids = formatter.prompt_ids("rainy tea 1001")
    loaded = load_artifact(objective, artifact, base, "base")
    trained = PeftModel.from_pretrained(models.load_model(base, "base", "bfloat16"), Path(artifact.path))
    assert (ids[:8], max(ids[8:]) < 400) == (list(range(400, 408)), True)
    assert logits(loaded, ids).allclose(logits(trained, ids[8:]), atol=0.05), "peft's own wrapper says the same"
    plain = logits(models.load_model(base, "base", "bfloat16"), ids[8:])
    assert not plain.allclose(logits(trained, ids[8:])[8:], atol=0.5), "which differs from what the base says"


def test_interrupted_run_of_a_learned_prompt_ends_bit_equal(tmp_path: Path, base: Path) -> None:
    config = prompt_run(tmp_path, base, steps=4)
    assert_ends_bit_equal_though_interrupted(config, tmp_path / "undisturbed")


@pytest.mark.long
def test_learned_prompt_can_be_what_another_run_is_compared_with(tmp_path: Path, base: Path) -> None:
    from tuneloop_trainer.contract import Artifact, Baseline

    first = prompt_run(tmp_path / "first", base)
    told = run_through(first)[Stage.PACKAGE].package
    second = make_run(tmp_path / "second", base, "SFT")
    pinned = Artifact(path=told.path, manifest_digest=told.manifest_digest, format="Adapter", base=second.base)
    baseline = Baseline(type="ModelVersion", name="first", artifact=pinned)
    config = replace(second, evaluation=second.evaluation.model_copy(update={"baseline": baseline}))

    gate = run_through(config)[Stage.EVALUATE].evaluate.gates[0]

    scored = json.loads((tmp_path / "first" / "work" / "evaluate" / "results.json").read_text())["suites"]["gate"]["candidate"]["losses"]
    mean = sum(loss for loss, _ in scored) / sum(count for _, count in scored)
    assert gate.baseline == pytest.approx(mean, rel=1e-3), "the same losses as when it was judged itself"


# --- QLoRA -----------------------------------------------------------------------------------------


def test_gradients_through_a_base_in_four_bits_are_those_of_its_rounded_weights(base: Path) -> None:
    """On the device that is there, after an evaluation as before: what says whether quantised training is sound on it."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name in ("bfloat16", "float32"):
        dtype = getattr(torch, name)
        model = models.load_model(base, "base", name, Quantization())  # type: ignore[arg-type]
        said_first = logits(model, [3, 4, 5])
        layer = model.train().model.layers[0].mlp.up_proj
        assert isinstance(layer, Linear4bit)
        given = torch.randn(4, 32, dtype=dtype, device=model.device, requires_grad=True)
        said = layer(given)
        back = torch.randn_like(said)
        said.backward(back)
        rounded = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
        assert torch.allclose(said, given @ rounded.T, rtol=1e-2, atol=1e-3)
        assert torch.allclose(given.grad, back @ rounded, rtol=1e-2, atol=1e-3)
        assert torch.allclose(logits(model, [3, 4, 5]), said_first, rtol=1e-2, atol=1e-2)


def in_four_bits(root: Path, base: Path, precision: Any, **fields: Any) -> RunConfig:
    """A run that is validated between its steps."""
    validated = {"validation_fraction": 0.2, "curation": Curation(decontaminate=False)}
    config = make_run(root, base, "SFT", **({"quantization": Quantization()} | validated | fields))
    return replace(config, training=config.training.model_copy(update={"precision": precision, "early_stopping_patience": 20}))


@pytest.mark.parametrize("precision", ["BF16", pytest.param("FP32", marks=pytest.mark.long)])
def test_adapter_learns_on_a_base_in_four_bits_and_is_judged_on_the_base_as_it_is(
    precision: Any, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_four_bits(tmp_path, base, precision, output_format="Adapter")

    for stage in (Stage.PREPARE, Stage.TRAIN):
        result = run_stage(config, stage)
    assert result.train.validation_loss is not None
    assert improvement(optimised(config)) > 3

    monkeypatch.delattr(models, "_in_few_bits")
    assert run_stage(config, Stage.PACKAGE).exit_code == ExitCode.DONE
    assert run_stage(config, Stage.EVALUATE).evaluate.gates[0].difference < 0


def test_adapter_of_a_base_in_four_bits_is_a_plain_adapter_that_merges_into_the_base_as_it_is(tmp_path: Path, base: Path) -> None:
    from safetensors.torch import load_file

    plain = in_four_bits(tmp_path / "plain", base, "BF16", output_format="Adapter", steps=2, quantization=None)
    adapter = in_four_bits(tmp_path / "adapter", base, "BF16", output_format="Adapter", steps=2)
    merged = in_four_bits(tmp_path / "merged", base, "BF16", output_format="Merged", steps=6)
    for config in (plain, adapter, merged):
        for stage in (Stage.PREPARE, Stage.TRAIN, Stage.PACKAGE):
            assert run_stage(config, stage).exit_code == ExitCode.DONE

    files = [load_file(Path(each.paths.artifact) / "adapter_model.safetensors") for each in (plain, adapter)]
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in file.items()} for file in files]
    assert shapes[0] == shapes[1], "in fp32 too: small steps are not lost in bf16"
    settings = [json.loads((Path(each.paths.artifact) / "adapter_config.json").read_text()) for each in (plain, adapter)]
    assert settings[0] == settings[1], "nothing in it asks an engine for four bits"
    assert losses(plain)[0] != losses(adapter)[0], "the base was in four bits"

    ids = list(range(3, 40))
    trained, whole = trained_logits(merged, base, ids), packaged_logits(merged, ids)
    before = logits(models.load_model(base, "base", "float32"), ids)
    assert (whole - trained).abs().mean() < 0.05 * (trained - before).abs().mean()
    assert "quantization_config" not in json.loads((Path(merged.paths.artifact) / "config.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize("objective", ["SFT", "DPO", "KTO", "Pretraining", "GRPO", "RLOO"])
def test_interrupted_run_on_a_base_in_four_bits_ends_bit_equal(objective: Any, tmp_path: Path, base: Path) -> None:
    config = make_run(tmp_path, base, objective, steps=4, quantization=Quantization())
    assert_ends_bit_equal_though_interrupted(config, tmp_path / "undisturbed")
