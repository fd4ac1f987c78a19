"""How many rows go through the model at once."""

from __future__ import annotations

import pytest

from tuneloop_trainer.training.plan import micro_batch


@pytest.mark.parametrize(
    ("batch", "configured", "longest", "expected"),
    [(16, None, 10, 16), (16, None, 100, 4), (16, 5, 10, 4), (6, 4, 10, 3), (7, None, 9000, 1)],
)
def test_micro_batch_divides_the_global_batch(batch: int, configured: int | None, longest: int, expected: int) -> None:
    assert micro_batch(batch, configured, longest, "cpu") == expected
