"""A pass and what follows from its end: outcomes, backoffs, chains."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from tuneloop_operator.cluster.apply import Outcome
from tuneloop_operator.cluster.client import Cluster
from tuneloop_operator.cluster.credentials import Credentials
from tuneloop_operator.cluster.errors import ChildRefused, Conflict, Forbidden, NameConflict, NotLeader, Refused, ServerError, Unreachable
from tuneloop_operator.cluster.registration import Registration
from tuneloop_operator.cluster.transport import Transport
from tuneloop_operator.domain.decision import Decision, Key, Refusal
from tuneloop_operator.runtime.metrics import Metrics
from tuneloop_operator.runtime.passes import CHAIN, CONFLICT_BACKOFF, IDLE_PAUSE, MOMENT, OUTAGE_BACKOFF, REFUSED_SECONDS, Passes
from tuneloop_operator.runtime.queue import WakeQueue
from tuneloop_operator.settings import Settings

KEY = Key("Widget", "n", "w")


class Case:
    """One object, a decision, and an applier that does as the test says."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queue = WakeQueue(lambda: self.now, jitter=lambda: 1.0)
        self.cluster = Cluster(Transport(Credentials("http://127.0.0.1:1")), Settings())
        self.cluster.cache.put("Widget", {"metadata": {"name": "w", "namespace": "n", "uid": "u", "resourceVersion": "1"}})
        self.refreshed: list[Key] = []
        self.cluster.refresh = self._refresh  # type: ignore[method-assign, assignment]
        self.metrics = Metrics()
        self.decision = Decision(status={})
        self.result: Outcome | Exception = Outcome()
        registration: Registration[Any] = Registration("Widget", self._observe, lambda *_: self.decision)
        self.passes = Passes({"Widget": registration}, self.cluster, self, self.queue, self.metrics, lambda: datetime.now(UTC))  # type: ignore[arg-type]

    async def _observe(self, *_: Any) -> object:
        return object()

    async def _refresh(self, key: Key) -> None:
        self.refreshed.append(key)

    async def carry_out(self, *_: Any) -> Outcome:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    async def run(self) -> str:
        """One pass; returns its outcome."""
        self.queue.wake(KEY)
        await self.passes.run_one(await self.queue.take())
        samples = [s for f in self.metrics.passes.collect() for s in f.samples if s.name.endswith("_total") and s.value]
        self.metrics.passes.clear()
        return str(samples[0].labels["outcome"])

    @property
    def wait(self) -> float | None:
        """Seconds until the next pass; None = until a wake, 0 = now."""
        if self.queue.depth:
            return 0.0
        due = self.queue._due.get(KEY)
        return None if due is None else round(due - self.now, 3)

    def errors(self, label: str) -> float:
        return float(self.metrics.errors.labels("Widget", label)._value.get())


@pytest.fixture
async def case() -> Case:
    return Case()


async def test_a_pass_without_news_waits_for_a_wake_or_as_long_as_it_asks(case: Case) -> None:
    assert (await case.run(), case.wait) == ("unchanged", None)
    case.decision = Decision(status={}, requeue_after=7)
    assert (await case.run(), case.wait) == ("unchanged", 7)
    case.decision = Decision(status={}, requeue_after=0)
    assert (await case.run(), case.wait) == ("unchanged", IDLE_PAUSE)


async def test_a_pass_that_wrote_is_followed_by_another_in_a_moment(case: Case) -> None:
    case.result = Outcome(status=True)
    assert (await case.run(), case.wait) == ("changed", MOMENT)
    case.decision = Decision(status={}, requeue_after=0)
    assert (await case.run(), case.wait) == ("changed", 0)


async def test_passes_that_always_change_something_slow_down(case: Case) -> None:
    case.result = Outcome(status=True)
    for _ in range(CHAIN):
        await case.run()
    assert (await case.run(), case.wait) == ("changed", IDLE_PAUSE)


