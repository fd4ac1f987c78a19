"""A client's completion request: read within limits, parsed once, and what it says to the model."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Final, Literal

from aiohttp import web

from tuneloop_gateway.errors import Refused, invalid
from tuneloop_gateway.fields import ChatRequest, CompletionRequest, check_fields

MAX_DEPTH = 64
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


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SQUARE = bytes.maketrans(b"{}", b"[]")
_HALF_A_PAIR = b"\\ud"


def parse_object(raw: bytes) -> Json:
    """A JSON object in UTF-8, of bounded depth."""
    try:
        text = raw.decode()
        if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
            _check_depth(raw)
        body = _DECODER.decode(text)
    except (ValueError, RecursionError):
        raise invalid("The request body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise invalid("The request body must be a JSON object.")
    return body


def _check_depth(raw: bytes) -> None:
    """Takes strings out and then pair after pair, level by level: cheaper than parsing what may be built to be expensive."""
    brackets = _STRING.sub(b"", raw).translate(_SQUARE, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    if b"[" in brackets:
        raise invalid(f"The request body is nested deeper than {MAX_DEPTH} levels, or not valid JSON.")


def parse_inbound(raw: bytes, path: str, model: str) -> Inbound:
    """Refuses what may not reach an engine; the engine checks the rest."""
    body = parse_object(raw)
    name = body.get("model")
    if not isinstance(name, str) or not name:
        raise invalid("You must name a model in the field 'model'.", "model")
    if name != model:
        raise Refused(404, f"The model '{name[:100]}' does not exist here; use '{model}'.", code="model_not_found", param="model")
    check_fields(body, ChatRequest if path == CHAT_PATH else CompletionRequest)
    if _HALF_A_PAIR in raw.lower():
        _require_whole_characters(body)
    stream = bool(body.get("stream"))
    if path == CHAT_PATH:
        message = last_user_message(body["messages"])
        return Inbound(CHAT_PATH, body, content_text(message.get("content")) if message else "", stream)
    return Inbound(COMPLETION_PATH, body, _prompt_text(body["prompt"]), stream)


def _require_whole_characters(body: Json) -> None:
    """Half a surrogate pair is no text in UTF-8: tokenizers end with an error of the engine's."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise invalid("The request has half a surrogate pair in a text.") from None


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


def _prompt_text(prompt: str | list[Any]) -> str:
    """All texts of it; token ids say nothing here."""
    return prompt if isinstance(prompt, str) else "\n".join(p for p in prompt if isinstance(p, str))
