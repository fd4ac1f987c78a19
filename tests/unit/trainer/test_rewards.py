"""What a completion is worth, and what happens where a reward does not say."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneloop_trainer.contract import EntryPoint, Reason
from tuneloop_trainer.errors import Invalid, RewardFailed
from tuneloop_trainer.rewards import Completion, totals
from tuneloop_trainer.rewards.entry_point import Brought
from tuneloop_trainer.rewards.match import Match


def written(text: str, reference: str = "42", row: int = 7) -> Completion:
    return Completion("What is 17 + 25?", text, reference, row)


@pytest.mark.parametrize(
    ("match", "text", "reference", "value"),
    [
        ("Equals", " 42. ", "42", 1.0),
        ("Equals", "It is 42", "42", 0.0),
        ("Equals", "The  CAF\u00c9", "the cafe\u0301", 1.0),
        ("Equals", "", "42", 0.0),
        ("Contains", "It is 42, I think", "42", 1.0),
        ("Contains", "It is 420", "42", 0.0),
        ("Contains", "It is 4 2", "42", 0.0),
        ("Contains", "a+b is c", "A+B", 1.0),
    ],
)
def test_match_looks_past_case_space_and_marks_at_the_ends(match: Any, text: str, reference: str, value: float) -> None:
    assert Match(match).of([written(text, reference)]) == [value]


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Brought]:
    """Installs a package whose reward has this body."""

    def install(body: str, seconds: int = 5) -> Brought:
        about = tmp_path / "paid-2.1.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text("Name: paid\nVersion: 2.1\n")
        (about / "entry_points.txt").write_text("[tuneloop.rewards]\npaid = paid:paid\n")
        (tmp_path / "paid.py").write_text(f"import time\ndef paid(completion, settings):\n    {body}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(__import__("sys").modules, "paid", raising=False)
        return Brought(EntryPoint(name="paid", settings={"most": "3"}, timeout_seconds=seconds))

    return install


def test_function_of_the_image_is_told_the_completion_and_its_settings(brought: Any) -> None:
    reward = brought("return len(completion.text) / float(settings['most']) + (completion.reference == '42')")

    assert reward.of([written("abc"), written("abcdef", "no")]) == [2.0, 2.0]
    assert "paid==2.1" in reward.key(), "scores of another version of the package are not taken for its own"
    assert totals([(reward, 0.5), (Match("Equals"), 2.0)], [written("abc")]) == [1.0]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("raise ValueError('odd')", "raised ValueError: odd for row 7, completion 'It is 42'"),
        ("return float('nan')", "is nan for row 7"),
        ("return 'much'", "returned 'much', which is no number, for row 7"),
        ("return None", "returned 'None', which is no number, for row 7"),
    ],
)
def test_reward_that_fails_names_the_row(body: str, sentence: str, brought: Any) -> None:
    with pytest.raises(RewardFailed) as raised:
        brought(body).of([written("It is 42")])

    assert sentence in raised.value.message
    assert raised.value.reason is Reason.REWARD_FAILED


def test_reward_that_does_not_end_is_not_waited_for(brought: Any) -> None:
    reward = brought("time.sleep(30)", seconds=1)
    started = time.monotonic()

    with pytest.raises(RewardFailed, match="took more than 1 s for row 7"):
        reward.of([written("It is 42")])

    assert time.monotonic() - started < 10


def test_reward_that_the_image_does_not_have_is_refused(brought: Any) -> None:
    brought("return 1")

    with pytest.raises(Invalid, match=r"has no reward 'other' in the entry points tuneloop\.rewards; it has paid\."):
        Brought(EntryPoint(name="other"))
