"""The usage of a stream is hidden from who did not ask for it, and nothing else."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneloop_gateway.usage import MAX_HELD_BYTES, UsageFilter, asks_for_usage, with_usage

CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"\\"usage\\":"}}]}'
USAGE = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}'
BOTH = b'data: {"choices":[{"index":0,"delta":{}}],"usage":{"prompt_tokens":7}}'
DONE = b"data: [DONE]"


def pieces(text: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(text), *(cut % len(text) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(places)]


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
@given(cuts=st.lists(st.integers(0, 10_000), max_size=12))
def test_the_event_of_the_usage_alone_is_left_out_however_the_stream_is_cut(end: bytes, cuts: list[int]) -> None:
    shown = UsageFilter()
    events = [CHUNK, BOTH, b": a comment", USAGE, DONE]
    out = b"".join(shown.feed(piece) for piece in pieces(end.join([*events, b""]), cuts)) + shown.end()
    assert out == end.join([CHUNK, BOTH, b": a comment", DONE, b""])
    assert shown.events == len(events)


def test_an_event_goes_on_as_soon_as_it_is_complete() -> None:
    shown = UsageFilter()
    assert shown.feed(CHUNK + b"\n") == b""
    assert shown.feed(b"\n" + CHUNK[:5]) == CHUNK + b"\n\n"
    assert shown.end() == CHUNK[:5]


def test_what_never_ends_is_let_go() -> None:
    shown = UsageFilter()
    assert shown.feed(b"x" * (MAX_HELD_BYTES + 1)) == b"x" * (MAX_HELD_BYTES + 1)


@pytest.mark.parametrize(
    ("options", "asks"), [(None, False), ({}, False), ({"include_usage": False}, False), ({"include_usage": True}, True), ("x", False)]
)
def test_who_asks_for_the_usage(options: object, asks: bool) -> None:
    body = {"stream": True} if options is None else {"stream": True, "stream_options": options}
    assert asks_for_usage(body) is asks
    assert asks_for_usage(with_usage(body))
