"""Every objective improves what it optimises, resumes to the last bit, and leaves a model that loads from its manifest and answers."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from tests.training.test_training import InterruptAfter, checkpoints, losses, weights
from tests.unit.trainer.builders import copy_work, replace, run_stage
from tests.unit.trainer.objectives import WRITING, install, make_custom, make_run, rewarded

from tuneloop_trainer.contract import (
    HELD_OUT_METRICS,
    Curation,
    EntryPoint,
    Evaluation,
    ExactMatch,
    ExitCode,
    Lora,
    Method,
    ObjectiveType,
    Reason,
    Reward,
    Rollouts,
    RunConfig,
    Scorer,
    Stage,
)
from tuneloop_trainer.data.records import RowReader
from tuneloop_trainer.objectives import MODULES, objective_of

OBJECTIVES: tuple[ObjectiveType, ...] = tuple(MODULES)  # type: ignore[arg-type]
ROLLING_OUT = ("GRPO", "RLOO")


def optimised(config: RunConfig) -> list[float]:
    """Per step what the objective improves, where less is better."""
    names = {"DPO": "rewards/margins", "KTO": "rewards/margins", "GRPO": "reward", "RLOO": "reward"}
    name, sign = (names[config.objective], -1) if config.objective in names else ("loss", 1)
    log = json.loads((Path(config.paths.work) / "train" / "final" / "log.json").read_text())
    return [sign * entry[name] for entry in log if name in entry]


def improvement(values: list[float]) -> float:
    """How many standard errors the mean of the last ten lies below that of the first ten."""
    first, last = values[:10], values[-10:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / 10)
    return (statistics.mean(first) - statistics.mean(last)) / max(error, 1e-12)


def run_through(config: RunConfig) -> dict[Stage, Any]:
    results = {}
    for stage in Stage:
        results[stage] = run_stage(config, stage)
        assert results[stage].exit_code == ExitCode.DONE, (stage, results[stage].message)
    return results


def answer(config: RunConfig, base: Path, prompt: str) -> str:
    """What the packaged model says, loaded from its manifest."""
    from tuneloop_trainer import models
    from tuneloop_trainer.evaluation import scoring, written
    from tuneloop_trainer.stages.evaluate import load_artifact, packaged

    prepared = Path(config.paths.work) / "prepare"
    objective = objective_of(config, prepared)
    model = load_artifact(objective, packaged(config), base, config.base.uri)
    formatter = objective.formatter(base, models.load_tokenizer(base, "tiny"))
    prompts = [formatter.prompt_ids(prompt)]
    if config.objective == "Seq2Seq":
        return formatter.decode(written.answers(model, prompts, 12, 1, lambda _: None)[0])
    if config.objective == "RewardModel":
        options = ("negative", "positive")
        texts = [prompts[0] + formatter.encode(prompt, option).completion for option in options]
        rewards = [row[0] for row in scoring.head_outputs(model, texts, lambda _: None)]
        return options[rewards.index(max(rewards))]
    if not objective.answers:
        scores = scoring.head_outputs(model, prompts, lambda _: None)[0]
        return str(model.config.id2label[scores.index(max(scores))])
    return formatter.decode(scoring.greedy_answers(model, prompts, 12, frozenset([2]), lambda _: None)[0].tokens)


@pytest.fixture
def base(request: pytest.FixtureRequest) -> Path:
    """The random model that the test's objective starts from."""
    objective = request.node.callspec.params.get("objective") if hasattr(request.node, "callspec") else None
    path: Path = request.getfixturevalue("encoder_decoder" if objective == "Seq2Seq" else "decoder")
    return path


