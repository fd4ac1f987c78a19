"""`tuneloop usage` against a server that plays a gateway's internal port."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import unused_port
from tests.unit.cli.servers import serving

from tuneloop_operator.cli import main

ROWS = [
    {"day": "2026-01-02", "key": "team-b", "subject": "b" * 24, "requests": 1, "failed": 0, "promptTokens": 10, "completionTokens": 5},
    {"day": "2026-01-01", "key": None, "subject": "c" * 24, "requests": 2, "failed": 3, "promptTokens": 3, "completionTokens": 4},
    {"day": "2026-01-02", "key": "anonymous", "subject": "a" * 24, "requests": 1200, "failed": 0, "promptTokens": 7, "completionTokens": 1},
]


class Play:
    def __init__(self) -> None:
        self.port, self.asked, self.rows = unused_port(), list[str](), ROWS

    async def usage(self, request: web.Request) -> web.Response:
        self.asked.append(f"{request.query['since']} {request.query['until']}")
        return web.Response(text="".join(json.dumps(row) + "\n" for row in self.rows))


@pytest.fixture
def play() -> Iterator[Play]:
    played = Play()
    with serving(web.get("/internal/usage", played.usage), port=played.port):
        yield played


def usage(play: Play, folder: Path, *arguments: str) -> int:
    (folder / "token").write_text("good")
    return main(["usage", "sentiment", *arguments, "--url", f"http://127.0.0.1:{play.port}", "--token-file", str(folder / "token")])


def test_days_and_keys_are_a_table(play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert usage(play, tmp_path, "--since", "2026-01-01", "--until", "2026-01-31") == 0
    out, err = capsys.readouterr()
    assert out == (
        "DAY         KEY                         REQUESTS  FAILED  PROMPT  COMPLETION\n"
        "2026-01-01  (cccccccccccccccccccccccc)         2       3       3           4\n"
        "2026-01-02  anonymous                      1,200       0       7           1\n"
        "2026-01-02  team-b                             1       0      10           5\n"
    )
    assert err == "2026-01-01 to 2026-01-31: 1,203 requests, 3 failed, 30 tokens of 3 keys.\n"
    assert play.asked == ["2026-01-01 2026-01-31"]


def test_or_csv(play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert usage(play, tmp_path, "--output", "csv") == 0
    assert capsys.readouterr().out.splitlines() == [
        "day,key,subject,requests,failed,prompt_tokens,completion_tokens",
        f"2026-01-01,,{'c' * 24},2,3,3,4",
        f"2026-01-02,anonymous,{'a' * 24},1200,0,7,1",
        f"2026-01-02,team-b,{'b' * 24},1,0,10,5",
    ]
    since, until = play.asked[0].split()
    assert since.endswith("-01")
    assert since[:8] == until[:8]


def test_or_json_lines(play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert usage(play, tmp_path, "--output", "json") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == sorted(ROWS, key=lambda r: (r["day"], r["subject"]))


def test_a_wrong_day_and_a_strange_answer_are_failures(play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        usage(play, tmp_path, "--since", "January")
    assert "is no day, as in 2026-01-31" in capsys.readouterr().err
    play.rows = [{"day": "2026-01-01"}]
    assert usage(play, tmp_path) == 1
    assert "not the usage of this version" in capsys.readouterr().err
