"""What the benchmark of training makes of its measurements."""

from __future__ import annotations

from typing import Any

from bench.training import summarize


def report(seconds: float, callbacks: float = 0.0) -> dict[str, Any]:
    return {
        "loop_seconds": seconds,
        "callback_seconds": callbacks,
        "prepare_seconds": 0.0,
        "first_step_seconds": 1.0,
        "peak_bytes": 1 << 20,
    }


def test_ratios_are_medians_of_rounds_whose_two_trainings_ran_side_by_side() -> None:
    """The machine was four times slower in the second round: that changes no ratio."""
    reports = {
        "ours": [report(10, 0.1), report(40, 0.4), report(10, 0.1)],
        "trl_default": [report(20), report(80), report(20)],
        "trl_tuned": [report(10), report(40), report(10)],
        "llamafactory": [report(15), report(60), report(15)],
    }
    found = summarize(reports, dict.fromkeys(reports, 2.0), tokens=1000)
    assert (found["ratio_to_trl_default"], found["ratio_to_trl_tuned"], found["ratio_to_best_peer"]) == (2.0, 1.0, 1.5)
    assert (found["peers_run"], found["callback_overhead"], found["void"]) == (["llamafactory"], 0.01, [])


def test_a_ratio_is_void_where_we_learned_less_and_a_peer_that_did_is_no_best_one() -> None:
    reports = {name: [report(10)] for name in ("ours", "trl_default", "trl_tuned", "llamafactory", "axolotl")}
    reports["axolotl"] = [report(1)]
    losses = {"ours": 2.0, "trl_default": 1.97, "trl_tuned": 1.99, "llamafactory": 2.0, "axolotl": 2.1}
    found = summarize(reports, losses, tokens=1000)
    assert found["void"] == ["trl_default"]
    assert (found["not_counted"], found["best_peer"]) == (["axolotl"], "llamafactory")
