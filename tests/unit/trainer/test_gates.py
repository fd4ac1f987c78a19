"""What passes a gate, what fails, and what is said when nothing can be said."""

from __future__ import annotations

import numpy as np
import pytest

from tuneloop_trainer.contract import Gate
from tuneloop_trainer.evaluation.gates import Paired, decide, overall


def make_paired(wins: int, losses: int, both: int, neither: int, items_per_document: int = 1) -> Paired:
    candidate = np.array([1.0] * wins + [0.0] * losses + [1.0] * both + [0.0] * neither)
    baseline = np.array([0.0] * wins + [1.0] * losses + [1.0] * both + [0.0] * neither)
    documents = [str(number // items_per_document) for number in range(len(candidate))]
    return Paired(candidate, baseline, np.ones(len(candidate)), documents)


def make_losses(gain: float, spread: float, n: int = 500) -> Paired:
    random = np.random.default_rng(3)
    baseline = random.normal(2.0, 0.3, n)
    return Paired(baseline - random.normal(gain, spread, n), baseline, np.full(n, 7.0), [str(number) for number in range(n)])


SUPERIOR = Gate(suite="new", metric="Accuracy", rule="Superior")
NON_INFERIOR = Gate(suite="old", metric="Accuracy", rule="NonInferior", margin=0.03)


@pytest.mark.parametrize(
    ("gate", "paired", "verdict"),
    [
        pytest.param(SUPERIOR, make_paired(60, 20, 300, 20), "Pass", id="clearly better"),
        pytest.param(SUPERIOR, make_paired(20, 60, 300, 20), "Fail", id="clearly worse"),
        pytest.param(SUPERIOR, make_paired(40, 38, 300, 22), "Inconclusive", id="no difference to be found with so few"),
        pytest.param(SUPERIOR, make_paired(40, 38, 3900, 22), "Fail", id="no difference though it would have been found"),
        pytest.param(SUPERIOR, make_paired(60, 20, 200, 20), "Inconclusive", id="better on fewer than minItems"),
        pytest.param(NON_INFERIOR, make_paired(2, 2, 390, 6), "Pass", id="as good"),
        pytest.param(NON_INFERIOR, make_paired(0, 0, 400, 0), "Pass", id="equal on every item"),
        pytest.param(NON_INFERIOR, make_paired(2, 60, 330, 8), "Fail", id="worse by more than the margin"),
        pytest.param(NON_INFERIOR, make_paired(40, 40, 300, 20), "Inconclusive", id="as good, but scattered"),
        pytest.param(SUPERIOR, make_paired(60, 20, 300, 20, items_per_document=2), "Pass", id="better in documents of two"),
        pytest.param(SUPERIOR, make_paired(60, 20, 300, 20, items_per_document=80), "Inconclusive", id="few documents are few items"),
    ],
)
def test_accuracy_gate(gate: Gate, paired: Paired, verdict: str) -> None:
    assert decide(gate, paired, promotions=5, seed=1)[0].verdict == verdict


@pytest.mark.parametrize(
    ("rule", "gain", "spread", "verdict"),
    [
        ("Superior", 0.1, 0.3, "Pass"),
        ("Superior", -0.1, 0.3, "Fail"),
        ("NonInferior", 0.0, 0.1, "Pass"),
        ("NonInferior", -0.1, 0.1, "Fail"),
    ],
)
def test_loss_gate(rule: str, gain: float, spread: float, verdict: str) -> None:
    gate = Gate(suite="validation", metric="Loss", rule=rule)

    result, _ = decide(gate, make_losses(gain, spread), promotions=5, seed=1)

    assert result.verdict == verdict
    assert result.difference == pytest.approx(-gain, abs=0.05), "in the metric's own units: a gain is a lower loss"
    assert result.lower <= result.difference <= result.upper


@pytest.mark.parametrize(("paired", "verdict"), [(make_paired(60, 20, 300, 20), "Pass"), (make_paired(20, 60, 300, 20), "Fail")])
def test_preference_gate_wants_more_of_the_chosen_answers(paired: Paired, verdict: str) -> None:
    gate = Gate(suite="pairs", metric="Preference", rule="Superior")

    result, _ = decide(gate, paired, promotions=5, seed=1)

    assert result.verdict == verdict
    assert result.difference == pytest.approx(result.candidate - result.baseline)
    assert result.discordant == 80


@pytest.mark.parametrize(("gain", "verdict"), [(0.1, "Pass"), (-0.1, "Fail")])
def test_reward_gate(gain: float, verdict: str) -> None:
    losses = make_losses(gain, 0.3)
    rewards = Paired(-losses.candidate, -losses.baseline, np.ones(losses.n), losses.documents)

    result, _ = decide(Gate(suite="s", metric="Reward", rule="Superior"), rewards, promotions=5, seed=1)

    assert result.verdict == verdict
    assert result.difference == pytest.approx(gain, abs=0.05), "more is better"


@pytest.mark.parametrize(("gain", "verdict"), [(0.05, "Pass"), (-0.05, "Fail")])
def test_gate_of_likeness_wants_answers_that_are_more_like_the_expected(gain: float, verdict: str) -> None:
    random = np.random.default_rng(3)
    baseline = random.uniform(0.2, 0.7, 500)
    paired = Paired(baseline + random.normal(gain, 0.1, 500), baseline, np.ones(500), [str(number) for number in range(500)])

    result, _ = decide(Gate(suite="split", metric="ChrF", rule="Superior"), paired, promotions=5, seed=1)

    assert result.verdict == verdict
    assert result.difference == pytest.approx(gain, abs=0.02)
    assert result.lower <= result.difference <= result.upper


def test_level_is_shared_by_the_promotions_of_a_suite() -> None:
    paired = make_paired(40, 22, 320, 18)

    assert decide(SUPERIOR, paired, promotions=1, seed=1)[0].verdict == "Pass"
    assert decide(SUPERIOR, paired, promotions=5, seed=1)[0].verdict != "Pass"


def test_inconclusive_gate_says_how_many_items_it_needs() -> None:
    result, advice = decide(SUPERIOR, make_paired(40, 38, 300, 22), promotions=5, seed=1)

    assert result.n == 400
    assert advice.startswith("new/Accuracy has 400 items; a difference of 0.03 needs about ")
    needed = int(advice.rstrip(".").split()[-1])
    assert decide(SUPERIOR, make_paired(40 * needed // 400, 38 * needed // 400, 300 * needed // 400, 22 * needed // 400), 5, 1)[
        0
    ].detectable == (pytest.approx(0.03, abs=0.001))


def test_gate_reports_what_it_saw() -> None:
    result, _ = decide(SUPERIOR, make_paired(60, 20, 300, 20), promotions=5, seed=1)

    assert (result.candidate, result.baseline, result.difference, result.n, result.discordant) == (0.9, 0.8, 0.1, 400, 80)
    assert result.p == pytest.approx(4.5e-6, rel=0.2)


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [([], "NoGates"), (["Pass", "Pass"], "Pass"), (["Pass", "Inconclusive"], "Inconclusive"), (["Inconclusive", "Fail"], "Fail")],
)
def test_all_gates_must_pass(verdicts: list[str], verdict: str) -> None:
    assert overall(verdicts) == verdict
