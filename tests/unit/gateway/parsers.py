"""What reads bytes that others wrote, each as a function of bytes that must return; run as a program, libFuzzer looks for some that do not.

`python parsers.py NAME -runs=N ...` (options are libFuzzer's).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["tuneloop_gateway"]):
        for module in ("engine_guard", "feedback", "probes"):
            importlib.import_module(f"tuneloop_gateway.{module}")

from pydantic import ValidationError

from tuneloop_gateway.answers import StreamStart, is_abort, read_answer
from tuneloop_gateway.canonical import canonical
from tuneloop_gateway.engine_guard import MANIFEST, Mismatch, verify
from tuneloop_gateway.errors import Refused
from tuneloop_gateway.feedback import _rating
from tuneloop_gateway.inbound import CHAT_PATH, COMPLETION_PATH, parse_inbound, parse_object, session_of
from tuneloop_gateway.keys import bearer
from tuneloop_gateway.probes import _ITEMS, _TEXTS
from tuneloop_gateway.tokens import FeedbackToken, sign
from tuneloop_gateway.tokens import verify as verify_token
from tuneloop_gateway.usage import UsageFilter

KEY = b"key"


def bodies(raw: bytes) -> None:
    """As whole bodies, and as what stands in the place of messages and of prompts, so that more of them come through."""
    wrapped = [b'{"model":"m",' + raw, b'{"model":"m","messages":[{"role":"user","content":' + raw, b'{"model":"m","prompt":' + raw + b"}"]
    for body in (raw, *wrapped):
        for path in (CHAT_PATH, COMPLETION_PATH):
            try:
                inbound = parse_inbound(body, path, "m")
            except Refused:
                continue
            assert json.dumps(inbound.body, ensure_ascii=False).encode()
            session_of(inbound, "subject", "")


def answers(raw: bytes) -> None:
    for body in (raw, b'{"choices":[' + raw + b"]}", b'data: {"choices":[{"index":0,"delta":' + raw + b"}]}\n\n"):
        for stream in (False, True):
            answer = read_answer(body, stream=stream)
            assert isinstance(answer.text, str)
            assert float(answer.prompt_tokens + answer.completion_tokens) >= 0
        is_abort(body)


def streams(raw: bytes) -> None:
    """In pieces: what goes on to the client is what came, but for whole events."""
    start, usage = StreamStart(), UsageFilter()
    passed = b""
    size = 1 + len(raw) // 7
    for place in range(0, len(raw), size):
        start.feed(raw[place : place + size])
        passed += usage.feed(raw[place : place + size])
    passed += usage.end()
    assert bytes(start.held) == raw
    assert passed == raw or b'"usage"' in raw


def tokens(raw: bytes) -> None:
    text = raw.decode("utf-8", "surrogateescape")
    assert verify_token(text, KEY, now=0, max_age_seconds=1) is None
    bearer(text)
    signed = sign(FeedbackToken("r1", "s", 0), KEY)
    changed = signed[: len(raw) % len(signed)] + text
    assert changed == signed or verify_token(changed, KEY, now=0, max_age_seconds=1) is None


def feedback(raw: bytes) -> None:
    try:
        _rating(parse_object(raw))
    except Refused:
        return


def texts(raw: bytes) -> None:
    text = raw.decode("utf-8", "surrogateescape")
    once = canonical(text, redact=True)
    assert once.encode() is not None
    assert canonical(once, redact=False) == once


def recorded(raw: bytes) -> None:
    """Probes, and the sample of the training's inputs."""
    for adapter in (_ITEMS, _TEXTS):
        try:
            adapter.validate_json(raw)
        except ValidationError:
            continue


def manifests(raw: bytes) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        (folder / MANIFEST).write_bytes(raw)
        try:
            canonical_form = json.dumps(json.loads(raw), sort_keys=True, separators=(",", ":")).encode()
        except (ValueError, RecursionError):
            canonical_form = raw
        try:
            verify(folder, "sha256:" + hashlib.sha256(canonical_form).hexdigest())
        except (Mismatch, OSError):
            return
        raise AssertionError("An empty folder is no model.")


PARSERS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function for function in (bodies, answers, streams, tokens, feedback, texts, recorded, manifests)
}

if __name__ == "__main__":
    atheris.Setup([sys.argv[0], *sys.argv[2:]], PARSERS[sys.argv[1]])
    atheris.Fuzz()
