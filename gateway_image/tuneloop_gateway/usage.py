"""Tokens of a stream whose client did not ask for them: the engine is asked to tell, the client does not see it."""

from __future__ import annotations

import json
import re

from tuneloop_gateway.inbound import Json

MAX_HELD_BYTES = 256 << 10
_AFTER_EVENT = re.compile(rb"(?<=\n\n)|(?<=\n\r\n)")


def asks_for_usage(body: Json) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def with_usage(body: Json) -> Json:
    """The request, with the engine told to end its stream with the tokens used."""
    options = body.get("stream_options")
    return {**body, "stream_options": {**(options if isinstance(options, dict) else {}), "include_usage": True}}


class UsageFilter:
    """Passes a stream's events on as they are complete, but for the one that holds nothing but the usage."""

    def __init__(self) -> None:
        self._held = b""
        self.events = 0

    def feed(self, chunk: bytes) -> bytes:
        """What may go on to the client."""
        if not self._held and chunk.endswith(b"\n\n") and b'"usage"' not in chunk:
            self.events += chunk.count(b"\n\n")
            return chunk  # nearly all of them
        *events, self._held = _AFTER_EVENT.split(self._held + chunk)
        self.events += len(events)
        if len(self._held) > MAX_HELD_BYTES:
            events.append(self.end())
        return b"".join(event for event in events if not _is_usage_alone(event))

    def end(self) -> bytes:
        rest, self._held = self._held, b""
        return rest


def _is_usage_alone(event: bytes) -> bool:
    if b'"usage"' not in event:
        return False
    try:
        body = json.loads(event.strip().removeprefix(b"data:"))
    except (ValueError, RecursionError):
        return False
    return isinstance(body, dict) and body.get("choices") == [] and isinstance(body.get("usage"), dict)
