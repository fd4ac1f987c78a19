"""What an engine answered: text, finish reason and tokens, from JSON or from a stream of events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

ABORT = "abort"
ENGINE_DIED = "EngineCore encountered an issue"
"""So vLLM's server begins to tell, as an error, that the process that computes has died. It ends itself a few seconds later."""
MAX_TOKENS = 1 << 40
MAX_HELD_BYTES = 64 * 1024
"""A stream whose first events say nothing for so long is let go."""


@dataclass(frozen=True)
class Answer:
    """The first choice of an answer."""

    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


def read_answer(raw: bytes, *, stream: bool) -> Answer:
    """Never raises: an answer that is not understood is empty."""
    try:
        return _from_events(raw) if stream else _from_json(json.loads(raw))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return Answer()


def is_abort(raw: bytes) -> bool:
    """True where the engine gave up on a request that was not streamed."""
    return b'"abort"' in raw and read_answer(raw, stream=False).finish_reason == ABORT


def is_death(raw: bytes) -> bool:
    """True where an engine's error, or an event of its stream, says that its process has died."""
    if ENGINE_DIED.encode() not in raw:
        return False
    try:
        return _tells_death(json.loads(raw))
    except (ValueError, RecursionError):
        return False


def _tells_death(body: Any) -> bool:
    error = body.get("error") if isinstance(body, dict) else None
    return isinstance(error, dict) and _string(error.get("message")).startswith(ENGINE_DIED)


def _from_json(body: dict[str, Any]) -> Answer:
    choice = body["choices"][0]
    message = choice.get("message")
    text = message.get("content") if message is not None else choice.get("text")
    return Answer(_string(text), _string(choice.get("finish_reason")), *_usage(body.get("usage")))


def _from_events(raw: bytes) -> Answer:
    parts: list[str] = []
    reason, usage = "", (0, 0)
    for event in _events(raw):
        if event.get("error"):
            reason = "error"
        if event.get("usage"):
            usage = _usage(event["usage"])
        for choice in event.get("choices") or ():
            if choice.get("index", 0) == 0:
                delta = choice.get("delta")
                parts.append(_string(delta.get("content") if delta is not None else choice.get("text")))
                reason = _string(choice.get("finish_reason")) or reason
    return Answer("".join(parts), reason, *usage)


def _events(raw: bytes) -> Iterator[dict[str, Any]]:
    for line in raw.splitlines():
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data.startswith(b"{"):
                try:
                    yield json.loads(data)
                except ValueError:
                    continue  # cut off


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _usage(usage: Any) -> tuple[int, int]:
    if not isinstance(usage, dict):
        return 0, 0
    return _tokens(usage.get("prompt_tokens")), _tokens(usage.get("completion_tokens"))


def _tokens(count: Any) -> int:
    return count if type(count) is int and 0 < count <= MAX_TOKENS else 0


class Opening(Enum):
    """What the first bytes of a stream say."""

    UNDECIDED = 0
    ANSWERING = 1
    ABORTED = 2
    DIED = 3


class StreamStart:
    """Holds the start of a stream until it shows whether the engine answers or gives up."""

    def __init__(self) -> None:
        self.held = bytearray()
        self._read = 0

    def feed(self, chunk: bytes) -> Opening:
        """Looks at the complete events so far."""
        self.held += chunk
        if len(self.held) > MAX_HELD_BYTES:
            return Opening.ANSWERING
        end = self.held.rfind(b"\n")
        if end < self._read:
            return Opening.UNDECIDED
        complete, self._read = bytes(self.held[self._read : end + 1]), end + 1
        for line in complete.splitlines():
            opening = _line_says(line)
            if opening is not Opening.UNDECIDED:
                return opening
        return Opening.UNDECIDED


def _line_says(line: bytes) -> Opening:
    if not line.startswith(b"data:"):
        return Opening.UNDECIDED
    try:
        event = json.loads(line[5:])
        if _tells_death(event):
            return Opening.DIED
        for choice in event["choices"]:
            reason = choice.get("finish_reason")
            delta = choice.get("delta")
            says = choice.get("text") if delta is None else any(value for key, value in delta.items() if key != "role")
            if says or (reason and reason != ABORT):
                return Opening.ANSWERING
            if reason == ABORT:
                return Opening.ABORTED
        # A usage event without choices, or a role without content yet.
        return Opening.UNDECIDED
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return Opening.ANSWERING  # [DONE], an error event, or nothing we know: the client shall see it
