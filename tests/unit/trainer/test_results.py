"""The last word fits into a termination message, whatever it has to say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from tuneloop_trainer import contract
from tuneloop_trainer.contract import (
    MAX_GATES,
    RESULT_LIMIT,
    EvaluateSummary,
    ExitCode,
    GateResult,
    ModelShape,
    PrepareSummary,
    Reason,
    Stage,
    StageResult,
    SuiteScore,
    TrainSummary,
)
from tuneloop_trainer.results import encode, read_result, sentence, write_result

GATE = GateResult(
    suite="s" * 63,
    metric="Accuracy",
    rule="NonInferior",
    verdict="Inconclusive",
    candidate=0.12345,
    baseline=0.12345,
    difference=-0.12345,
    lower=-0.12345,
    upper=-0.12345,
    n=100_000,
    p=1.23e-300,
    discordant=100_000,
    detectable=0.12345,
)
SCORE = SuiteScore(accuracy=0.12345, baseline_accuracy=0.12345, macro_f1=0.12345, majority_rate=0.12345, parse_rate=0.12345, loss=1.2, n=9)


def make_evaluation(gates: int, suites: int = 8) -> StageResult:
    return StageResult(
        stage=Stage.EVALUATE,
        exit_code=0,
        message="m" * 600,
        uri="/" + "p" * 250,
        sha256="a" * 64,
        evaluate=EvaluateSummary(
            verdict="Inconclusive",
            artifact_digest="sha256:" + "a" * 64,
            gates=(GATE,) * gates,
            scores={f"{number}" + "s" * 62: SCORE for number in range(suites)},
            probes="/" + "p" * 250,
            has_reference=True,
            message="é" * 300,
        ),
    )


def make_preparation() -> StageResult:
    digests = {f"pvc://claim/{number}/" + "p" * 400: "a" * 64 for number in range(16)}
    return StageResult(
        stage=Stage.PREPARE,
        exit_code=0,
        prepare=PrepareSummary(
            rows_in=10**6,
            rows_kept=10**6,
            dropped={"Contaminated" + "x" * 20 + str(number): 10**6 for number in range(16)},
            warnings=("w" * 160,) * 8,
            tokens=10**9,
            supervised_share=0.123456,
            max_steps=10**6,
            base_digest="sha256:" + "a" * 64,
            base_revision="a" * 40,
            dataset_digests=digests,
            suite_digests={f"{number}" + "s" * 62: "a" * 64 for number in range(8)},
            shards_digest="a" * 64,
            prompt_probe_sha256="sha256:" + "a" * 64,
            longest_row=131_072,
            model=ModelShape(
                parameters=10**13,
                hidden_size=10**6,
                intermediate_size=10**6,
                layers=10**4,
                heads=10**4,
                key_value_heads=10**4,
                head_size=10**4,
                vocabulary=10**7,
            ),
        ),
    )


@pytest.mark.parametrize(
    "result",
    [
        make_evaluation(MAX_GATES),
        make_evaluation(1),
        make_preparation(),
        StageResult(stage=Stage.TRAIN, exit_code=10, reason=Reason.DATA_INVALID, message="€" * 600),
    ],
    ids=["all gates", "one gate", "all sources", "longest message"],
)
def test_result_at_its_maximum_fits(result: StageResult) -> None:
    content = encode(result)

    assert len(content) <= RESULT_LIMIT
    assert StageResult.model_validate_json(content).stage == result.stage


def test_gates_go_last() -> None:
    kept = json.loads(encode(make_evaluation(6)))["evaluate"]

    assert len(kept["gates"]) == 6
    assert kept["verdict"] == "Inconclusive"
    assert "p" in kept["gates"][0]


def test_a_small_result_is_not_shortened() -> None:
    result = make_evaluation(2, suites=2)
    result = result.model_copy(update={"message": "", "uri": "/r"})

    assert StageResult.model_validate_json(encode(result)) == result


def test_sentence_is_one_line() -> None:
    assert sentence("a\n b\t c") == "a b c"
    assert len(sentence("x" * 1000)) == 600


def test_result_is_read_again_whatever_is_none_in_it(tmp_path: Path) -> None:
    def models(of: type[BaseModel]) -> Iterator[type[BaseModel]]:
        for model in of.__subclasses__():
            yield from (model, *models(model))

    nones = [
        f"{model.__name__}.{name}"
        for model in models(contract.Model)
        for name, field in model.model_fields.items()
        if model.__module__ == contract.__name__ and type(None) in get_args(field.annotation) and field.is_required()
    ]
    assert nones == [], "left out where they are None, and then missed"
    trained = StageResult(stage=Stage.TRAIN, exit_code=ExitCode.DONE, train=TrainSummary(step=6, max_steps=6, samples=24, seconds=0.1))
    write_result(tmp_path / "result.json", trained)
    assert read_result(tmp_path / "result.json") == trained
