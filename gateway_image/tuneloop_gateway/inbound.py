"""A client's completion request: read within limits, parsed once, and what it says to the model."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final, Literal

from aiohttp import web

from tuneloop_gateway.errors import Refused, invalid

MAX_DEPTH = 64
MAX_CHOICES = 16
MAX_MESSAGES = 2048
BODY_SECONDS = 30.0
CHAT_PATH: Final = "/v1/chat/completions"
COMPLETION_PATH: Final = "/v1/completions"

Json = dict[str, Any]  # a client's JSON object: its fields are checked where they are used, all others go to the engine as they are


@dataclass(frozen=True)
class Inbound:
    """One parsed request. `text` is the last user message (chat) or the prompt (completions), as the user wrote it."""

    path: Literal["/v1/chat/completions", "/v1/completions"]
    body: Json
    text: str
    stream: bool


async def read_body(request: web.BaseRequest, limit: int) -> bytes:
    """The body, or Refused 413 as soon as it is longer than `limit`, or 408 where it comes too slowly."""
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(limit)
    content = request.content
    try:
        async with asyncio.timeout(BODY_SECONDS):
            first = await content.readany()
            if content.at_eof() and len(first) <= limit:
                return first
            parts, size = [first], len(first)
            while size <= limit:
                part = await content.readany()
                if not part and content.at_eof():
                    return b"".join(parts)
                parts.append(part)
                size += len(part)
    except TimeoutError:
        raise Refused(408, f"The request body did not arrive within {BODY_SECONDS:.0f} seconds.", code="body_timeout") from None
    raise _too_large(limit)


def _too_large(limit: int) -> Refused:
    return Refused(413, f"The request body is larger than {limit} bytes.", code="request_too_large")


def parse_object(raw: bytes) -> Json:
    """A JSON object of bounded depth."""
    try:
        if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
            _check_depth(raw)
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise invalid("The request body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise invalid("The request body must be a JSON object.")
    return body


def _check_depth(raw: bytes) -> None:
    """Counts brackets outside strings: cheaper than parsing what may be built to be expensive."""
    depth, in_string, escaped = 0, False, False
    for byte in raw:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise invalid(f"The request body is nested deeper than {MAX_DEPTH} levels.")
        elif byte in b"]}":
            depth -= 1


def parse_inbound(raw: bytes, path: str, model: str) -> Inbound:
    """Checks what the gateway itself relies on; the engine checks the rest."""
    body = parse_object(raw)
    name = body.get("model")
    if not isinstance(name, str) or not name:
        raise invalid("You must name a model in the field 'model'.", "model")
    if name != model:
        raise Refused(404, f"The model '{name[:100]}' does not exist here; use '{model}'.", code="model_not_found", param="model")
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise invalid("'stream' must be true or false.", "stream")
    for field in ("n", "best_of"):
        count = body.get(field)
        if count is not None and not (type(count) is int and 1 <= count <= MAX_CHOICES):
            raise invalid(f"'{field}' must be a whole number from 1 to {MAX_CHOICES}.", field)
    if path == CHAT_PATH:
        return Inbound(CHAT_PATH, body, _last_user_text(body), bool(stream))
    return Inbound(COMPLETION_PATH, body, _prompt_text(body), bool(stream))


def _last_user_text(body: Json) -> str:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("'messages' must be a list with at least one message.", "messages")
    if len(messages) > MAX_MESSAGES:
        raise invalid(f"'messages' has more than {MAX_MESSAGES} items.", "messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise invalid("Every item of 'messages' must be an object with a 'role'.", "messages")
    message = last_user_message(messages)
    return content_text(message.get("content")) if message else ""


def last_user_message(messages: list[Json]) -> Json | None:
    """The message that prompts are applied to."""
    return next((m for m in reversed(messages) if m["role"] == "user"), None)


def session_of(inbound: Inbound, subject: str, named: str) -> str:
    """What the caller calls its session; else all that begins with the same user message is one."""
    if named:
        return _digest(f"{subject} named {named}")
    messages = inbound.body.get("messages")
    first = next((m for m in messages if m["role"] == "user"), None) if isinstance(messages, list) else None
    begins = content_text(first.get("content")) if first is not None else inbound.text
    return _digest(f"{subject} begins {begins}")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def content_text(content: Any) -> str:
    """The text of a message: a string, or the text parts of a list."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = (p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text")
        return "\n".join(t for t in texts if isinstance(t, str))
    return ""


def _prompt_text(body: Json) -> str:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and len(prompt) <= MAX_MESSAGES:
        return "\n".join(p for p in prompt if isinstance(p, str))
    if isinstance(prompt, list) and prompt and all(type(p) is int for p in prompt):
        return ""  # token ids of one prompt
    raise invalid("'prompt' must be a string or a list.", "prompt")
