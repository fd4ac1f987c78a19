"""Bad input ends prepare with a reason and a sentence that names what to change; nothing is published."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.unit.trainer.builders import TEMPLATE, make_config, make_gated, make_rows, make_source, replace, run_stage, write_jsonl

from tuneloop_trainer import costs
from tuneloop_trainer.contract import (
    Base,
    DataSource,
    Evaluation,
    ExitCode,
    FeedbackExport,
    Reason,
    RunConfig,
    Stage,
    Suite,
    Template,
)
from tuneloop_trainer.data.formats import MAX_LINE_BYTES
from tuneloop_trainer.data.records import RowReader

Build = Callable[[Path, Path], RunConfig]


def with_rows(rows: list[Any], **source: Any) -> Build:
    return lambda root, base: make_config(root, base, [make_source(write_jsonl(root / "data" / "train.jsonl", rows), **source)])


def with_file(content: bytes, name: str = "train.jsonl") -> Build:
    def build(root: Path, base: Path) -> RunConfig:
        path = root / "data" / name
        path.parent.mkdir()
        path.write_bytes(content)
        return make_config(root, base, [make_source(path)])

    return build


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def archive() -> bytes:
    """With a file above the folder that it would be unpacked to, and a link to a file of the machine's."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as file:
        escaping = tarfile.TarInfo("../escaped.jsonl")
        escaping.size = 2
        file.addfile(escaping, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("train.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    return content.getvalue()


def with_training(**fields: Any) -> Build:
    def build(root: Path, base: Path) -> RunConfig:
        config = make_config(root, base)
        return replace(config, training=config.training.model_copy(update=fields))

    return build


def with_base(change: Callable[[Path], None]) -> Build:
    def build(root: Path, base: Path) -> RunConfig:
        folder = root / "base"
        folder.mkdir()
        for path in base.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        change(folder)
        return make_config(root, base, base=Base(uri="pvc://models/base", path=str(folder)))

    return build


def with_suite(rows: list[Any], **fields: Any) -> Build:
    def build(root: Path, base: Path) -> RunConfig:
        source = make_source(write_jsonl(root / "data" / "gate.jsonl", rows))
        suite = Suite(**({"name": "gate", "type": "Dataset", "source": source, "metrics": ("Accuracy",)} | fields))
        return make_config(root, base, evaluation=Evaluation(suites=(suite,)))

    return build


def edit_json(name: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def missing_file(root: Path, base: Path) -> RunConfig:
    return make_config(root, base, [make_source(root / "data" / "nowhere.jsonl")])


def renamed(rows: list[dict[str, object]], old: str, new: str) -> list[dict[str, object]]:
    return [{new if key == old else key: value for key, value in row.items()} for row in rows]


CASES = {
    "missing file": (missing_file, Reason.DATA_INVALID, "Dataset pvc://data/nowhere.jsonl does not exist."),
    "empty file": (with_file(b""), Reason.DATA_EMPTY, "Dataset pvc://data/train.jsonl is empty"),
    "unknown format": (with_file(b"x", "train.xml"), Reason.DATA_INVALID, "is of no known format"),
    "missing column": (
        with_rows(renamed(make_rows(10), "label", "sentiment")),
        Reason.DATA_INVALID,
        "Dataset pvc://data/train.jsonl has no column 'label'; it has id, text, sentiment. Set data.train[0].columns.",
    ),
    "mapped column that is not there": (
        with_rows(make_rows(10), columns={"label": "stars"}),
        Reason.DATA_INVALID,
        "has no column 'stars'; it has id, text, label.",
    ),
    "no prompt without a template": (with_rows(make_rows(10), template=None), Reason.DATA_INVALID, "has no column 'completion'"),
    "not JSON": (with_file(b"sunny day\nrainy day\n"), Reason.DATA_INVALID, "2 of 2 rows cannot be used; row 1: it is not JSON"),
    "not objects": (with_file(b"[1]\n[2]\n"), Reason.DATA_INVALID, "row 1: it is not a JSON object"),
    "too long a line": (with_file(b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}\n'), Reason.DATA_INVALID, "line 1: longer than"),
    "CSV not in UTF-8": (with_file(b"text,label\n\xff\xfe,positive\n", "train.csv"), Reason.DATA_INVALID, "is not UTF-8"),
    "labels missing in many rows": (
        with_rows([row | {"label": None} if number % 3 == 1 else row for number, row in enumerate(make_rows(30))]),
        Reason.DATA_INVALID,
        "10 of 30 rows cannot be used; row 2: column 'label' has nothing where text is needed.",
    ),
    "labels that are no number": (
        with_rows([row | {"label": float("nan")} for row in make_rows(10)]),
        Reason.DATA_INVALID,
        "10 of 10 rows cannot be used; row 1: column 'label' has nan where text is needed.",
    ),
    "labels that are no number in Parquet": (
        with_file(parquet([row | {"label": float("nan")} for row in make_rows(10)]), "train.parquet"),
        Reason.DATA_INVALID,
        "10 of 10 rows cannot be used; row 1: column 'label' has nan where text is needed.",
    ),
    "one class only": (
        with_rows([row | {"label": "positive"} for row in make_rows(40)]),
        Reason.DATA_INVALID,
        "All 40 training rows have the completion 'positive': there is nothing to learn.",
    ),
    "UTF-16": (with_file('{"text": "sunny"}\n'.encode("utf-16"), "train.jsonl"), Reason.DATA_INVALID, "is in UTF-16 or UTF-32. Convert it"),
    "an archive with entries that lead out": (with_file(archive(), "train.tar.gz"), Reason.DATA_INVALID, "is of no known format"),
    "an archive under another name": (
        with_file(archive(), "train.jsonl.gz"),
        Reason.DATA_INVALID,
        "rows cannot be used; row 1: it is not JSON",
    ),
    "a list where text is needed": (
        with_rows([row | {"text": [1, 2]} for row in make_rows(5)]),
        Reason.DATA_INVALID,
        "row 1: column 'text' has [1, 2] where text is needed",
    ),
    "empty completions": (with_rows([row | {"label": " "} for row in make_rows(5)]), Reason.DATA_INVALID, "row 1: its completion is empty"),
    "template that is not Jinja": (
        with_rows(make_rows(5), template=Template(prompt="{{ text", completion="x")),
        Reason.DATA_INVALID,
        "The template of data.train[0] is not valid Jinja",
    ),
    "template that reaches for Python": (
        with_rows(make_rows(5), template=Template(prompt="{{ text.__class__.__mro__ }}", completion="{{ label }}")),
        Reason.DATA_INVALID,
        "the template fails on it",
    ),
    "template that never ends": (
        with_rows(make_rows(1), template=Template(prompt="{% for i in range(90000) %}{{ text }}{% endfor %}", completion="{{ label }}")),
        Reason.DATA_INVALID,
        "longer than 262144 characters",
    ),
    "template that makes a huge text": (
        with_rows(make_rows(1), template=Template(prompt="{{ text * 999999999 }}", completion="{{ label }}")),
        Reason.DATA_INVALID,
        "makes too large a value",
    ),
    "no supervised token": (
        with_training(max_sequence_length=12),
        Reason.DATA_INVALID,
        "40 of 40 rows have no supervised token within training.maxSequenceLength 12; row 1: with its answer it has",
    ),
    "unknown extra argument": (
        with_training(extra_arguments={"learning_rat": "1"}),
        Reason.DATA_INVALID,
        "training.extraArguments has no 'learning_rat'",
    ),
    "extra argument of another type": (with_training(extra_arguments={"weight_decay": "high"}), Reason.DATA_INVALID, "'high' is no float"),
    "every row is in the gate": (with_suite(make_rows(40)), Reason.DATA_EMPTY, "all 40 were dropped (40 ContaminatedHash)"),
    "suite with one label": (
        with_suite([row for row in make_rows(20, 1000) if row["label"] == "positive"]),
        Reason.DATA_INVALID,
        "Suite gate has one label only, 'positive'",
    ),
    "suite with an unknown label": (
        with_suite(make_rows(20, 1000), labels=("positive", "neutral")),
        Reason.DATA_INVALID,
        "Suite gate, item 1: 'negative' is none of the labels positive, neutral.",
    ),
    "suite with too many labels": (
        with_suite([row | {"label": f"class {row['id']}"} for row in make_rows(70, 1000)]),
        Reason.DATA_INVALID,
        "Suite gate has 70 distinct completions",
    ),
    "suite without its column": (
        with_suite(renamed(make_rows(20, 1000), "text", "tweet")),
        Reason.DATA_INVALID,
        "has no column 'text'; it has id, tweet, label. Set evaluation.suites[0].dataset.columns.",
    ),
    "missing model": (
        lambda root, base: make_config(root, base, base=Base(uri="pvc://models/none", path=str(root / "none"))),
        Reason.MODEL_NOT_FOUND,
        "Model pvc://models/none does not exist.",
    ),
    "pickled weights only": (
        with_base(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None),
        Reason.MODEL_NOT_FOUND,
        "has no .safetensors weights",
    ),
    "weights that are something else": (
        with_base(lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n") and None),
        Reason.MODEL_NOT_FOUND,
        "pvc://models/base: model.safetensors is no whole safetensors file",
    ),
    "weights that are cut off": (
        with_base(lambda folder: os.truncate(folder / "model.safetensors", 60_000)),
        Reason.MODEL_NOT_FOUND,
        "pvc://models/base: model.safetensors is no whole safetensors file",
    ),
    "empty weights": (
        with_base(lambda folder: os.truncate(folder / "model.safetensors", 0)),
        Reason.MODEL_NOT_FOUND,
        "pvc://models/base: model.safetensors is no whole safetensors file",
    ),
    "weights without one of their files": (
        with_base(
            lambda folder: (
                (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors", "b": "two.safetensors"}}')
                and None
            )
        ),
        Reason.MODEL_NOT_FOUND,
        "model.safetensors.index.json names two.safetensors, which is not there",
    ),
    "config with more layers than the weights have": (
        with_base(edit_json("config.json", num_hidden_layers=3, layer_types=None)),
        Reason.MODEL_NOT_FOUND,
        "Model pvc://models/base: config.json speaks of 3 layers, and the weights have 2. Copy the model again, whole.",
    ),
    "tokenizer with code": (
        with_base(edit_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})),
        Reason.MODEL_NOT_FOUND,
        "auto_map in tokenizer_config.json",
    ),
    "model with code": (
        with_base(edit_json("config.json", auto_map={"AutoConfig": "x.Y"})),
        Reason.MODEL_NOT_FOUND,
        "auto_map in config.json",
    ),
    "tokenizer without chat template": (
        with_base(lambda folder: (folder / "chat_template.jinja").unlink()),
        Reason.DATA_INVALID,
        "has no chat template. Set promptFormat: Text.",
    ),
    "chat template that looks ahead": (
        with_base(
            lambda folder: (
                (folder / "chat_template.jinja").write_text("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
                and None
            )
        ),
        Reason.DATA_INVALID,
        "renders a prompt differently once it has an answer",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named(case: str, tmp_path: Path, base: Path) -> None:
    build, reason, message = CASES[case]
    config = build(tmp_path, base)

    result = run_stage(config, Stage.PREPARE)

    assert message in result.message
    assert (result.exit_code, result.reason) == (ExitCode.INVALID, reason)
    assert not (tmp_path / "work" / "prepare").exists()


def test_a_chat_template_without_an_end_is_refused(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    config = with_base(lambda folder: (folder / "chat_template.jinja").write_text(endless) and None)(tmp_path, base)

    result = run_stage(config, Stage.PREPARE)

    assert result.message.startswith("The chat template of pvc://models/base is refused: it needs more than 0.2 CPU seconds")
    assert (result.exit_code, result.reason) == (ExitCode.INVALID, Reason.MODEL_NOT_FOUND)


def test_a_pickle_beside_the_weights_is_neither_read_nor_hashed(tmp_path: Path, base: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "was-run"),)

    plain = run_stage(make_config(tmp_path / "plain", base), Stage.PREPARE).prepare
    config = with_base(
        lambda folder: [(folder / name).write_bytes(pickle.dumps(Bomb())) for name in ("pytorch_model.bin", "training_args.bin")] and None
    )(tmp_path, base)
    summary = run_stage(config, Stage.PREPARE).prepare

    assert summary.base_digest == plain.base_digest
    assert not (tmp_path / "was-run").exists()


def test_a_few_bad_rows_are_dropped_and_counted(tmp_path: Path, base: Path) -> None:
    rows: list[object] = [*make_rows(40), "not an object", {"text": "no label"}, {"text": "x", "label": ""}, make_rows(1)[0]]
    config = make_config(tmp_path, base, [make_source(write_jsonl(tmp_path / "data" / "train.jsonl", rows))])

    summary = run_stage(config, Stage.PREPARE).prepare

    assert (summary.rows_in, summary.rows_kept) == (44, 40)
    assert summary.dropped == {"Malformed": 1, "MissingValue": 1, "Empty": 1, "Duplicate": 1}


def test_a_field_of_a_megabyte_is_dropped_and_named_with_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    write_jsonl(folder / "a.jsonl", [{"prompt": "p", "completion": str(number)} for number in range(9)])
    pq.write_table(pa.Table.from_pylist([{"prompt": "p", "completion": "x" * (1 << 20)}]), folder / "b.parquet")
    reader = RowReader(make_source(folder, template=None), "data.train[0]")

    assert len(list(reader.records())) == 9
    assert reader.drops.counts == {"TooLong": 1}
    assert reader.drops.first == "row 10 (b.parquet): its completion is longer than 262144 characters"


def test_truncated_rows_are_counted(tmp_path: Path, base: Path) -> None:
    rows = [*make_rows(40), {"text": "short", "label": "positive " * 200}]
    config = make_config(tmp_path, base, [make_source(write_jsonl(tmp_path / "data" / "train.jsonl", rows))])

    assert run_stage(config, Stage.PREPARE).prepare.truncated == 1


def test_csv_parquet_and_folders_are_read(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "data" / "parts"
    write_jsonl(folder / "b.jsonl", make_rows(20))
    pq.write_table(pa.Table.from_pylist(make_rows(10, 500)), folder / "c.parquet")
    (folder / "a.csv").write_text('text,label\n"sunny, very",positive\nrainy,negative\n')
    (folder / "notes.txt").write_text("not data")

    summary = run_stage(make_config(tmp_path, base, [make_source(folder)]), Stage.PREPARE).prepare

    assert (summary.rows_in, summary.rows_kept) == (32, 32)


class Gateway:
    """A gateway's export on the loopback."""

    def __init__(self, status: int, body: bytes) -> None:
        self.seen: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.seen.append((self.path, self.headers["Authorization"]))
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/internal/export"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def gateway() -> Iterator[Callable[[int, bytes], Gateway]]:
    made: list[Gateway] = []

    def make(status: int, body: bytes) -> Gateway:
        made.append(Gateway(status, body))
        return made[-1]

    yield make
    for server in made:
        server.stop()


def make_export(root: Path, gateway: Gateway, epoch: str | None = None) -> DataSource:
    token = root / "token"
    token.write_text("secret-token\n")
    export = FeedbackExport(deployment="tweets", url=gateway.url, token_file=str(token), epoch=epoch)
    return DataSource(uri="feedback://tweets", feedback=export, template=TEMPLATE)


def test_feedback_is_read_from_the_gateway_with_the_token(tmp_path: Path, base: Path, gateway: Callable[[int, bytes], Gateway]) -> None:
    rows = [row | {"id": str(row["id"]), "document": str(index // 2), "kind": "Label"} for index, row in enumerate(make_rows(30))]
    server = gateway(200, "".join(json.dumps(row) + "\n" for row in rows).encode())

    result = run_stage(make_config(tmp_path, base, [make_export(tmp_path, server)]), Stage.PREPARE)

    assert result.prepare.rows_kept == 30
    assert server.seen == [("/internal/export?split=train", "Bearer secret-token")]


def test_an_earlier_epochs_feedback_is_asked_for_and_may_be_gone(
    tmp_path: Path, base: Path, gateway: Callable[[int, bytes], Gateway]
) -> None:
    server = gateway(200, b"")
    old = make_config(tmp_path, base).train[0]

    result = run_stage(make_config(tmp_path, base, [old, make_export(tmp_path, server, "0")]), Stage.PREPARE)

    assert result.prepare.rows_kept > 0
    assert server.seen[0][0] == "/internal/export?split=train&epoch=0"


def test_votes_are_read_as_rows_of_kto(tmp_path: Path, base: Path, gateway: Callable[[int, bytes], Gateway]) -> None:
    rows = [
        {"id": f"r{row['id']}", "document": f"d{row['id']}", "kind": "Rating", "text": row["text"], "completion": row["label"],
         "desirable": number % 3 > 0}
        for number, row in enumerate(make_rows(30))
    ]  # fmt: skip
    server = gateway(200, "".join(json.dumps(row) + "\n" for row in rows).encode())
    source = make_export(tmp_path, server)
    assert source.feedback is not None
    source = source.model_copy(
        update={"feedback": source.feedback.model_copy(update={"rows": "Ratings"}), "template": None, "columns": {"prompt": "text"}}
    )

    result = run_stage(make_config(tmp_path, base, [source], objective="KTO"), Stage.PREPARE)

    assert result.prepare.rows_kept == 30
    assert server.seen[0][0] == "/internal/export?split=train&rows=Ratings"


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [(200, b"", Reason.DATA_EMPTY), (401, b"", Reason.ACCESS_DENIED), (404, b"", Reason.DATA_INVALID), (302, b"", Reason.DATA_INVALID)],
)
def test_export_that_gives_nothing_is_named(
    status: int, body: bytes, reason: Reason, tmp_path: Path, base: Path, gateway: Callable[[int, bytes], Gateway]
) -> None:
    server = gateway(status, body)

    result = run_stage(make_config(tmp_path, base, [make_export(tmp_path, server)]), Stage.PREPARE)

    assert (result.exit_code, result.reason) == (ExitCode.INVALID, reason)
    assert "secret-token" not in result.message
    assert len(server.seen) == 1, "a redirect is not followed"


def test_gate_items_never_train(tmp_path: Path, base: Path) -> None:
    shared = make_rows(10, offset=1000)
    near = [row | {"text": f"{row['text']}!"} for row in shared]
    path = write_jsonl(tmp_path / "data" / "train.jsonl", [*make_rows(40), *near])
    config = make_gated(tmp_path, base, train=(make_source(path),))

    summary = run_stage(config, Stage.PREPARE).prepare

    assert summary.dropped == {"ContaminatedHash": 10}
    assert summary.rows_kept == 40
