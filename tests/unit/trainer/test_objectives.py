"""What an objective refuses and keeps before anything is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from tests.unit.trainer.builders import make_gated, run_stage, write_jsonl
from tests.unit.trainer.objectives import install, make_custom, make_run, rewarded, row

from tuneloop_trainer.contract import (
    DEFAULTS,
    HELD_OUT_METRICS,
    EntryPoint,
    Evaluation,
    ExactMatch,
    ExitCode,
    ObjectiveType,
    Reason,
    Reward,
    Stage,
)
from tuneloop_trainer.objectives import MODULES
from tuneloop_trainer.objectives.classification import SequenceClassification


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install(tmp_path, monkeypatch, "custom", "dynamic_fine_tuning")


def prepare_rows(root: Path, base: Path, objective: ObjectiveType, rows: list[dict[str, object]]) -> Any:
    """What prepare says to these rows; there is no suite."""
    config = make_run(root, base, objective, evaluation=Evaluation())
    write_jsonl(root / "data" / "train.jsonl", rows)
    return run_stage(config, Stage.PREPARE)


@pytest.mark.parametrize(
    ("objective", "edit", "sentence"),
    [
        pytest.param("SequenceClassification", lambda row: row | {"label": "positive"}, "one label only", id="one class"),
        pytest.param("KTO", lambda row: row | {"desirable": True}, "Every training row is desirable", id="one kind of judgement"),
        pytest.param("DPO", lambda row: row | {"rejected": row["chosen"]}, "its chosen and rejected answers are equal", id="equal answers"),
        pytest.param("KTO", lambda row: row | {"desirable": "perhaps"}, "true or false is needed", id="no judgement"),
        pytest.param("DPO", lambda row: {"prompt": row["prompt"], "chosen": "a"}, "no column 'rejected'", id="no second answer"),
        pytest.param("SequenceClassification", lambda row: row | {"label": float("nan")}, "column 'label' has nan", id="NaN label"),
    ],
)
def test_rows_that_an_objective_cannot_learn_from_are_refused(
    objective: ObjectiveType, edit: Callable[[dict[str, object]], dict[str, object]], sentence: str, tmp_path: Path, base: Path
) -> None:
    result = prepare_rows(tmp_path, base, objective, [edit(row(objective, number)) for number in range(40)])

    assert (result.exit_code, result.reason) == (ExitCode.INVALID, Reason.DATA_INVALID)
    assert sentence in result.message


def test_label_that_training_lacks_is_refused_in_a_suite(tmp_path: Path, base: Path) -> None:
    config = make_run(tmp_path, base, "SequenceClassification")
    write_jsonl(tmp_path / "data" / "gate.jsonl", [{"text": "an odd one", "label": "mixed"}, *(row(config.objective, n) for n in range(9))])

    result = run_stage(config, Stage.PREPARE)

    assert result.exit_code == ExitCode.INVALID
    assert "has the label 'mixed'; the training rows have negative, positive." in result.message


def test_balanced_weights_make_every_class_count_the_same(tmp_path: Path, base: Path) -> None:
    config = make_run(tmp_path, base, "SequenceClassification")
    objective = SequenceClassification(config)
    objective.labels, objective.counts = ("a", "b", "c"), (10, 30, 60)

    assert [weight * count for weight, count in zip(objective.class_weights(), objective.counts, strict=True)] == pytest.approx(
        [100 / 3] * 3
    )


def test_every_objective_has_a_module_and_defaults() -> None:
    named = set(get_args(ObjectiveType))
    assert named == set(HELD_OUT_METRICS) == {*MODULES, "Custom"}
    every = {(objective, method) for objective in named for method in ("LoRA", "Full")}
    assert set(DEFAULTS) == every | {("SFT", "PromptTuning")}


@pytest.mark.parametrize(
    ("name", "code", "sentence"),
    [
        ("unknown", "", "has no objective 'unknown' in the entry points tuneloop.objectives; it has dynamic-fine-tuning."),
        ("dynamic-fine-tuning", "raise OSError('no disk')", "does not load: OSError: no disk"),
        ("dynamic-fine-tuning", "DynamicFineTuning = dict", "is no class below"),
    ],
)
def test_objective_that_the_image_does_not_have_is_refused(
    name: str, code: str, sentence: str, plugin: Path, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code:
        (plugin / "dynamic_fine_tuning.py").write_text(code)
    monkeypatch.delitem(sys.modules, "dynamic_fine_tuning", raising=False)

    result = run_stage(make_custom(tmp_path / "own", base, name), Stage.PREPARE)

    assert (result.exit_code, result.reason) == (ExitCode.INVALID, Reason.DATA_INVALID)
    assert sentence in result.message


def test_configuration_of_the_first_release_keeps_its_key() -> None:
    """Checkpoints and outputs of runs that were made before an objective was added are still found."""

    from tuneloop_trainer.stages.outputs import run_key

    root = Path("/tmp/key-of-a-run")
    assert run_key(make_gated(root, root / "base")) == "8757cb24a2ca8955cab3c707e0e1ca5c5789adebb0e07d7d87ff9cc7a8a55a64"


def test_prompts_without_answers_are_enough_where_no_reward_reads_one(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "reward", "brief")
    prompts = [{"prompt": row("SFT", number)["prompt"]} for number in range(40)]
    matching = rewarded(tmp_path / "match", base, Reward(exact_match=ExactMatch()))
    brief = rewarded(tmp_path / "brief", base, Reward(entry_point=EntryPoint(name="brief")))
    for config in (matching, brief):
        write_jsonl(Path(config.train[0].path or ""), prompts)
        write_jsonl(Path(config.paths.work).parent / "data" / "gate.jsonl", [{"prompt": "a new one"}, {"prompt": "another"}])

    refused, kept = (run_stage(config, Stage.PREPARE) for config in (matching, brief))

    assert "has no column 'completion'" in refused.message
    assert (kept.exit_code, kept.prepare.rows_kept) == (ExitCode.DONE, 40)


def test_prompt_that_leaves_no_room_for_its_completion_is_dropped(tmp_path: Path, base: Path) -> None:
    config = rewarded(tmp_path, base, Reward(exact_match=ExactMatch()))
    rows = [row("SFT", number) for number in range(40)]
    write_jsonl(Path(config.train[0].path or ""), [*rows, {"prompt": "long " * 40, "completion": "positive"}])

    prepared = run_stage(config, Stage.PREPARE).prepare

    assert (prepared.rows_kept, prepared.truncated) == (40, 0)
    assert prepared.longest_row <= 48, "prompt and completion together"


def test_base_without_an_encoder_is_refused_before_training(tmp_path: Path, base: Path) -> None:
    result = run_stage(make_run(tmp_path, base, "Seq2Seq"), Stage.PREPARE)

    assert (result.exit_code, result.reason) == (ExitCode.INVALID, Reason.MODEL_NOT_FOUND)
    assert "has no encoder. Seq2Seq needs one as T5 or BART have" in result.message
