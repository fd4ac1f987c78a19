"""`tuneloop label` against a server that plays the API server and its proxy to the gateway."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from tuneloop_gateway.contract import LabelRow
from tuneloop_operator.cli import labels, main
from tuneloop_operator.cli.errors import Failure

TOKEN = "the-internal-token"
PROXY = "/api/v1/namespaces/team/services/sentiment:internal/proxy/internal/labels"


@dataclass
class Play:
    """What the server answers, and what it was asked."""

    url: str = ""
    rows: list[dict[str, str]] = field(default_factory=list)
    refuse: tuple[int, dict[str, object]] | None = None
    queries: list[dict[str, str]] = field(default_factory=list)
    posts: list[list[dict[str, str]]] = field(default_factory=list)


def application(play: Play) -> web.Application:
    async def secret(_: web.Request) -> web.Response:
        if play.refuse:
            return web.json_response(play.refuse[1], status=play.refuse[0])
        return web.json_response({"data": {"internal-token": base64.b64encode(TOKEN.encode()).decode()}})

    def is_known(request: web.Request) -> bool:
        return request.headers.get("x-tuneloop-token") == TOKEN

    async def export(request: web.Request) -> web.Response:
        if not is_known(request):
            return web.json_response({"error": {"message": "no token"}}, status=401)
        play.queries.append(dict(request.query))
        return web.Response(text="".join(json.dumps(row) + "\n" for row in play.rows))

    async def receive(request: web.Request) -> web.Response:
        if not is_known(request):
            return web.json_response({"error": {"message": "no token"}}, status=401)
        rows = [json.loads(line) for line in (await request.text()).splitlines()]
        play.posts.append(rows)
        known = len(rows) - 1
        return web.json_response({"accepted": known, "unknown": 1, "train": known // 2, "gate": known - known // 2})

    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/api/v1/namespaces/team/secrets/sentiment-keys", secret)
    for path in (PROXY, "/internal/labels"):
        app.router.add_get(path, export)
        app.router.add_post(path, receive)
    return app


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    script = Play(rows=[{"id": f"r{n}", "text": f"text {n}", "answer": "positive", "capturedAt": "2026-01-01T00:00:00Z"} for n in range(3)])
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = web.AppRunner(application(script))

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(runner.addresses[0][1])

    port = asyncio.run_coroutine_threadsafe(start(), loop).result(5)
    script.url = f"http://127.0.0.1:{port}"
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        json.dumps(
            {
                "current-context": "here",
                "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
                "clusters": [{"name": "c", "cluster": {"server": script.url}}],
                "users": [{"name": "u", "user": {"token": "mine"}}],
            }
        )
    )
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    yield script
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_export_writes_rows_with_a_place_for_the_label(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label", "export", "-n", "team", "sentiment", "--uniform", "--limit", "50"]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows == [{**row, "label": ""} for row in play.rows]
    assert play.queries == [{"limit": "50", "uniform": "1"}]
    assert "3 rows exported" in err


def test_the_namespace_is_the_kubeconfigs_where_none_is_given(play: Play, tmp_path: Path) -> None:
    target = tmp_path / "rows.jsonl"
    assert main(["label", "export", "sentiment", "-o", str(target)]) == 0
    assert len(target.read_text().splitlines()) == 3
    assert play.queries == [{"limit": "1000", "uniform": "0"}]


def test_import_sends_labelled_rows_alone_and_adds_up_the_receipts(
    play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "ROWS_PER_REQUEST", 3)
    exported = [{"id": f"r{n}", "text": "t", "answer": "a", "capturedAt": "", "label": "negative"} for n in range(7)]
    file = write(tmp_path / "labels.jsonl", *exported, {"id": "r9", "label": " "}, {"id": "r10", "document": "d"})
    assert main(["label", "import", "-n", "team", "sentiment", file]) == 0
    assert [len(post) for post in play.posts] == [3, 3, 1]
    assert play.posts[0][0] == {"id": "r0", "label": "negative"}
    out, err = capsys.readouterr()
    assert json.loads(out) == {"accepted": 4, "unknown": 3, "train": 2, "gate": 2}
    assert "6 of 7 labels sent" in err
    assert "2 rows without a label passed over" in err


def test_the_document_of_a_row_goes_along(play: Play, tmp_path: Path) -> None:
    file = write(tmp_path / "labels.jsonl", {"id": "r0", "label": "x", "document": "d7"})
    assert main(["label", "import", "sentiment", file]) == 0
    assert play.posts == [[{"id": "r0", "label": "x", "document": "d7"}]]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"id": "r1", "label": "x"', "labels.jsonl:2 is no JSON"),
        ("[1]", "labels.jsonl:2 is no JSON object."),
        ('{"label": "x"}', "labels.jsonl:2: id: Field required."),
        ('{"id": "r1", "label": 7}', "labels.jsonl:2: label: Input should be a valid string."),
    ],
)
def test_one_bad_row_is_named_and_nothing_is_sent(
    play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, sentence: str
) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text('{"id": "r0", "label": "x"}\n' + line + "\n")
    assert main(["label", "import", "sentiment", str(file)]) == 1
    assert sentence in capsys.readouterr().err
    assert play.posts == []


def test_a_file_without_any_label_is_refused(play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label", "import", "sentiment", write(tmp_path / "none.jsonl", {"id": "r0", "label": ""})]) == 1
    assert "has no row with a label (1 without)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("refuse", "sentence"),
    [
        ((403, {"kind": "Status", "message": "secrets is forbidden"}), "403: secrets is forbidden. Reading the Secret"),
        ((404, {"kind": "Status", "message": 'secrets "sentiment-keys" not found'}), "Is the name that of a ModelDeployment"),
        ((503, {"kind": "Status", "message": "no endpoints available"}), "Is the gateway's pod ready?"),
    ],
)
def test_refusals_of_the_api_server_come_with_a_hint(
    play: Play, capsys: pytest.CaptureFixture[str], refuse: tuple[int, dict[str, object]], sentence: str
) -> None:
    play.refuse = refuse
    assert main(["label", "export", "-n", "team", "sentiment"]) == 1
    out, err = capsys.readouterr()
    assert sentence in err
    assert out == ""


def test_a_url_needs_no_cluster(play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    assert main(["label", "export", "sentiment", "--url", play.url, "--token-file", str(token)]) == 0
    token.write_text("wrong")
    assert main(["label", "export", "sentiment", "--url", play.url, "--token-file", str(token)]) == 1
    assert "refuses the internal token (401)" in capsys.readouterr().err


def test_a_token_is_never_told(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    main(["label", "export", "sentiment"])
    play.refuse = (500, {"kind": "Status", "message": "broken"})
    main(["label", "export", "sentiment"])
    assert TOKEN not in "".join(capsys.readouterr())


def test_an_unreachable_server_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label", "export", "sentiment", "--url", "http://127.0.0.1:9"]) == 1
    assert "cannot connect to 127.0.0.1:9" in capsys.readouterr().err


def test_a_row_that_is_not_of_this_version_is_refused(play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play.rows = [{"id": "r0", "surprise": "x"}]
    target = tmp_path / "rows.jsonl"
    assert main(["label", "export", "sentiment", "-o", str(target)]) == 1
    assert "does not understand" in capsys.readouterr().err
    assert not target.exists()


def test_batches_are_bounded_in_rows_and_bytes() -> None:
    small = [LabelRow(id=str(n), label="x") for n in range(25_000)]
    assert [len(batch) for batch in labels.batches(small)] == [10_000, 10_000, 5_000]
    large = [LabelRow(id=str(n), label="x" * 8192) for n in range(1000)]
    sizes = [sum(len(row.model_dump_json()) for row in batch) for batch in labels.batches(large)]
    assert max(sizes) <= labels.BYTES_PER_REQUEST
    assert len(sizes) > 1


def test_the_limit_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["label", "export", "sentiment", "--limit", "0"])
    assert "must be from 1" in capsys.readouterr().err


def test_missing_files_are_named() -> None:
    with pytest.raises(Failure, match="cannot read /nowhere/labels"):
        labels._open(Path("/nowhere/labels"))
