"""Some items of each suite as the baseline and the candidate answer them, for people to read. They decide nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from tuneloop_trainer.chat import Formatter
from tuneloop_trainer.evaluation.baselines import SuiteScores
from tuneloop_trainer.evaluation.groups import Grouping, groupings
from tuneloop_trainer.evaluation.probes import has_labels
from tuneloop_trainer.evaluation.suites import PreparedSuite
from tuneloop_trainer.models import Model
from tuneloop_trainer.progress import ProgressWriter

MAX_SUITES = 3
ASKED = 4
"""Items of a suite that both models answer in their own words."""
ANSWER_TOKENS: Final = 64
PROMPT_CHARACTERS = 8_000
PICKED = 2
"""Items of each kind that are shown of a suite with labels: newly right, newly wrong, neither."""
Change = Literal["newly right", "newly wrong", "right as before", "wrong as before"]


@dataclass(frozen=True, slots=True)
class Comparison:
    prompt: str
    expected: str
    before: str | None
    after: str
    change: Change | None = None
    """Of items with labels."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A suite's items that are shown, and of all its items how many changed how."""

    suite: str
    shown: tuple[Comparison, ...]
    counts: dict[Change, int]
    groupings: tuple[Grouping, ...] = ()


def places_to_ask(suite: PreparedSuite) -> list[int]:
    """The first items that a model writes an answer to; none where an item has one of a few labels."""
    if has_labels(suite):
        return []
    fitting = (place for place, item in enumerate(suite.items) if item.prompt and item.asked <= PROMPT_CHARACTERS)
    return [place for place, _ in zip(fitting, range(ASKED), strict=False)]


def ask(model: Model, suite: PreparedSuite, formatter: Formatter, stops: frozenset[int], progress: ProgressWriter) -> list[str]:
    """The model's own answers to `places_to_ask`."""
    from tuneloop_trainer.evaluation import scoring

    prompts = [suite.encoded[place].prompt for place in places_to_ask(suite)]
    if not prompts:
        return []
    done = progress.counter("Answering", len(prompts))
    return [formatter.decode(greedy.tokens) for greedy in scoring.greedy_answers(model, prompts, ANSWER_TOKENS, stops, done)]


def compare(
    name: str, suite: PreparedSuite, candidate: SuiteScores, baseline: SuiteScores, before: list[str] | None, after: list[str] | None
) -> Compared:
    """What is shown of a suite: answers in words where they were asked for, and what became of the items that have labels."""
    places = places_to_ask(suite)
    worded = tuple(
        Comparison(suite.items[place].prompt, suite.items[place].completion, before[number] if before else None, after[number])
        for number, place in enumerate(places if after else ())
        if after is not None
    )
    if not suite.labels:
        return Compared(name, worded, {}, groupings(suite, candidate, baseline))
    old, new = baseline.chosen(), candidate.chosen()
    changes = [_change(old[place] == expected, new[place] == expected) for place, expected in enumerate(suite.expected)]
    counts: dict[Change, int] = {change: changes.count(change) for change in CHANGES}
    picked = [place for kinds in KINDS for place in [at for at, change in enumerate(changes) if change in kinds][:PICKED]]
    labelled = tuple(
        Comparison(
            suite.items[place].prompt,
            _option(suite, place, suite.expected[place]),
            _option(suite, place, old[place]),
            _option(suite, place, new[place]),
            changes[place],
        )
        for place in picked
    )
    return Compared(name, labelled + worded, counts, groupings(suite, candidate, baseline))


CHANGES: tuple[Change, ...] = ("newly right", "newly wrong", "right as before", "wrong as before")
KINDS: tuple[tuple[Change, ...], ...] = (("newly right",), ("newly wrong",), ("right as before", "wrong as before"))


def _change(was_right: bool, is_right: bool) -> Change:
    if was_right == is_right:
        return "right as before" if is_right else "wrong as before"
    return "newly right" if is_right else "newly wrong"


def _option(suite: PreparedSuite, place: int, label: int) -> str:
    item = suite.items[place]
    return (item.completion, item.rejected or "")[label] if suite.prefers else suite.labels[label]
