"""Live inputs are compared with those of the training: once for each version, without a text kept, and over restarts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from tests.unit.gateway.conftest import Running, Start, eventually, make_config, make_revision
from tests.unit.gateway.engines import FakeEngine

from tuneloop_gateway.contract import Drift, SkewReport
from tuneloop_gateway.drift import monitor as monitor_module
from tuneloop_gateway.drift.features import features
from tuneloop_gateway.drift.process import pack, unpack
from tuneloop_gateway.drift.skew import PAIRS_AFTER, Skew, restored

TRAINED = [f"trained{i}" for i in range(60)]
OTHER = [f"other{i}" for i in range(60)]
FAST = Drift(mix_over_seconds=0.0)


def texts(words: list[str], seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    while True:
        yield " ".join(rng.choices(words, k=12))


def sample(words: list[str], rows: int, seed: int = 99) -> list[str]:
    source = texts(words, seed)
    return [next(source) for _ in range(rows)]


def make_skew(rows: int = 400, settings: Drift = FAST, seed: int = 1) -> Skew:
    return Skew("m@1", 1, [features(text) for text in sample(TRAINED, rows)], settings, 0.0, random.Random(seed))


def feed(skew: Skew, words: list[str], rows: int, start: float = 0.0, seed: int = 5) -> float:
    for number, text in zip(range(rows), texts(words, seed), strict=False):
        skew.take(text, start + number)
    return start + rows


# --- the comparison --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_inputs_like_those_of_the_training_are_alike_once_the_sample_is_used_up(seed: int) -> None:
    skew = make_skew(seed=seed)
    feed(skew, TRAINED, 399, seed=seed)
    assert skew.report().status == "Comparing"
    feed(skew, TRAINED, 50, 399, seed=50 + seed)
    report = skew.report()
    assert (report.status, report.pairs, report.reference_rows) == ("Alike", 400, 400)
    assert abs(report.effect) < 0.1


def test_other_inputs_differ_and_the_size_of_the_difference_is_known() -> None:
    skew = make_skew(1000)
    feed(skew, OTHER, 900)
    report = skew.report()
    assert report.status == "Differ"
    assert report.effect > 0.3
    assert skew.detected_at is not None
    assert report.pairs == skew.detected_at + PAIRS_AFTER


def test_the_threshold_is_that_of_drift_or_a_hundred_times_the_pairs() -> None:
    assert make_skew(400, Drift(false_alarm_every_requests=1000)).threshold == pytest.approx(10.6, abs=0.01)  # ln 40,000
    assert make_skew(400, Drift(false_alarm_every_requests=1e6)).threshold == pytest.approx(13.8, abs=0.02)


def test_live_rows_are_drawn_over_a_window_from_a_whole_one() -> None:
    skew = make_skew(100, Drift(mix_over_seconds=1000.0))
    at = feed(skew, TRAINED, 999)
    assert skew.detector.pairs == 0
    at = feed(skew, TRAINED, 500, at)
    feed(skew, TRAINED, 1000, at)
    assert skew.report().status == "Alike"


def test_a_restart_goes_on_where_it_was_and_another_version_starts_afresh() -> None:
    skew = make_skew(1000)
    at = feed(skew, OTHER, 120)
    saved = unpack(pack(skew.save()))
    revived = restored(saved, "m@1", 1, FAST, at - 1, random.Random(1))
    assert revived is not None
    assert revived.report() == skew.report()
    for one in (skew, revived):
        one._rng.seed(3)
        feed(one, OTHER, 500, at)
    assert revived.report() == skew.report()
    assert skew.report().status == "Differ"
    assert restored(saved, "m@2", 2, FAST, at, random.Random(1)) is None


# --- in a gateway ----------------------------------------------------------------

CONFIG: dict[str, Any] = {"drift": {"size": 200, "horizonDays": 1e-9, "mixOverSeconds": 0}}


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "TICK_SECONDS", 0.05)


def say(gateway: Running, words: list[str], rows: int, seed: int = 3) -> None:
    for _, text in zip(range(rows), texts(words, seed), strict=False):
        gateway.gateway.monitor.take(text, 0.0)


async def compared(gateway: Running) -> SkewReport:
    await eventually(lambda: gateway.gateway.monitor.skew() is not None)
    report = (await gateway.state()).skew
    assert report is not None
    return report


async def test_the_sample_comes_from_the_engine_and_the_verdict_survives_a_restart(start: Start, engine: FakeEngine) -> None:
    engine.reference = sample(TRAINED, 400)
    config = make_config(make_revision(reference=True), **CONFIG)
    first = await start(config, {"svc": (engine.address,)})
    begun = await compared(first)
    assert (begun.version, begun.status, begun.pairs, begun.reference_rows) == (1, "Comparing", 0, 400)
    assert 'tuneloop_skew_detected{deployment="tweets",namespace="team"} 0.0' in await first.metrics()
    say(first, OTHER, 400)
    before = await compared(first)
    assert before.status == "Differ"
    assert 'tuneloop_skew_detected{deployment="tweets",namespace="team"} 1.0' in await first.metrics()
    await first.gateway.stop()
    assert b"trained1" not in (first.folder / "tuneloop.db").read_bytes()
    engine.reference = None
    second = await start(config, {"svc": (engine.address,)}, pod_uid="uid-2")
    assert await compared(second) == before


async def test_training_inputs_are_made_canonical_as_live_ones_are(start: Start, engine: FakeEngine) -> None:
    rng = random.Random(2)
    engine.reference = [f"write  to {rng.random()}@example.org" for _ in range(400)]
    gateway = await start(make_config(make_revision(reference=True), **CONFIG), {"svc": (engine.address,)})
    await compared(gateway)
    for _ in range(400):
        gateway.gateway.monitor.take("write to [EMAIL]", 0.0)
    assert (await compared(gateway)).status == "Alike"


async def test_another_version_is_compared_anew(start: Start, engine: FakeEngine, second_engine: FakeEngine) -> None:
    engine.reference, second_engine.reference = sample(TRAINED, 400), sample(OTHER, 350)
    endpoints = {"svc": (engine.address,), "new": (second_engine.address,)}
    gateway = await start(make_config(make_revision(reference=True), **CONFIG), endpoints)
    await compared(gateway)
    say(gateway, OTHER, 400)
    assert (await compared(gateway)).status == "Differ"
    gateway.configure(make_config(make_revision("r2", service="new", version=2, reference=True), generation=2, **CONFIG))
    assert (await gateway.state()).skew is None, "what was found of another version is not told of this one"
    assert (await compared(gateway)).version == 2
    say(gateway, OTHER, 400)
    assert (await compared(gateway)).status == "Alike"


async def test_an_engine_without_a_sample_is_asked_once_and_nothing_is_compared(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(make_revision(reference=True), **CONFIG), {"svc": (engine.address,)})
    comparing = gateway.gateway.monitor._comparing
    await eventually(lambda: comparing._has_none)
    assert (await gateway.state()).skew is None
    assert "tuneloop_skew_detected{" not in await gateway.metrics()


@pytest.mark.parametrize("more", [{}, {"drift": None}])
async def test_nothing_is_compared_without_drift_settings_or_a_recorded_sample(
    start: Start, engine: FakeEngine, more: dict[str, Any]
) -> None:
    engine.reference = sample(TRAINED, 400)
    gateway = await start(make_config(make_revision(reference=bool(more)), **CONFIG | more), {"svc": (engine.address,)})
    await eventually(lambda: gateway.gateway.router.count("r1").warm)
    await gateway.gateway.monitor.step()
    assert (await gateway.state()).skew is None