def in_unit_tests(*fast: str) -> list[Any]:
    """All objectives; those that are not named take their seconds in the long run."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.long) for name in OBJECTIVES]


@pytest.mark.parametrize("objective", in_unit_tests("DPO", "SequenceClassification", "GRPO"))
def test_objective_improves_and_its_model_answers(objective: ObjectiveType, tmp_path: Path, base: Path) -> None:
    config = make_run(tmp_path, base, objective, steps=32 if objective in ROLLING_OUT else 24)

    results = run_through(config)

    assert improvement(optimised(config)) > 3
    score = results[Stage.EVALUATE].evaluate
    assert score.gates[0].metric == HELD_OUT_METRICS[objective][0]
    better = score.gates[0].difference if score.gates[0].metric != "Loss" else -score.gates[0].difference
    assert better > 0, "the model that was packaged is better than the base at what the objective is judged by"
    said = answer(config, base, "rainy tea 1001")
    assert said in ("negative", "positive") if objective in ("SFT", "SequenceClassification", "RewardModel") else said


@pytest.mark.long
@pytest.mark.parametrize("method", ["LoRA", "Full"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objective_improves_with_each_of_three_seeds(objective: ObjectiveType, method: Any, tmp_path: Path, base: Path) -> None:
    for seed in (1, 2, 3):
        config = make_run(tmp_path / str(seed), base, objective, steps=40, seed=seed)
        if method == "Full":
            rate = config.training.learning_rate / 4
            config = replace(config, method=Method(type="Full"), training=config.training.model_copy(update={"learning_rate": rate}))
        run_through(config)
        assert improvement(optimised(config)) > 3


@pytest.mark.parametrize("objective", in_unit_tests("KTO", "RLOO"))
def test_interrupted_run_of_any_objective_ends_bit_equal(
    objective: ObjectiveType, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Method(type="LoRA", lora=Lora(rank=4, alpha=8, dropout=0.1))
    config = make_run(tmp_path, base, objective, steps=4, method=method)
    if objective in ROLLING_OUT:  # a reward that the first completions differ in
        install(tmp_path, monkeypatch, "reward", "brief")
        config = replace(config, rollouts=Rollouts(rewards=(Reward(entry_point=EntryPoint(name="brief")),), **WRITING))
    assert run_stage(config, Stage.PREPARE).exit_code == ExitCode.DONE
    undisturbed = copy_work(config, tmp_path / "undisturbed")
    assert run_stage(undisturbed, Stage.TRAIN).exit_code == ExitCode.DONE

    stopped = run_stage(config, Stage.TRAIN, InterruptAfter(2))
    resumed = run_stage(config, Stage.TRAIN)

    assert (stopped.exit_code, stopped.train.step) == (ExitCode.INTERRUPTED, 2)
    assert (resumed.exit_code, resumed.train.resumed_from_step) == (ExitCode.DONE, 2)
    assert resumed.train.samples == 4 * config.training.global_batch_size
    assert losses(config) == losses(undisturbed)
    assert len(set(losses(config))) > 2
    assert weights(config) == weights(undisturbed)
    assert (resumed.train.tokens_per_second or 0) > 0


@pytest.mark.long
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_that_is_no_number_stops_any_objective(objective: ObjectiveType, tmp_path: Path, base: Path) -> None:
    config = make_run(tmp_path, base, objective, steps=4)
    config = replace(config, training=config.training.model_copy(update={"learning_rate": 1e30}))
    run_stage(config, Stage.PREPARE)

    result = run_stage(config, Stage.TRAIN)

    assert (result.exit_code, result.reason) == (ExitCode.NON_FINITE, Reason.NON_FINITE_LOSS)
    assert checkpoints(config) == []


@pytest.mark.long
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in ("SFT", *ROLLING_OUT)])
def test_any_objective_stops_early(objective: ObjectiveType, tmp_path: Path, base: Path) -> None:
    config = make_run(tmp_path, base, objective, steps=20, validation_fraction=0.2, curation=Curation(decontaminate=False))
    training = config.training.model_copy(update={"early_stopping_patience": 2, "learning_rate": 1e-30})
    config = replace(config, training=training)
    run_stage(config, Stage.PREPARE)

    result = run_stage(config, Stage.TRAIN)

    assert (result.exit_code, result.train.step) == (ExitCode.DONE, 6)
    assert result.train.validation_loss is not None


def test_each_prompt_is_also_scored_with_its_neighbours_answer() -> None:
    from tuneloop_trainer.objectives.kto import Judgements

    rows = [{"input_ids": [5, 6, 10 + number], "prompt_length": 2, "target": number % 2} for number in range(3)]

    batch = Judgements(pad=0)(rows)

    assert batch["input_ids"][:, 2].tolist() == [10, 11, 12]
    assert batch["KL_input_ids"][:, 2].tolist() == [12, 10, 11]
    assert batch["label"].tolist() == [False, True, False]


def test_preferences_are_learned_relative_to_the_base(tmp_path: Path, base: Path) -> None:
    """Before its first step a model is its own reference: the loss is that of a coin."""
    config = make_run(tmp_path, base, "DPO", steps=2)
    run_stage(config, Stage.PREPARE)
    run_stage(config, Stage.TRAIN)

    assert losses(config)[0] == pytest.approx(math.log(2), abs=1e-6)
    saved = {path.name for path in (tmp_path / "work" / "train" / "final").iterdir()}
    assert "ref" not in saved, "no copy of the adapter is kept as a reference"


def test_pretraining_keeps_every_token(tmp_path: Path, base: Path) -> None:
    from tuneloop_trainer import models
    from tuneloop_trainer.data.shards import read_rows

    config = make_run(tmp_path, base, "Pretraining")
    summary = run_stage(config, Stage.PREPARE).prepare

    tokenizer = models.load_tokenizer(base, "tiny")
    texts = [record.completion for record in RowReader(config.train[0], "train", objective_of(config).shape).records()]
    expected = sorted(token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    rows = list(read_rows(tmp_path / "work" / "prepare", "train"))
    assert sorted(token for made in rows for token in made.input_ids) == expected
    assert summary.truncated == 0
    assert max(len(made.input_ids) for made in rows) <= 48
    assert any(len(made.sequences) > 1 for made in rows), "short texts share a row"


def test_every_value_of_a_run_is_recorded_with_its_origin(tmp_path: Path, base: Path) -> None:
    config = make_run(tmp_path, base, "DPO", steps=2, origins={"learning_rate": "default"})
    training = config.training.model_copy(update={"warmup_steps": None, "extra_arguments": {"weight_decay": "0.5"}})
    config = replace(config, training=training)
    run_stage(config, Stage.PREPARE)
    run_stage(config, Stage.TRAIN)

    record = json.loads((tmp_path / "work" / "train" / "final" / "settings.json").read_text())

    assert record["learning_rate"] == {"value": 0.01, "from": "default"}
    assert record["max_steps"] == {"value": 2, "from": "spec"}
    assert record["warmup_steps"] == {"value": 1, "from": "default"}
    assert record["weight_decay"] == {"value": 0.5, "from": "extraArguments"}
    assert record["per_device_train_batch_size"]["from"] == "derived"


# --- objectives of a derived image ---


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install(tmp_path, monkeypatch, "custom", "dynamic_fine_tuning")


@pytest.mark.long
def test_objective_of_a_derived_image_trains_and_is_judged(plugin: Path, tmp_path: Path, base: Path) -> None:
    config = make_custom(tmp_path / "own", base)

    results = run_through(config)

    plain = make_run(tmp_path / "plain", base, "SFT")
    run_stage(plain, Stage.PREPARE)
    run_stage(plain, Stage.TRAIN)
    log = json.loads((Path(config.paths.work) / "train" / "final" / "log.json").read_text())
    assert improvement([-entry["mean_token_accuracy"] for entry in log if "mean_token_accuracy" in entry]) > 3
    assert optimised(config)[0] != optimised(plain)[0], "its own loss is what is optimised"
    assert results[Stage.EVALUATE].evaluate.gates[0].difference < 0, "the held-out loss fell"
    assert answer(config, base, "rainy tea 1001"), "what was packaged writes answers"


# --- completions and their rewards ---


def test_reward_of_a_derived_image_is_learned_and_gates(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "reward", "brief")
    brief = Reward(entry_point=EntryPoint(name="brief", settings={"characters": "4"}), weight=2.0)
    config = rewarded(tmp_path, base, brief, steps=24)

    results = run_through(config)

    assert improvement(optimised(config)) > 3
    assert results[Stage.TRAIN].train.reward == pytest.approx(-optimised(config)[-1])
    score = results[Stage.EVALUATE].evaluate
    assert score.scores["gate"].reward > score.scores["gate"].baseline_reward
    assert [gate.verdict for gate in score.gates] == ["Pass"]


def test_reward_that_raises_ends_the_training_with_its_row(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = install(tmp_path, monkeypatch, "reward", "brief")
    only_in_prepare = "def brief(completion, settings):\n    return {'positive': 1, 'negative': 1}[completion.text]\n"
    (site / "brief.py").write_text(only_in_prepare)
    config = rewarded(tmp_path, base, Reward(entry_point=EntryPoint(name="brief")))
    assert run_stage(config, Stage.PREPARE).exit_code == ExitCode.DONE

    result = run_stage(config, Stage.TRAIN)

    assert (result.exit_code, result.reason) == (ExitCode.INVALID, Reason.REWARD_FAILED)
    assert "Reward 'brief' raised KeyError" in result.message
    assert "for row " in result.message
    assert checkpoints(config) == []


def test_reward_model_scores_completions_as_it_scores_answers(tmp_path: Path, base: Path) -> None:
    from tuneloop_trainer import models
    from tuneloop_trainer.evaluation import scoring
    from tuneloop_trainer.rewards import Completion
    from tuneloop_trainer.rewards.scorer import ModelReward

    judge = make_run(tmp_path / "judge", base, "RewardModel", steps=4, evaluation=Evaluation())
    for stage in (Stage.PREPARE, Stage.TRAIN):
        assert run_stage(judge, stage).exit_code == ExitCode.DONE
    package = run_stage(judge, Stage.PACKAGE).package
    scorer = Scorer(uri="pvc://models/judge", path=package.path, manifest_digest=package.manifest_digest)
    config = rewarded(tmp_path / "run", base, Reward(model=scorer))

    results = run_through(config)

    prepared = results[Stage.PREPARE].prepare
    assert prepared.reward_bytes == (Path(package.path) / "model.safetensors").stat().st_size
    formatter = objective_of(judge).formatter(base, models.load_tokenizer(base, "tiny"))
    encoded = formatter.encode("rainy tea 1", "negative")
    by_hand = scoring.head_outputs(
        models.load_classifier(Path(package.path), "judge", "bfloat16", None), [encoded.prompt + encoded.completion], print
    )
    assert ModelReward(scorer, "Chat", 48).of([Completion("rainy tea 1", "negative", "", 1)]) == by_hand[0]
    other = scorer.model_copy(update={"manifest_digest": "sha256:" + "0" * 64})
    refused = run_stage(rewarded(tmp_path / "other", base, Reward(model=other)), Stage.PREPARE)
    assert (refused.exit_code, refused.reason) == (ExitCode.INVALID, Reason.MODEL_NOT_FOUND)


def logged(config: RunConfig) -> list[dict[str, float]]:
    log = json.loads((Path(config.paths.work) / "train" / "final" / "log.json").read_text())
    return [entry for entry in log if "reward" in entry]


def test_completions_are_written_to_the_prompts_of_prepare_whatever_the_micro_batch(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneloop_trainer.data.shards import read_table

    install(tmp_path, monkeypatch, "reward", "brief")
    whole = rewarded(tmp_path / "run", base, Reward(entry_point=EntryPoint(name="brief")))
    whole = replace(whole, training=whole.training.model_copy(update={"micro_batch_size": 32, "max_steps": 4}))
    run_stage(whole, Stage.PREPARE)
    parts = copy_work(whole, tmp_path / "parts")
    parts = replace(parts, training=parts.training.model_copy(update={"micro_batch_size": 4}))

    results = [run_stage(config, Stage.TRAIN).train for config in (whole, parts)]

    assert [(result.micro_batch_size, result.step, result.samples) for result in results] == [(32, 4, 128), (4, 4, 128)]
    (first, *_), (again, *_) = logged(whole), logged(parts)
    assert (again["reward"], again["num_tokens"]) == (first["reward"], first["num_tokens"])
    assert again["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)
    lengths = read_table(Path(whole.paths.work) / "prepare", "train")["prompt_length"].to_pylist()
    prompts = first["num_tokens"] - 32 * first["completions/mean_length"]
    assert 32 * min(lengths) <= prompts <= 32 * max(lengths), "rendered by the chat template, as they are served"


def test_chances_of_model_and_reference_are_those_of_the_temperature(tmp_path: Path, base: Path) -> None:
    """Before its first step the model is its own reference: they differ by nothing, also where the head is ours and the other TRL's."""
    rewards = Reward(exact_match=ExactMatch())
    config = rewarded(tmp_path, base, rewards, beta=0.1, temperature=0.6)
    config = replace(config, method=Method(type="Full"))
    run_stage(config, Stage.PREPARE)

    assert run_stage(config, Stage.TRAIN).exit_code == ExitCode.DONE
    assert logged(config)[0]["kl"] == pytest.approx(0, abs=1e-6)
