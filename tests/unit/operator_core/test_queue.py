"""The wake queue, with a clock of its own."""

from __future__ import annotations

import asyncio

import pytest

from tuneloop_operator.domain.decision import Key
from tuneloop_operator.runtime.queue import LONGEST_BACKOFF, WakeQueue

A, B = Key("Widget", "n", "a"), Key("Widget", "n", "b")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def queue(clock: Clock) -> WakeQueue:
    return WakeQueue(clock, jitter=lambda: 1.0)


def pass_time(queue: WakeQueue, clock: Clock, seconds: float) -> None:
    clock.now += seconds
    queue.release_due()


async def test_many_wakes_are_one_pass(queue: WakeQueue) -> None:
    for _ in range(5):
        queue.wake(A)
    assert queue.depth == 1
    assert await queue.take() == A
    queue.done(A)
    assert queue.depth == 0


async def test_a_key_is_with_one_worker_at_a_time_and_a_wake_meanwhile_is_kept(queue: WakeQueue) -> None:
    queue.wake(A)
    await queue.take()
    queue.wake(A)
    queue.wake(A)
    assert queue.depth == 0
    queue.done(A)
    assert queue.depth == 1
    await queue.take()
    queue.done(A)
    assert queue.depth == 0


async def test_keys_are_taken_in_the_order_of_their_wakes(queue: WakeQueue) -> None:
    for key in (B, A, B):
        queue.wake(key)
    assert [await queue.take(), await queue.take()] == [B, A]


async def test_a_requeue_comes_when_it_is_due(queue: WakeQueue, clock: Clock) -> None:
    queue.wake(A)
    await queue.take()
    queue.done(A, requeue_after=10)
    pass_time(queue, clock, 9)
    assert queue.depth == 0
    pass_time(queue, clock, 1)
    assert queue.depth == 1


async def test_a_wake_comes_before_a_requeue_and_takes_its_place(queue: WakeQueue, clock: Clock) -> None:
    queue.wake(A)
    await queue.take()
    queue.done(A, requeue_after=10)
    queue.wake(A)
    assert queue.depth == 1
    await queue.take()
    queue.done(A)
    pass_time(queue, clock, 20)
    assert queue.depth == 0


async def test_a_backoff_doubles_and_no_wake_cuts_it_short(queue: WakeQueue, clock: Clock) -> None:
    waits = []
    for _ in range(4):
        queue.wake(A)
        await queue.take()
        waits.append(queue.failed(A, first=1.0))
        queue.wake(A)
        assert queue.depth == 0
        pass_time(queue, clock, waits[-1])
        assert queue.depth == 1
    assert waits == [1.0, 2.0, 4.0, 8.0]


async def test_a_backoff_is_capped_and_ends_with_success(queue: WakeQueue, clock: Clock) -> None:
    for _ in range(100):
        queue.wake(A)
        await queue.take()
        seconds = queue.failed(A)
        pass_time(queue, clock, seconds)
    assert seconds == LONGEST_BACKOFF
    assert queue.failed(await queue.take(), longest=5.0) == 5.0
    pass_time(queue, clock, 5.0)
    await queue.take()
    queue.done(A)
    queue.wake(A)
    await queue.take()
    assert queue.failed(A, first=1.0) == 1.0


async def test_a_wake_during_a_pass_that_fails_waits_for_the_backoff(queue: WakeQueue, clock: Clock) -> None:
    queue.wake(A)
    await queue.take()
    queue.wake(A)
    queue.failed(A, first=1.0)
    assert queue.depth == 0
    pass_time(queue, clock, 1.0)
    assert queue.depth == 1


async def test_jitter_only_shortens() -> None:
    queue = WakeQueue(lambda: 0.0, jitter=lambda: 0.0)
    queue.wake(A)
    assert queue.failed(await queue.take(), first=2.0) == 1.0


async def test_a_drain_forgets_what_waits_and_awaits_what_runs(queue: WakeQueue) -> None:
    queue.wake(A)
    queue.wake(B)
    await queue.take()
    drained = asyncio.create_task(queue.drain(5.0))
    await asyncio.sleep(0)
    assert not drained.done()
    queue.done(A, requeue_after=0)
    await drained
    assert (queue.depth, queue.active, queue.scheduled) == (0, 0, 0)


async def test_a_key_that_its_worker_gave_up_can_be_taken_again(queue: WakeQueue) -> None:
    queue.wake(A)
    await queue.take()
    queue.wake(A)
    queue.release(A)
    assert await queue.take() == A, "the wake meanwhile was kept"


async def test_wakes_that_may_wait_are_one_pass_and_an_urgent_one_comes_before(queue: WakeQueue, clock: Clock) -> None:
    queue.wake(A, within=0.5)
    pass_time(queue, clock, 0.3)
    queue.wake(A, within=0.5)
    assert queue.depth == 0
    pass_time(queue, clock, 0.2)
    assert queue.depth == 1, "counted from the first"
    queue.wake(B, within=0.5)
    queue.wake(B)
    assert queue.depth == 2
    pass_time(queue, clock, 1.0)
    assert queue.depth == 2


async def test_a_wake_that_may_wait_does_not_put_off_what_is_due_sooner(queue: WakeQueue, clock: Clock) -> None:
    queue.wake(A)
    await queue.take()
    queue.wake(A, within=5.0)
    queue.done(A, requeue_after=1.0)
    pass_time(queue, clock, 1.0)
    assert queue.depth == 1
