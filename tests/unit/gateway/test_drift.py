"""Detector B: fair bets, no row twice, a latched alarm, and a state that survives restarts."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloop_gateway.contract import Drift, DriftStatus
from tuneloop_gateway.drift.detector import BURN_IN, LAMBDAS, Detector
from tuneloop_gateway.drift.features import BUCKETS, features
from tuneloop_gateway.drift.process import Process, Progress, exhausted_below, pack, parse_progress
from tuneloop_gateway.drift.sampling import MixingBuffer, Pace, Reservoir

CLEAN = [f"clean{i}" for i in range(60)]
OTHER = [f"other{i}" for i in range(60)]
FAST = {"horizon_days": 1e-9, "mix_over_seconds": 0.0}


def texts(words: list[str], seed: int) -> Any:
    rng = random.Random(seed)
    while True:
        yield " ".join(rng.choices(words, k=12))


def make_process(now: float = 0.0, seed: int = 1, **drift: Any) -> Process:
    values = {"size": 600, "false_alarm_every_requests": 1e4, **FAST, **drift}
    return Process(Drift(**values), Progress(epoch="0", redact=True), now, random.Random(seed))


def feed(process: Process, source: Any, rows: int, start: float = 0.0, step: float = 1.0) -> float:
    for i in range(rows):
        process.take(next(source), start + i * step)
    return start + rows * step


# --- features --------------------------------------------------------------------


def test_features_are_the_hashed_words_and_trigrams_of_the_lower_cased_text() -> None:
    assert set(features("AB cd")) == set(features("ab CD"))
    assert len(features("ab")) == 1  # one word, no trigram
    assert len(features("abc!")) == 2 + 2  # "abc", "!", and two trigrams
    assert list(features("")) == [0]
    assert set(features("xyz")) != set(features("xyz abc"))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_features_are_unique_sorted_buckets_of_any_text(text: str) -> None:
    row = features(text)
    assert len(row) >= 1
    assert list(row) == sorted(set(row.tolist()))
    assert int(row.max()) < BUCKETS


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(max_codepoint=300), min_size=3, max_size=80))
def test_trigrams_are_hashed_by_crc32_with_a_prefix_of_their_own(text: str) -> None:
    lowered = text.lower()
    grams = {crc32(("c" + lowered[i : i + 3]).encode()) % BUCKETS for i in range(len(lowered) - 2)}
    words = {crc32(("w" + token).encode()) % BUCKETS for token in re.findall(r"\w+|[^\w\s]", lowered)}
    assert set(features(text).tolist()) == grams | words


# --- the detector ----------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(CLEAN + OTHER), st.sampled_from(CLEAN)), min_size=BURN_IN + 1, max_size=BURN_IN + 30))
def test_a_bet_is_made_before_its_pair_is_learnt_and_is_worth_one_on_average(pairs: list[tuple[str, str]]) -> None:
    """The mirror of a pair pays the mirror of its payoff: where the two sides are exchangeable the mean e-value is exactly 1."""
    detector = Detector()
    for live, reference in pairs:
        before, x, r = Detector(), features(live), features(reference)
        before.weights, before.log_m, before.pairs = detector.weights.copy(), [0.0] * 4, detector.pairs
        mirrored = Detector()
        mirrored.weights, mirrored.log_m, mirrored.pairs = detector.weights.copy(), [0.0] * 4, detector.pairs
        before.pair(x, r)
        mirrored.pair(r, x)
        if detector.pairs >= BURN_IN:
            for one, other in zip(before.log_m, mirrored.log_m, strict=True):
                assert (math.exp(one) + math.exp(other)) / 2 == pytest.approx(1)
        detector.pair(x, r)


def test_nothing_is_bet_during_the_burn_in() -> None:
    detector = Detector()
    for _ in range(BURN_IN):
        detector.pair(features("completely different"), features("nothing alike"))
    assert detector.log_evidence == 0.0
    detector.pair(features("completely different"), features("nothing alike"))
    assert detector.log_evidence > 0.1


def test_evidence_is_the_mean_over_lambdas_and_falls_back_to_one() -> None:
    detector = Detector()
    detector.pairs, detector.log_m = BURN_IN, [-5.0, 0.0, 1.0, 2.0]
    detector.pair(features("a b c"), features("a b c"))  # no difference: e = 1, and what was below 1 starts from 1
    assert detector.log_m == [0.0, 0.0, 1.0, 2.0]
    assert detector.log_evidence == pytest.approx(math.log((1 + 1 + math.e + math.e**2) / 4))
    assert len(LAMBDAS) == 4


def test_equal_distributions_raise_no_alarm_and_others_do_soon() -> None:
    for seed in range(6):
        live, reference, detector = texts(CLEAN, seed), texts(CLEAN, 100 + seed), Detector()
        worst = -math.inf
        for _ in range(400):
            detector.pair(features(next(live)), features(next(reference)))
            worst = max(worst, detector.log_evidence)
        assert worst < math.log(1e4)
        changed = texts(CLEAN[:30] + OTHER[:30], seed)
        for _needed in range(1, 400):
            detector.pair(features(next(changed)), features(next(reference)))
            if detector.log_evidence >= math.log(1e4):
                break
        assert _needed < 200
        assert detector.effect() > 0.02


def test_evidence_never_overflows() -> None:
    detector, live, reference = Detector(), features("aaa bbb ccc"), features("xxx yyy zzz")
    for _ in range(3000):
        detector.pair(live, reference)
    assert math.isfinite(detector.log_evidence)
    assert detector.log_evidence > 1000


def test_the_effect_is_the_area_under_the_curve_minus_a_half() -> None:
    detector = Detector()
    detector.scores.extend([(0.5, -0.5)] * 30)
    assert detector.effect() == 0.5
    detector.scores.clear()
    detector.scores.extend([(0.0, 0.0)] * 30)
    assert detector.effect() == 0.0
    rng = np.random.default_rng(1)
    detector.scores.extend(zip(rng.normal(0.5, 1, 500).tolist(), rng.normal(0, 1, 500).tolist(), strict=True))
    live, reference = np.array(detector.scores).T
    slow = np.mean([(a > b) + (a == b) / 2 for a in live for b in reference])
    assert detector.effect() == pytest.approx(slow - 0.5)


# --- sampling --------------------------------------------------------------------


def test_the_reservoir_is_uniform() -> None:
    chosen: Counter[int] = Counter()
    for seed in range(600):
        reservoir = Reservoir(10, random.Random(seed))
        for i in range(50):
            place = reservoir.place()
            if place is not None:
                reservoir.put(place, np.array([i], np.uint16))
        chosen.update(int(row[0]) for row in reservoir.rows)
    assert min(chosen.values()) > 70  # 120 expected of each
    assert max(chosen.values()) < 170


def test_a_mixing_buffer_draws_evenly_from_its_window_even_when_it_had_to_thin() -> None:
    early = 0
    for seed in range(300):
        rng = random.Random(seed)
        buffer = MixingBuffer(100.0, 64, rng)
        for i in range(4000):  # 40 rows a second
            if buffer.admits(i / 40):
                buffer.add(np.array([i // 1000], np.uint16), i / 40)
        row = buffer.draw()
        assert row is not None
        early += int(row[0]) < 2
    assert len(buffer.rows) <= 64
    assert 110 < early < 190  # 150 expected


def test_a_row_counts_alike_whether_it_came_in_busy_or_in_quiet_hours() -> None:
    quiet = 0
    for seed in range(400):
        buffer = MixingBuffer(100.0, 64, random.Random(seed))
        for at in (*(i / 40 for i in range(4000)), *(100 + i / 2 for i in range(120))):
            if buffer.admits(at):
                buffer.add(np.array([at >= 100], np.uint16), at)
        row = buffer.draw()
        quiet += row is not None and int(row[0])
    assert 12 < quiet < 45  # 120 of the 1,720 rows of the window are from the quiet minute: 28 expected, without the weights some 65


def test_rows_older_than_the_window_are_not_drawn() -> None:
    buffer = MixingBuffer(10.0, 64, random.Random(1))
    buffer.add(np.array([1], np.uint16), 0.0)
    assert buffer.admits(11.0)
    buffer.add(np.array([2], np.uint16), 11.0)
    assert [int(r[0]) for r in (buffer.draw(), buffer.draw()) if r is not None] == [2]


def test_the_pace_makes_a_reference_last() -> None:
    pace = Pace(0.125, burst=3, now=0.0)
    assert sum(pace.due(float(t)) for t in range(1, 801)) == 100
    assert [pace.due(10_000.0) for _ in range(4)] == [True, True, True, False]


# --- the process -----------------------------------------------------------------


def test_a_process_collects_then_monitors_then_alarms_and_stays_alarmed() -> None:
    process, clean = make_process(), texts(CLEAN, 1)
    at = feed(process, clean, 599)
    assert (process.status, process.report().reference_rows) == (DriftStatus.COLLECTING, 599)
    at = feed(process, clean, 1, at)
    assert process.status is DriftStatus.MONITORING
    at = feed(process, clean, 60, at)
    assert process.status is DriftStatus.MONITORING
    at = feed(process, texts(OTHER, 2), 200, at)
    report = process.report()
    assert report.status is DriftStatus.ALARM
    assert report.detected_at is not None
    assert report.effect > 0.1
    feed(process, clean, 400, at)
    assert process.report().detected_at == report.detected_at
    assert process.status is DriftStatus.ALARM


def test_clean_traffic_raises_no_alarm_and_spends_the_reference_once() -> None:
    process, clean = make_process(size=400), texts(CLEAN, 3)
    used: list[int] = []
    reference_of: list[int] = []
    at = feed(process, clean, 400)
    reference_of = [id(row) for row in process.reference]
    for _ in range(301):
        at = feed(process, clean, 1, at)
        used.append(process.progress.used)
        if process.progress.collecting:
            break
    assert process.status is DriftStatus.EXHAUSTED
    assert used[:-1] == list(range(1, 301))  # one new row of the reference for each pair
    assert len(set(reference_of)) == 400
    assert exhausted_below(400) == 100
    at = feed(process, clean, 400, at)
    assert process.status is DriftStatus.MONITORING


@pytest.mark.parametrize(("size", "below"), [(2000, 500), (1000, 500), (800, 200), (100, 25)])
def test_a_reference_is_spent_at_500_unused_rows_or_a_quarter_of_a_small_one(size: int, below: int) -> None:
    assert exhausted_below(size) == below


def test_a_reference_is_collected_over_a_whole_cycle() -> None:
    process = make_process(size=50, mix_over_seconds=1000.0, horizon_days=1.0)
    feed(process, texts(CLEAN, 1), 900, step=1.0)
    assert process.status is DriftStatus.COLLECTING
    assert len(process.reservoir.rows) == 50
    feed(process, texts(CLEAN, 2), 200, start=900)
    assert process.status is DriftStatus.MONITORING


def test_pairs_are_paced_over_the_horizon_and_drawn_from_a_full_window() -> None:
    process = make_process(size=100, mix_over_seconds=600.0, horizon_days=100 * 60 / 86400)  # one pair a minute
    at = feed(process, texts(CLEAN, 1), 601)
    assert process.progress.monitoring_since == 600
    at = feed(process, texts(CLEAN, 2), 598, at)
    assert process.detector.pairs == 0
    feed(process, texts(CLEAN, 3), 1200, at)
    assert 20 <= process.detector.pairs <= 30  # twenty minutes, and what was saved up in the window


def test_nothing_is_collected_before_a_version_takes_full_traffic() -> None:
    process = make_process(collect=False)
    feed(process, texts(CLEAN, 1), 100)
    assert process.report().reference_rows == 0
    process.configure(Drift(size=600, **FAST), 100.0)
    feed(process, texts(CLEAN, 1), 100)
    assert process.report().reference_rows == 100


def test_a_reference_of_a_cycle_makes_no_alarm_of_the_cycle() -> None:
    """Two topics alternate in blocks of 500: unmatched, that is always taken for drift."""
    process = make_process(size=2400, mix_over_seconds=1000.0, horizon_days=2400 * 4 / 86400, false_alarm_every_requests=1e3)
    sources = (texts(CLEAN, 1), texts(OTHER, 2))
    at = 0.0
    for block in range(14):
        at = feed(process, sources[block % 2], 500, at)
    assert process.detector.pairs > 300
    assert process.status is DriftStatus.MONITORING


# --- restart ---------------------------------------------------------------------


def revive(process: Process, now: float) -> Process:
    meta = process.save()
    parts = {name: pack(copy()) for name, copy in (("detector", process.copy_detector), ("reference", process.copy_reference))}
    parts["buffer"] = pack(process.copy_buffer())
    revived = Process(process.settings, parse_progress(meta), now, random.Random(7))
    revived.restore(meta, parts)
    return revived


@pytest.mark.parametrize("rows", [0, 300, 700])
def test_a_restart_changes_nothing(rows: int) -> None:
    process = make_process()
    at = feed(process, texts(CLEAN, 1), rows)
    revived = revive(process, at - 1)
    assert revived.report() == process.report()
    revived._rng.seed(3)
    process._rng.seed(3)
    for one in (process, revived):
        feed(one, texts(OTHER, 5), 150, at)
    assert revived.report() == process.report()


def test_an_alarm_survives_a_restart() -> None:
    process = make_process()
    at = feed(process, texts(CLEAN, 1), 600)
    feed(process, texts(OTHER, 2), 200, at)
    assert process.status is DriftStatus.ALARM
    assert revive(process, at).report() == process.report()


def test_the_inputs_since_the_alarm_become_the_next_reference() -> None:
    progress = Progress(epoch="1", redact=True, seeded=False, previous_alarm=5.0)
    process = Process(Drift(size=600, **FAST), progress, 0.0, random.Random(1))
    source = texts(OTHER, 4)
    at = feed(process, source, 50)
    assert process.report().reference_rows == 0  # nothing is taken before the seed is there
    process.seed([features(next(source)) for _ in range(400)], at)
    assert (process.status, process.remaining) == (DriftStatus.MONITORING, 400)
    feed(process, source, 240, at)
    assert process.status is DriftStatus.MONITORING
    assert process.report().effect < 0.1


def test_too_few_inputs_since_the_alarm_are_completed_from_live_traffic() -> None:
    progress = Progress(epoch="1", redact=True, seeded=False)
    process = Process(Drift(size=600, **FAST), progress, 0.0, random.Random(1))
    process.seed([features(str(i)) for i in range(100)], 0.0)
    assert (process.status, process.report().reference_rows) == (DriftStatus.COLLECTING, 100)
    feed(process, texts(CLEAN, 1), 500)
    assert process.status is DriftStatus.MONITORING
