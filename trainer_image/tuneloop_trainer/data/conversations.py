"""Reads a row's conversation: turns with a role and a text, of which the assistant's are learned."""

from __future__ import annotations

from dataclasses import dataclass

from tuneloop_trainer.chat import Turn

MAX_TURNS = 200
ROLES = ("system", "user", "assistant")
CALLS = ("tool_calls", "function_call")


class Unusable(Exception):
    """The row cannot be used. `reason` is what it is dropped as; the text is for the message."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Conversation:
    """Up to the last answer that is learned: what comes behind it teaches nothing."""

    system: str | None
    history: tuple[Turn, ...]
    """Between the system turn and the last question."""
    prompt: str
    completion: str


def read_conversation(value: object) -> Conversation:
    """A list of {role, content}, an assistant's with `weight: 0` where it is not to be learned. Raises Unusable."""
    if not isinstance(value, list):
        raise Unusable("MissingValue", f"{_kind(value)} where a list of turns is needed")
    if len(value) > MAX_TURNS:
        raise Unusable("TooLong", f"{len(value)} turns, more than {MAX_TURNS}")
    turns = [_turn(number, one) for number, one in enumerate(value, 1)]
    learned = [place for place, turn in enumerate(turns) if turn.learned]
    if not learned:
        raise Unusable("NoSupervisedToken", "no assistant's turn to learn")
    turns = turns[: learned[-1] + 1]
    for place, turn in enumerate(turns):
        if turn.role == "system" and place > 0:
            raise Unusable("Malformed", f"a system turn, number {place + 1}, that is not the first")
        if turn.role == "assistant" and (place == 0 or turns[place - 1].role != "user"):
            raise Unusable("Malformed", f"an assistant's turn, number {place + 1}, that does not follow a user's")
    system = turns.pop(0).content if turns[0].role == "system" else None
    *history, asked, answer = turns
    return Conversation(system, tuple(history), asked.content, answer.content)


def _turn(number: int, value: object) -> Turn:
    if not isinstance(value, dict):
        raise Unusable("Malformed", f"{_kind(value)} as turn {number}, where role and content are needed")
    role, content, weight = value.get("role"), value.get("content"), value.get("weight")
    if role not in ROLES:
        raise Unusable("Malformed", f"turn {number} of the role {str(role)[:20]!r}; known are {', '.join(ROLES)}")
    if any(value.get(name) for name in CALLS):
        raise Unusable("Malformed", f"turn {number} that calls tools, which are not read")
    if not isinstance(content, str):
        raise Unusable("Malformed", f"turn {number} without a text as its content")
    if not content.strip():
        raise Unusable("Empty", f"turn {number} with an empty content")
    if weight not in (None, 0, 1) or (role != "assistant" and weight == 1):
        raise Unusable("Malformed", f"turn {number} with a weight other than 0 or 1, or of 1 where nothing is learned")
    return Turn(str(role), content, role == "assistant" and weight != 0)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