async def test_an_object_that_is_gone_or_going_is_left_alone(case: Case) -> None:
    known = case.cluster.cache.get(*("Widget", "n", "w"))
    assert known is not None
    known["metadata"]["deletionTimestamp"] = "…"
    assert (await case.run(), case.wait) == ("gone", None)
    case.cluster.cache.remove("Widget", known)
    assert (await case.run(), case.wait) == ("gone", None)


async def test_a_conflict_reads_anew_and_tries_again_soon(case: Case) -> None:
    case.result = Conflict(409, "Conflict", "")
    case.result.key = Key("ConfigMap", "n", "c")
    assert (await case.run(), case.wait) == ("conflict", CONFLICT_BACKOFF)
    assert case.refreshed == [KEY, Key("ConfigMap", "n", "c")]


@pytest.mark.parametrize(
    ("error", "longest"),
    [(Unreachable("down"), OUTAGE_BACKOFF), (ServerError(503, "", ""), OUTAGE_BACKOFF), (Forbidden(403, "", ""), 60.0)],
)
async def test_an_outage_is_waited_for_with_a_short_cap_and_a_refusal_with_a_long_one(case: Case, error: Exception, longest: float) -> None:
    case.result = error
    for _ in range(12):
        case.now += 100.0
        case.queue.release_due()
        assert await case.run() == "failed"
    assert case.wait == longest


async def test_an_unknown_error_is_counted_as_a_bug_and_ends_nothing(case: Case) -> None:
    case.result = KeyError("spec")
    assert (await case.run(), case.errors("bug")) == ("failed", 1)
    assert case.wait is not None


async def test_a_pass_that_met_a_lease_run_out_is_not_forgotten(case: Case) -> None:
    case.result = NotLeader("renewed a moment later, as if nothing had happened")
    assert (await case.run(), case.wait) == ("fenced", 0.5)


async def test_a_namespace_that_ends_is_no_error(case: Case) -> None:
    case.result = Forbidden(403, "Forbidden", "", {"causes": [{"reason": "NamespaceTerminating"}]})
    assert (await case.run(), case.wait) == ("gone", None)


async def test_a_taken_name_is_decided_about_at_once_and_looked_at_again_in_peace(case: Case) -> None:
    taken = Key("Job", "n", "j")
    case.result = NameConflict(taken)
    case.decision = Decision(status={}, requeue_after=30)
    assert (await case.run(), case.wait) == ("conflict", 0)
    case.cluster.conflicts["u"] = {taken}
    case.cluster.forget_free_names = case._refresh  # type: ignore[method-assign, assignment]
    assert (await case.run(), case.wait) == ("conflict", 30)


async def test_a_refused_child_is_decided_about_at_once_and_tried_again_in_peace(case: Case) -> None:
    child = Key("Job", "n", "j")

    async def refuse(*_: Any) -> Outcome:
        case.cluster.refusals.setdefault("u", {})[child] = Refusal(child, "no.", 0)
        raise ChildRefused(child, Refused(422, "Invalid", "no."))

    case.carry_out = refuse  # type: ignore[method-assign]
    case.decision = Decision(status={}, requeue_after=1)
    assert (await case.run(), case.wait) == ("failed", 0)
    assert (await case.run(), case.wait) == ("failed", REFUSED_SECONDS)
    assert case.errors("refused") == 2


async def test_a_refusal_is_forgotten_with_the_spec_that_it_was_of(case: Case) -> None:
    child = Key("Job", "n", "j")
    case.cluster.refusals["u"] = {child: Refusal(child, "no.", 0)}
    await case.run()
    assert [refusal.key for refusal in case.cluster.refused("u")] == [child]
    known = case.cluster.cache.get(*("Widget", "n", "w"))
    assert known is not None
    known["metadata"]["generation"] = 2
    await case.run()
    assert case.cluster.refused("u") == ()
