"""Whatever bytes come, what reads them returns or refuses: no other error, no hang, no growth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.gateway import parsers

# Pieces that parsers look at, so that bytes are not all refused at the first.
_WORDS = """
" \\ [ ] { } : , . null true -1 1e999 NaN data: [DONE] \\ud83d @ :: 1.2.3.4 DE89 Bearer \u0130\u212a\u017f\u0131 \U0001f600 "choices":[
"index":0 "delta":{ "content": "finish_reason":"abort" "usage":{ "prompt_tokens": "model":"m" "messages":[ "role":"user" "prompt":
"stop": "rating": "thumbs":"up" "regex":"(a{999}){999}" {"files":[{"path": "size": "sha256": "prompt":"x","answer":"y","maxTokens":
"""
PIECES = [word.encode() for word in _WORDS.split()]
PIECES += [b"\n", b"\r\n", b"data: ", b"\xff\xfe", b"\x00", b"3704 0044 0532 0130 00", b"9" * 400, b"[" * 70]
SEEDS = [
    b'"messages":[{"role":"user","content":[{"type":"text","text":"x"}]}],"n":2,"stop":["a"],"logit_bias":{"1":2}}',
    b'"structured_outputs":{"json":{"pattern":"a{3}","items":{"minItems":3}}},"prompt":["a","b"]}',
    b'"hi"}]}',
    b"[1,2]",
    b'{"content":"a"},"finish_reason":"stop"',
    b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\ndata: [DONE]\n\n',
    b'{"rating":4}',
    b'{"files":[{"path":"a","size":1,"sha256":"b"}]}',
    b'[{"prompt":"a","answer":"b","maxTokens":1}]',
    b"Call +49 30 1234567 or mail a.b@c.de, DE89 3704 0044 0532 0130 00",
]
"""What they take, for libFuzzer to start from."""
BYTES = st.lists(st.sampled_from(PIECES) | st.binary(max_size=8), max_size=24).map(b"".join)


@pytest.mark.parametrize("name", parsers.PARSERS)
def test_any_bytes_are_read_or_refused(name: str) -> None:
    @settings(max_examples=120, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(BYTES)
    def read(raw: bytes) -> None:
        parsers.PARSERS[name](raw)

    read()


@pytest.mark.long
@pytest.mark.parametrize("name", parsers.PARSERS)
def test_libfuzzer_finds_no_bytes_that_end_hang_or_fill_it(name: str, tmp_path: Path) -> None:
    """Guided by which branches were taken. An input that takes 5 s, or 512 MiB in all, ends it with an error."""
    dictionary = tmp_path / "dictionary"
    dictionary.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in piece) + '"\n' for piece in PIECES if len(piece) < 64))
    (tmp_path / "corpus").mkdir()
    for number, seed in enumerate(SEEDS):
        (tmp_path / "corpus" / str(number)).write_bytes(seed)
    runs = 5000 if name == "manifests" else 200_000
    limits = ["-timeout=5", "-rss_limit_mb=512", "-max_len=2048", f"-runs={runs}", "-seed=1"]
    files = [f"-dict={dictionary}", f"-artifact_prefix={tmp_path}/", str(tmp_path / "corpus")]
    done = subprocess.run([sys.executable, parsers.__file__, name, *limits, *files], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Done {runs} runs" in done.stderr
