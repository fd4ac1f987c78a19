"""How long a checkpoint is tried where the store takes nothing."""

from __future__ import annotations

import errno

import pytest

from tuneloop_trainer.errors import Unavailable
from tuneloop_trainer.training.checkpoints import OUTAGE_SECONDS, Saves

FULL = OSError(errno.ENOSPC, "No space left on device")


class Clock:
    """Time passes where somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_ten_minutes_without_a_save_end_the_run() -> None:
    clock = Clock()
    saves = Saves(clock, clock.wait)

    def refuse() -> None:
        raise FULL

    for minute in range(10):
        clock.now = 60.0 * minute
        assert not saves.attempt(refuse, within=None)
    clock.now = OUTAGE_SECONDS
    with pytest.raises(Unavailable, match=r"took no checkpoint for 600 s: .*No space left"):
        saves.attempt(refuse, within=None)


def test_last_save_is_tried_until_the_store_is_back() -> None:
    clock, refused = Clock(), []
    saves = Saves(clock, clock.wait)

    def save() -> None:
        if clock.now < 300:
            refused.append(clock.now)
            raise FULL

    assert saves.attempt(save, within=OUTAGE_SECONDS)
    assert len(refused) == 30


def test_save_that_fails_by_a_mistake_of_its_own_is_not_tried_again() -> None:
    with pytest.raises(KeyError):
        Saves().attempt(lambda: {}["x"], within=OUTAGE_SECONDS)
