"""`tuneloop forget` against a server that plays a gateway's internal port."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import unused_port
from tests.unit.cli.servers import serving

from tuneloop_operator.cli import main


class Play:
    """A gateway's internal port that remembers whom it was to forget."""

    def __init__(self) -> None:
        self.port, self.asked = unused_port(), list[object]()
        self.answer: dict[str, object] = {"subject": "0" * 24, "captured": 3, "feedback": 1, "labels": 2, "corrections": 0}

    async def forget(self, request: web.Request) -> web.Response:
        if request.headers.get("x-tuneloop-token") != "good":
            return web.json_response({"error": {"message": "no token"}}, status=401)
        self.asked.append(await request.json())
        return web.json_response(self.answer)


@pytest.fixture
def play() -> Iterator[Play]:
    played = Play()
    with serving(web.post("/internal/forget", played.forget), port=played.port):
        yield played


def forget(play: Play, folder: Path, *arguments: str, token: str = "good") -> int:
    (folder / "token").write_text(token)
    return main(["forget", "sentiment", *arguments, "--url", f"http://127.0.0.1:{play.port}", "--token-file", str(folder / "token")])


def test_a_key_is_forgotten_and_the_receipt_printed(play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert forget(play, tmp_path, "--key", "ann") == 0
    assert play.asked == [{"key": "ann"}]
    out, err = capsys.readouterr()
    assert json.loads(out) == play.answer
    assert err == "6 rows deleted. Models that learnt from its labels and corrections keep what they learnt.\n"


def test_a_subject_may_be_named_by_its_pseudonym_alone(play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert forget(play, tmp_path, "--subject", "ab" * 12) == 0
    assert play.asked == [{"subject": "ab" * 12}]
    assert forget(play, tmp_path, "--subject", "ann") == 1
    assert "--subject: String should match pattern" in capsys.readouterr().err
    assert len(play.asked) == 1


def test_a_wrong_token_and_a_strange_answer_are_failures(play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert forget(play, tmp_path, "--key", "ann", token="bad") == 1
    assert "refuses the internal token (401)" in capsys.readouterr().err
    play.answer = {"deleted": 6}
    assert forget(play, tmp_path, "--key", "ann") == 1
    assert "not the receipt of this version" in capsys.readouterr().err


def test_somebody_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["forget", "sentiment"])
    assert "one of the arguments --key --subject is required" in capsys.readouterr().err
