"""Probes: what a served model is asked before it takes traffic, and what the evaluated model answered to it.

The engine computes in bf16 with kernels of its own, so that two tokens of nearly the same logit may change places. What is asked is
therefore what the evaluated model was sure of: of the first items of a suite, in their order,

- with labels: those whose best label leads the second by MARGIN nats of summed log-probability, and whose free answer no token won by
  less than that;
- without labels: the beginning of the free answer, up to the first token that won by less than MARGIN.

Left out are items that no user could send: with a system turn of their own, with more columns than the text in their prompt, of
another template than the one that is served; and very long ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from tuneloop_trainer.chat import Formatter
from tuneloop_trainer.contract import Gate, Probe
from tuneloop_trainer.data.templates import served_prompt
from tuneloop_trainer.evaluation.baselines import SuiteScores
from tuneloop_trainer.evaluation.suites import PreparedSuite
from tuneloop_trainer.models import Model
from tuneloop_trainer.progress import ProgressWriter

if TYPE_CHECKING:
    from tuneloop_trainer.evaluation.scoring import Greedy

MAX_PROBES = 50
SAMPLE = 50
"""Items of a suite that count for the share of free answers that are a label."""
ASKED = 100
"""Items of a suite that are answered freely."""
MAX_ANSWER_TOKENS = 16
MARGIN: Final = 0.5
"""Nats. One step of bf16 is 0.125 for logits between 16 and 32."""
MAX_CHARACTERS = 8_000
"""Of a probe's text: the gateway reads a list of at most 2 MiB."""
BROKEN = "\ufffd"
"""What a character is decoded to that was cut in the middle."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's own answer to an item."""

    text: str
    is_sure: bool
    """No token of it, its end included, won by less than MARGIN."""
    beginning: str
    """The text up to the first token that did."""
    steps: int
    """Tokens that the beginning takes, the end included where it belongs to it."""


Answers = dict[str, dict[int, Answer]]
"""Per suite, the answers to some of its items, by their place."""


def has_labels(suite: PreparedSuite) -> bool:
    """Whether an item is answered by one of a few labels, the same for all items."""
    return bool(suite.labels) and not suite.prefers


def answer_freely(
    model: Model, suites: dict[str, PreparedSuite], formatter: Formatter, stops: frozenset[int], progress: ProgressWriter
) -> Answers:
    """The model's own answers to the first items of each suite; where there are no labels, to the first that can be probes."""
    from tuneloop_trainer.evaluation import scoring

    answers = {}
    for name, suite in suites.items():
        places = list(range(len(suite.items)))[:ASKED]
        if not has_labels(suite):
            places = list(islice((place for place in range(len(suite.items)) if _is_askable(suite, place)), SAMPLE))
        if places:
            done = progress.counter("Answering", len(places))
            prompts = [suite.encoded[place].prompt for place in places]
            greedy = scoring.greedy_answers(model, prompts, answer_tokens(suite), stops, done)
            answers[name] = {place: _answer(formatter, one) for place, one in zip(places, greedy, strict=True)}
    return answers


def _is_askable(suite: PreparedSuite, place: int) -> bool:
    """Whether a user's message of a usual length becomes the item's prompt, once the gateway has applied the version's template."""
    item, tokens = suite.items[place], len(suite.encoded[place].prompt)
    if item.system is not None or not item.user or len(item.user) > MAX_CHARACTERS:
        return False
    return 0 < tokens <= suite.limit - MAX_ANSWER_TOKENS and served_prompt(suite.objective.config, item.user) == item.prompt


def _answer(formatter: Formatter, greedy: Greedy) -> Answer:
    steps = next((step for step, lead in enumerate(greedy.leads) if lead < MARGIN), len(greedy.leads))
    beginning = formatter.decode(greedy.tokens[:steps])
    return Answer(formatter.decode(greedy.tokens), steps == len(greedy.leads), beginning, steps)


def answer_tokens(suite: PreparedSuite) -> int:
    """Tokens for a free answer: the longest label's, its end included."""
    return min(MAX_ANSWER_TOKENS, suite.longest_label) if has_labels(suite) else MAX_ANSWER_TOKENS


def parse_rate(suite: PreparedSuite, answers: dict[int, Answer] | None) -> float | None:
    """The share of free answers that are a label at all; None where there are no labels, or no answers."""
    if not answers or not has_labels(suite):
        return None
    counted = list(answers.values())[:SAMPLE]
    return round(sum(answer.text in suite.labels for answer in counted) / len(counted), 5)


def probes_of(chosen: tuple[Gate, ...], suites: dict[str, PreparedSuite], scores: dict[str, SuiteScores], answers: Answers) -> list[Probe]:
    """Of the first gate's suite that has any, else of the first suite that has."""
    for name in (*(gate.suite for gate in chosen), *suites):
        if probes := _probes(suites[name], scores[name], answers.get(name, {})):
            return probes[:MAX_PROBES]
    return []


def _probes(suite: PreparedSuite, scores: SuiteScores, answers: dict[int, Answer]) -> list[Probe]:
    probes = []
    for place, answer in answers.items():
        user = suite.items[place].user
        if user is None or not _is_askable(suite, place):
            continue
        if not has_labels(suite):
            if answer.beginning and BROKEN not in answer.beginning:
                probes.append(Probe(prompt=user, answer=answer.beginning, max_tokens=answer.steps))
        elif answer.is_sure and _lead(scores.label_scores[place]) >= MARGIN:
            probes.append(Probe(prompt=user, answer=answer.text, max_tokens=answer_tokens(suite)))
    return probes


def _lead(scores: tuple[float, ...]) -> float:
    second, best = sorted(scores)[-2:]
    return best - second
