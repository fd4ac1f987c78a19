"""The tests and intervals, against published values and against their definitions."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from tuneloop_trainer.evaluation import statistics


@pytest.mark.parametrize(
    ("wins", "losses", "n", "lower", "upper"),
    [
        # Bentur et al. 2009, as in Fagerland, Lydersen and Laake, "Recommended tests and confidence intervals for paired
        # binomial proportions", Statistics in Medicine 33 (2014): Tango's interval.
        (1, 7, 21, -0.517, -0.026),
    ],
)
def test_tango_interval_equals_published_values(wins: int, losses: int, n: int, lower: float, upper: float) -> None:
    interval = statistics.tango_interval(wins, losses, n, alpha=0.025)

    assert interval.lower == pytest.approx(lower, abs=6e-4)
    assert interval.upper == pytest.approx(upper, abs=6e-4)


@given(st.integers(2, 400), st.data(), st.sampled_from([0.05, 0.01]))
@settings(max_examples=60, deadline=None)
def test_tango_interval_holds_the_estimate_and_turns_with_the_sign(n: int, data: st.DataObject, alpha: float) -> None:
    wins = data.draw(st.integers(0, n))
    losses = data.draw(st.integers(0, n - wins))

    interval = statistics.tango_interval(wins, losses, n, alpha)
    mirrored = statistics.tango_interval(losses, wins, n, alpha)

    assert -1 <= interval.lower <= (wins - losses) / n <= interval.upper <= 1
    assert mirrored.lower == pytest.approx(-interval.upper, abs=1e-6)
    assert statistics.tango_interval(wins, losses, n, alpha / 10).lower <= interval.lower + 1e-9


def test_tango_interval_without_discordance_is_the_wilson_width() -> None:
    # With no discordant pair the bounds are -+ z^2 / (n + z^2).
    z = norm.isf(0.05)

    interval = statistics.tango_interval(0, 0, 100, 0.05)

    assert interval.upper == pytest.approx(z * z / (100 + z * z), abs=1e-6)
    assert interval.lower == pytest.approx(-interval.upper, abs=1e-6)


@given(st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None)
def test_sign_flips_over_single_items_are_the_exact_mcnemar_test(wins: int, losses: int) -> None:
    p = statistics.sign_flip_p([1] * wins + [-1] * losses + [0] * 5)

    assert p == pytest.approx(statistics.exact_mcnemar(wins, losses), rel=1e-9)
    if wins + losses:
        assert p == pytest.approx(binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue, rel=1e-9)


@given(st.lists(st.integers(-4, 4), max_size=9))
@settings(deadline=None)
def test_sign_flips_over_documents_count_all_patterns(differences: list[int]) -> None:
    sums = [sum(sign * d for sign, d in zip(signs, differences, strict=True)) for signs in product((1, -1), repeat=len(differences))]

    expected = sum(value >= sum(differences) for value in sums) / len(sums)

    assert statistics.sign_flip_p(differences) == pytest.approx(expected)


def test_bootstrap_draws_documents_whole() -> None:
    # Ten documents of a hundred equal items: the spread is that of ten values, not of a thousand.
    values = np.repeat(np.arange(10.0), 100)
    documents = [str(number // 100) for number in range(1000)]

    spread = statistics.bootstrap_means(values, np.ones(1000), documents, seed=1).std()

    assert spread == pytest.approx(np.arange(10).std() / np.sqrt(10), rel=0.05)


def test_bootstrap_weighs_items_by_their_tokens() -> None:
    means = statistics.bootstrap_means(np.array([1.0, 0.0]), np.array([3.0, 1.0]), ["a", "a"], seed=1, resamples=10)

    assert means == pytest.approx(0.75)


def test_bootstrap_p_is_small_for_a_clear_gain_and_never_zero() -> None:
    random = np.random.default_rng(0)
    documents = [str(number) for number in range(300)]

    clear = statistics.bootstrap_p(statistics.bootstrap_means(random.normal(0.5, 1, 300), np.ones(300), documents, seed=1))
    none = statistics.bootstrap_p(statistics.bootstrap_means(random.normal(0.0, 1, 300), np.ones(300), documents, seed=1))

    assert 0 < clear < 0.001
    assert none > 0.01


def test_detectable_difference_is_found_with_eighty_percent_power() -> None:
    error = 0.02

    assert statistics.power(statistics.detectable(error, 0.01), error, 0.01) == pytest.approx(0.8)


def test_items_needed_give_eighty_percent_power() -> None:
    # 10 % discordant, 3 points, 5 % two-sided: about 870 items (computed in closed form).
    error = np.sqrt(0.1 * 400) / 400

    assert statistics.items_needed(0.03, error, 400, 0.025) == pytest.approx(872, abs=3)


def test_macro_f1_counts_every_label_alike() -> None:
    assert statistics.macro_f1([0, 0, 0, 1], [0, 0, 0, 0], 2) == pytest.approx((6 / 7 + 0) / 2)
