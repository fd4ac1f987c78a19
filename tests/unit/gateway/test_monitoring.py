"""Drift through a real gateway and its database: alarm, restart, new epoch, one detector for all replicas."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tests.unit.gateway.conftest import INTERNAL, Running, Start, eventually, make_config, on_sqlite_alone
from tests.unit.gateway.engines import FakeEngine

from tuneloop_gateway.contract import DriftReport, DriftStatus
from tuneloop_gateway.database import Unavailable
from tuneloop_gateway.drift.monitor import Monitor

WORDS = {"clean": [f"clean{i}" for i in range(60)], "other": [f"other{i}" for i in range(60)]}

ON_BOTH_STORES = True


def drift(**more: Any) -> dict[str, Any]:
    return {"size": 200, "falseAlarmEveryRequests": 10_000, "horizonDays": 1e-9, "mixOverSeconds": 0, **more}


async def say(gateway: Running, words: str, rows: int, seed: int = 0) -> None:
    """Straight into the monitor: what HTTP does to a text is tested elsewhere."""
    rng = random.Random(seed)
    for _ in range(rows):
        gateway.gateway.monitor.take(" ".join(rng.choices(WORDS[words], k=12)), 0.0)


def found(gateway: Running) -> DriftReport:
    report = gateway.gateway.monitor.report()
    assert report is not None
    return report


async def loaded(gateway: Running) -> Monitor:
    await eventually(lambda: gateway.gateway.monitor._process is not None)
    return gateway.gateway.monitor


@on_sqlite_alone
async def test_requests_reach_the_detector_canonical_and_before_the_prompt(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(drift=drift(size=3)), {"svc": (engine.address,)})
    monitor = await loaded(gateway)
    seen: list[str] = []
    gateway.gateway.capture._inputs = lambda text, _: (seen.append(text), monitor.take(text, 0.0))[1]
    for _ in range(3):
        await gateway.ask("mail  a@b.org")
    await gateway.captured()
    assert seen == ["mail [EMAIL]"] * 3
    assert (await gateway.drift()).status is DriftStatus.MONITORING


async def test_an_alarm_is_latched_over_a_restart_and_shown_as_a_metric(start: Start, engine: FakeEngine) -> None:
    config = make_config(drift=drift())
    first = await start(config, {"svc": (engine.address,)})
    await loaded(first)
    await say(first, "clean", 210)
    assert (await first.drift()).status is DriftStatus.MONITORING
    await say(first, "other", 170)
    before = await first.drift()
    assert before.status is DriftStatus.ALARM
    assert before.log_evidence >= before.log_threshold
    assert before.effect > 0.2
    assert 'tuneloop_drift_alarm{deployment="tweets",namespace="team"} 1.0' in await first.metrics()
    await first.gateway.stop()
    second = await start(config, {"svc": (engine.address,)}, pod_uid="uid-2")
    await loaded(second)
    assert await second.drift() == before


async def test_nothing_is_said_of_drift_before_the_saved_state_is_read(
    start: Start, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(drift=drift())
    first = await start(config, {"svc": (engine.address,)})
    await loaded(first)
    await say(first, "clean", 210)
    await say(first, "other", 170)
    await first.gateway.stop()
    hold = Monitor._hold

    async def away(self: Monitor) -> bool:
        raise Unavailable("the database is away")

    monkeypatch.setattr(Monitor, "_hold", away)
    second = await start(config, {"svc": (engine.address,)}, pod_uid="uid-2")
    assert (await second.state()).drift is None
    assert "tuneloop_drift_alarm{" not in await second.metrics()
    monkeypatch.setattr(Monitor, "_hold", hold)
    await second.gateway.monitor.step()
    assert (await second.drift()).status is DriftStatus.ALARM
    assert "tuneloop_drift_alarm{" in await second.metrics()


async def test_promotion_starts_afresh_with_the_inputs_since_the_alarm(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(drift=drift()), {"svc": (engine.address,)})
    await loaded(gateway)
    for number in range(30):
        await gateway.ask(f"captured before the alarm {number}")
    await gateway.captured()
    await say(gateway, "clean", 180)
    await say(gateway, "other", 170)
    assert found(gateway).status is DriftStatus.ALARM
    rng = random.Random(1)
    for _ in range(80):
        await gateway.ask(" ".join(rng.choices(WORDS["other"], k=12)))
    await gateway.captured()
    sampled = await _labels(gateway)
    assert 70 <= len(sampled) <= 80  # those since the alarm
    gateway.configure(make_config(drift=drift(epoch="2", seed="SinceAlarm"), generation=2))
    await eventually(lambda: found(gateway).status is DriftStatus.MONITORING)
    report = found(gateway)
    assert (report.epoch, report.pairs, report.detected_at) == ("2", 0, None)
    assert report.reference_rows == len(sampled)
    await say(gateway, "other", 20, seed=9)
    assert found(gateway).status is DriftStatus.MONITORING


async def _labels(gateway: Running) -> list[str]:
    async with gateway.session.get(f"{gateway.internal_url}/internal/labels?limit=1000", headers=INTERNAL) as response:
        return (await response.text()).splitlines()


async def test_a_fresh_epoch_collects_a_new_reference(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(drift=drift()), {"svc": (engine.address,)})
    await loaded(gateway)
    await say(gateway, "clean", 210)
    await say(gateway, "other", 170)
    gateway.configure(make_config(drift=drift(epoch="rearmed"), generation=2))
    report = await gateway.drift()
    assert (report.status, report.epoch) == (DriftStatus.COLLECTING, "rearmed")  # at once: the operator must not see the old alarm
    await eventually(lambda: gateway.gateway.monitor._process.progress.epoch == "rearmed")  # type: ignore[union-attr]
    await say(gateway, "other", 210)
    assert (await gateway.drift()).status is DriftStatus.MONITORING


async def test_one_replica_detects_and_the_others_report_what_it_found(start: Start, engine: FakeEngine) -> None:
    config = make_config(drift=drift())
    owner = await start(config, {"svc": (engine.address,)}, pod_uid="owner")
    await loaded(owner)
    follower = await start(config, {"svc": (engine.address,)}, pod_uid="follower")
    await follower.gateway.monitor.step()
    await say(follower, "other", 300)  # a follower's own requests are not tested
    await say(owner, "clean", 210)
    await say(owner, "other", 170)
    await owner.gateway.monitor.step()
    await follower.gateway.monitor.step()
    assert await follower.drift() == await owner.drift()
    assert (await follower.drift()).status is DriftStatus.ALARM
    await owner.gateway.stop()
    await follower.gateway.monitor.step()
    assert follower.gateway.monitor._process is not None
    assert (await follower.drift()).status is DriftStatus.ALARM


@on_sqlite_alone
async def test_without_drift_settings_nothing_is_watched(gateway: Running) -> None:
    assert (await gateway.drift()).status is DriftStatus.OFF
    assert "tuneloop_drift_alarm{" not in await gateway.metrics()


@on_sqlite_alone
async def test_no_text_is_kept_in_the_detectors_state(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(drift=drift(), capture={"sampleRate": 0}), {"svc": (engine.address,)})
    await loaded(gateway)
    gateway.gateway.monitor.take("xylophone " * 3, 0.0)
    await say(gateway, "clean", 210)
    await gateway.gateway.stop()
    assert b"xylophone" not in (gateway.folder / "tuneloop.db").read_bytes()
