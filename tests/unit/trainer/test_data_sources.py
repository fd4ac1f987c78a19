"""Every format gives the same rows; what is broken, hostile or too large is refused with what to change, in bounded memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop_trainer.contract import DataSource, Reason
from tuneloop_trainer.data import formats, sources
from tuneloop_trainer.data.sources import Reading
from tuneloop_trainer.errors import Invalid

ROWS = [{"text": f"a lovely, day\nnumber {number} — ünïcode", "label": "good"} for number in range(7)]


def read(path: Path) -> list[dict[str, object] | None]:
    return [row.values for row in Reading(DataSource(uri=f"pvc://data/{path.name}", path=str(path))).rows()]


def json_lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def comma_separated(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def arrow(rows: list[dict[str, str]], new: Callable[..., object] = pa.ipc.new_file) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with new(sink, table.schema) as writer:  # type: ignore[attr-defined]  # pyarrow is untyped
        writer.write_table(table)
    return bytes(sink.getvalue())


def parquet(rows: list[dict[str, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


FILES = {
    "rows.jsonl": json_lines(ROWS),
    "rows.ndjson": json_lines(ROWS).rstrip(b"\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + json_lines(ROWS),
    "rows.csv": comma_separated(ROWS),
    "bom.csv": b"\xef\xbb\xbf" + comma_separated(ROWS),
    "rows.parquet": parquet(ROWS),
    "file.arrow": arrow(ROWS),
    "stream.arrow": arrow(ROWS, pa.ipc.new_stream),
    "rows.jsonl.gz": gzip.compress(json_lines(ROWS)),
    "rows.csv.gz": gzip.compress(comma_separated(ROWS)),
    "rows.jsonl.zst": zstd(json_lines(ROWS)),
    "members.jsonl.gz": gzip.compress(json_lines(ROWS[:3])) + gzip.compress(json_lines(ROWS[3:])),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])

    assert read(tmp_path / name) == ROWS


def test_a_folder_is_read_in_the_order_of_names_and_its_rows_know_their_file(tmp_path: Path) -> None:
    for name, part in (("b.jsonl.gz", gzip.compress(json_lines(ROWS[3:]))), ("a.csv", comma_separated(ROWS[:3])), ("notes.txt", b"x")):
        (tmp_path / name).write_bytes(part)

    rows = list(Reading(DataSource(uri="pvc://data", path=str(tmp_path))).rows())

    assert [row.values for row in rows] == ROWS
    assert [row.file for row in rows] == ["a.csv"] * 3 + ["b.jsonl.gz"] * 4


def test_the_digest_is_of_what_was_read(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst"):
        (tmp_path / name).write_bytes(FILES[name])
    readings = [Reading(DataSource(uri="pvc://x", path=str(tmp_path / name))) for name in ("rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst")]

    for reading in readings:
        assert len(list(reading.rows())) == len(ROWS)

    assert len({reading.digest for reading in readings}) == 1


BROKEN = {
    "utf16.jsonl": (json_lines(ROWS).decode().encode("utf-16"), "UTF-16 or UTF-32. Convert it to UTF-8"),
    "utf16.csv": (comma_separated(ROWS).decode().encode("utf-16-le"), "UTF-16 or UTF-32. Convert it to UTF-8"),
    "latin.csv": ("text,label\nfine,good\nm\xfcde,bad\n".encode("latin-1"), "is not UTF-8 after row 1"),
    "long.csv": (b"text,label\n" + b"x" * (formats.MAX_LINE_BYTES + 10) + b",good\n", "line 2: longer than"),
    "quote.csv": (b'text,label\n"never closed,good\n' + b"line\n" * 300_000, "is not CSV"),
    "cut.jsonl.gz": (gzip.compress(json_lines(ROWS))[:-20], "is damaged"),
    "plain.jsonl.gz": (json_lines(ROWS), "is damaged"),
    "plain.jsonl.zst": (json_lines(ROWS), "is damaged"),
    "cut.parquet": (parquet(ROWS)[:-30], "is not Parquet"),
    "text.arrow": (json_lines(ROWS), "is not Arrow"),
    "cut.arrow": (arrow(ROWS, pa.ipc.new_stream)[:-300], "is not Arrow"),
    "rows.zip": (b"PK", "is of no known format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)

    with pytest.raises(Invalid) as error:
        read(tmp_path / name)

    assert message in error.value.message
    assert error.value.reason is Reason.DATA_INVALID
    assert len(error.value.message) < 500


def test_an_invalid_byte_costs_its_row_only(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')

    rows = list(Reading(DataSource(uri="pvc://x", path=str(tmp_path / "x.jsonl"))).rows())

    assert [row.problem for row in rows] == ["", "it is not UTF-8 (byte 11)"]


def test_half_a_surrogate_pair_costs_its_row_and_a_whole_one_does_not(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\\ud83d\\ude42"}\n{"text": "\\ud83d"}\n')

    rows = list(Reading(DataSource(uri="pvc://x", path=str(tmp_path / "x.jsonl"))).rows())

    assert rows[0].values == {"text": "🙂"}
    assert rows[1].problem == "it has half of a surrogate pair, which is no character"


def test_nan_in_csv_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"text,label\nfine,nan\n")

    assert read(tmp_path / "x.csv") == [{"text": "fine", "label": None}]


def bomb(name: str, size: int) -> bytes:
    row = json.dumps({"text": "a" * 1000}).encode() + b"\n"
    if name.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, pa.schema([("text", pa.string())]), compression="zstd", use_dictionary=False) as writer:
            for _ in range(size // 8_000_000):
                writer.write_table(pa.table({"text": ["a" * 1000] * 8000}))
        return bytes(sink.getvalue())
    packed = io.BytesIO()
    if name.endswith(".gz"):
        with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9) as file:
            for _ in range(size // len(row) // 1000):
                file.write(row * 1000)
        return packed.getvalue()
    return zstd(row * (size // len(row)))


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_a_decompression_bomb_is_refused_before_it_is_unfolded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "EXPANSION_FREE_BYTES", 1 << 20)
    (tmp_path / name).write_bytes(bomb(name, 16 << 20))
    seen: list[int] = []

    with pytest.raises(Invalid, match="decompression bomb"):
        seen.extend(row.number for row in Reading(DataSource(uri="pvc://x", path=str(tmp_path / name))).rows())

    assert len(seen) < 4000, "it ends near the limit, not at the end of the file"


def test_a_line_of_fifty_megabytes_is_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "x.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(50 << 20)
    tracemalloc.start()

    with pytest.raises(Invalid, match=r"line 1: longer than 1048576 bytes\. Split the row"):
        read(tmp_path / "x.jsonl")

    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_links_out_of_the_claim_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "VOLUMES", tmp_path / "volumes")
    claim, secret = tmp_path / "volumes" / "data", tmp_path / "secret.jsonl"
    (claim / "blobs").mkdir(parents=True)
    (claim / "rows").mkdir()
    secret.write_bytes(json_lines(ROWS))
    (claim / "blobs" / "x").write_bytes(json_lines(ROWS))
    (claim / "rows" / "a.jsonl").symlink_to("../blobs/x")

    assert read(claim / "rows") == ROWS, "the hub's cache has such links"
    (claim / "rows" / "b.jsonl").symlink_to(secret)
    for path in (claim / "rows", claim / "rows" / "b.jsonl"):
        with pytest.raises(Invalid, match="is a link that leads outside its claim"):
            read(path)
    with pytest.raises(Invalid, match=r"has '\.\.' in its path"):
        read(claim / ".." / ".." / "secret.jsonl")


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")

    with pytest.raises(Invalid, match="is no regular file"):
        read(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    with pytest.raises(Invalid, match=r"gone\.jsonl"):
        read(tmp_path)
