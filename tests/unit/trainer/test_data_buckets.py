"""Rows in S3 are read as those on a claim are; an S3 that refuses, breaks off, changes or hangs ends prepare with a reason, soon."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.trainer import stores
from tests.unit.trainer.builders import make_config, make_rows, make_source, run_stage, write_jsonl

from tuneloop_trainer.contract import Bucket, DataSource, ExitCode, Reason, Stage, StageResult
from tuneloop_trainer.data import fetching, formats, objects
from tuneloop_trainer.data.fetching import LEAST_BYTES_PER_SECOND, MAX_FILES, Pace, Workspace
from tuneloop_trainer.data.sources import Reading
from tuneloop_trainer.errors import Invalid, Unavailable
from tuneloop_trainer.stores.buckets import filesystem

ROWS = make_rows(40)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects.Objects.__init__, "__defaults__", (0.3, 1))


@pytest.fixture
def bucket() -> Iterator[stores.FakeBucket]:
    with stores.fake_bucket() as served:
        yield served


def secret_of(root: Path, endpoint: str, secret: str = stores.SECRET) -> str:
    keys = {"AWS_ACCESS_KEY_ID": stores.ACCESS, "AWS_SECRET_ACCESS_KEY": secret, "AWS_ENDPOINT_URL": endpoint}
    shutil.rmtree(root / "secret", ignore_errors=True)
    return stores.write_secret(root / "secret", **keys)


def source_of(root: Path, endpoint: str, path: str = "data/rows.jsonl", **fields: Any) -> DataSource:
    return DataSource(uri=f"s3://{path}", bucket=Bucket(path=path, credentials=secret_of(root, endpoint)), **fields)


def rows_of(root: Path, endpoint: str, path: str = "data/rows.jsonl") -> list[tuple[str, dict[str, object] | None]]:
    reading = Reading(source_of(root, endpoint, path), Workspace(root / "work"))
    return [(row.file, row.values) for row in reading.rows()]


# --- what is read -------------------------------------------------------------


def test_an_object_has_the_rows_and_the_digest_of_the_same_file_on_a_claim(bucket: stores.FakeBucket, tmp_path: Path) -> None:
    bucket.objects["rows.jsonl"] = LINES
    fetched = Reading(source_of(tmp_path, bucket.address), Workspace(tmp_path / "work"))
    local = Reading(make_source(write_jsonl(tmp_path / "rows.jsonl", ROWS)))

    assert [row.values for row in fetched.rows()] == [row.values for row in local.rows()] == ROWS
    assert fetched.digest == local.digest
    assert list((tmp_path / "work").iterdir()) == []


def test_a_prefix_is_read_in_the_order_of_names_without_what_is_deeper_or_of_other_formats(
    bucket: stores.FakeBucket, tmp_path: Path
) -> None:
    bucket.objects |= {
        "set/b.csv": b"text\nsecond\n",
        "set/a.jsonl": b'{"text": "first"}\n',
        "set/README.md": b"# no rows",
        "set/load.py": b"raise SystemExit",
        "set/old/c.jsonl": b'{"text": "deeper"}\n',
        "settings.jsonl": b'{"text": "beside"}\n',
    }
    assert rows_of(tmp_path, bucket.address, "data/set/") == [("a.jsonl", {"text": "first"}), ("b.csv", {"text": "second"})]


def test_only_one_file_lies_on_the_disk_at_a_time(bucket: stores.FakeBucket, tmp_path: Path) -> None:
    bucket.objects |= {f"set/{number}.jsonl": LINES for number in range(3)}
    reading = Reading(source_of(tmp_path, bucket.address, "data/set"), Workspace(tmp_path / "work"))

    assert max(len(list((tmp_path / "work").rglob("*.jsonl"))) for _ in reading.rows()) == 1
    assert not list((tmp_path / "work").rglob("*.jsonl"))


@pytest.mark.skipif(not stores.has_s3(), reason="not built: dev/s3 install")
def test_a_run_is_prepared_from_a_real_s3(tmp_path: Path, base: Path) -> None:
    with stores.s3(tmp_path / "server") as endpoint:
        client = filesystem(secret_of(tmp_path, endpoint), "a test", 5, 1)
        for name, rows in (("train/1.jsonl", ROWS[:20]), ("train/2.jsonl", ROWS[20:])):
            with client.open_output_stream(f"models/{name}") as sink:
                sink.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        template = make_source(tmp_path / "x").template
        config = make_config(tmp_path, base, [source_of(tmp_path, endpoint, "models/train", template=template)])
        local = make_config(tmp_path / "local", base)

        result, expected = run_stage(config, Stage.PREPARE), run_stage(local, Stage.PREPARE)
    assert result.exit_code == ExitCode.DONE, result.message
    assert result.prepare.shards_digest == expected.prepare.shards_digest
    assert result.prepare.dataset_digests == {"s3://models/train": expected.prepare.dataset_digests["pvc://data/train.jsonl"]}
    assert stores.SECRET not in "".join(path.read_text(errors="replace") for path in (tmp_path / "work").rglob("*") if path.is_file())


@pytest.mark.skipif(not stores.has_s3(), reason="not built: dev/s3 install")
@pytest.mark.parametrize(
    ("path", "secret", "reason", "said"),
    [
        ("models/rows.jsonl", "wrong", Reason.ACCESS_DENIED, "may not be read with the keys"),
        ("models/nothing.jsonl", stores.SECRET, Reason.DATA_INVALID, "does not exist"),
        ("nowhere/rows.jsonl", stores.SECRET, Reason.DATA_INVALID, "does not exist"),
    ],
    ids=["wrong-key", "no-object", "no-bucket"],
)
def test_what_a_real_s3_refuses_is_named(tmp_path: Path, path: str, secret: str, reason: Reason, said: str) -> None:
    with stores.s3(tmp_path / "server") as endpoint:
        source = DataSource(uri=f"s3://{path}", bucket=Bucket(path=path, credentials=secret_of(tmp_path, endpoint, secret)))
        with pytest.raises(Invalid, match=said) as refused:
            list(Reading(source, Workspace(tmp_path / "work")).rows())
    assert refused.value.reason is reason
    assert secret not in str(refused.value)


# --- what goes wrong ----------------------------------------------------------


def prepared(root: Path, base: Path, endpoint: str) -> StageResult:
    """Of a run whose rows are in the bucket."""
    result: StageResult = run_stage(make_config(root, base, [source_of(root, endpoint)]), Stage.PREPARE)
    return result


def assert_nothing_is_left(root: Path) -> None:
    assert [path for path in (root / "work").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (403, ExitCode.INVALID, Reason.ACCESS_DENIED),
        (404, ExitCode.INVALID, Reason.DATA_INVALID),
        (500, ExitCode.UNAVAILABLE, Reason.SOURCE_UNAVAILABLE),
        (503, ExitCode.UNAVAILABLE, Reason.SOURCE_UNAVAILABLE),
        (None, ExitCode.UNAVAILABLE, Reason.SOURCE_UNAVAILABLE),
    ],
)
def test_s3_that_refuses_or_hangs_ends_prepare_with_a_reason_soon(
    tmp_path: Path, base: Path, status: int | None, code: ExitCode, reason: Reason
) -> None:
    started = time.monotonic()
    with stores.answering(status) as (address, _):
        result = prepared(tmp_path, base, f"http://{address}")
    assert (result.exit_code, result.reason) == (code, reason)
    assert "s3://data/rows.jsonl" in result.message
    assert stores.SECRET not in result.message
    assert time.monotonic() - started < 10
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("how", ["truncated_at", "ends_at"])
def test_an_object_that_breaks_off_is_not_read(bucket: stores.FakeBucket, tmp_path: Path, base: Path, how: str) -> None:
    bucket.objects["rows.jsonl"] = LINES
    setattr(bucket, how, 500)
    result = prepared(tmp_path, base, bucket.address)
    assert (result.exit_code, result.reason) == (ExitCode.UNAVAILABLE, Reason.SOURCE_UNAVAILABLE), result.message
    assert_nothing_is_left(tmp_path)


def test_an_object_that_breaks_off_is_known_whatever_was_in_the_memory(
    bucket: stores.FakeBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.objects["rows.jsonl"] = LINES[:2000]
    bucket.ends_at = 500
    monkeypatch.setattr("tuneloop_trainer.stores.buckets.CHUNK", 2000)  # of a size whose memory is used again at once
    source = source_of(tmp_path, bucket.address)
    assert source.bucket is not None
    remote = objects.Objects(source.bucket, source.uri)
    (file,) = remote.files()
    for _ in range(20):
        used = [bytes([255]) * 2000 for _ in range(200)]
        del used[::2]
        with pytest.raises(Unavailable, match="broke off"):
            remote.fetch(file, tmp_path / "rows.jsonl", Pace(source.uri, file.name))


def test_an_object_that_grows_while_it_is_read_is_not_a_mixture(bucket: stores.FakeBucket, tmp_path: Path, base: Path) -> None:
    bucket.objects["rows.jsonl"] = LINES
    bucket.grows = b'{"text": "late", "label": "positive"}\n'
    result = prepared(tmp_path, base, bucket.address)
    assert (result.exit_code, result.reason) == (ExitCode.UNAVAILABLE, Reason.SOURCE_UNAVAILABLE)
    assert "rows.jsonl changed while it was read" in result.message
    assert_nothing_is_left(tmp_path)


def test_an_object_that_grew_after_it_was_listed_is_read_as_it_is(bucket: stores.FakeBucket, tmp_path: Path) -> None:
    bucket.objects |= {"set/1.jsonl": b'{"text": "one"}\n', "set/2.jsonl": b'{"text": "two"}\n'}
    reading = Reading(source_of(tmp_path, bucket.address, "data/set"), Workspace(tmp_path / "work"))
    seen = []
    for row in reading.rows():
        seen.append(row.values)
        bucket.objects["set/2.jsonl"] = b'{"text": "two"}\n{"text": "three"}\n'
    assert seen == [{"text": "one"}, {"text": "two"}, {"text": "three"}]


def test_s3_that_fails_for_a_moment_is_asked_again_by_the_client(
    bucket: stores.FakeBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects.Objects.__init__, "__defaults__", (5.0, 3))
    bucket.objects["rows.jsonl"] = LINES
    bucket.failures = [500]
    assert len(rows_of(tmp_path, bucket.address)) == len(ROWS)


def test_a_key_of_an_unknown_format_is_named_before_it_is_fetched(bucket: stores.FakeBucket, tmp_path: Path) -> None:
    bucket.objects["rows.zip"] = b"PK"
    with pytest.raises(Invalid, match="of no known format"):
        rows_of(tmp_path, bucket.address, "data/rows.zip")
    assert not any(asked.startswith("GET /data/rows") for asked in bucket.asked)


def test_more_than_a_set_may_have_is_refused_before_anything_is_fetched(
    bucket: stores.FakeBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.objects |= {f"set/{number}.jsonl": LINES for number in range(3)}
    monkeypatch.setattr(fetching, "MAX_BYTES", 2 * len(LINES))
    with pytest.raises(Invalid, match="is larger than"):
        rows_of(tmp_path, bucket.address, "data/set")
    monkeypatch.setattr(fetching, "MAX_FILES", 2)
    with pytest.raises(Invalid, match="has 3 files; at most 2 are read"):
        rows_of(tmp_path, bucket.address, "data/set")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    monkeypatch.setattr(fetching, "MAX_FILES", MAX_FILES)
    monkeypatch.setattr(fetching, "MAX_BYTES", formats.MAX_BYTES)
    with pytest.raises(Unavailable, match=r"the store has 0\.0 GiB free") as full:
        rows_of(tmp_path, bucket.address, "data/set")
    assert full.value.reason is Reason.STORE_UNAVAILABLE
    assert not any(asked.startswith("GET /data/set") for asked in bucket.asked)


def test_a_prefix_without_rows_is_empty(bucket: stores.FakeBucket, tmp_path: Path) -> None:
    bucket.objects["set/README.md"] = b"# nothing"
    with pytest.raises(Invalid, match="has no file that ends in") as empty:
        rows_of(tmp_path, bucket.address, "data/set")
    assert empty.value.reason is Reason.DATA_EMPTY


def test_a_file_that_comes_too_slowly_or_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    pace = Pace("s3://data/x.jsonl", "x.jsonl", clock=lambda: now[0])
    now[0] = 120 + 10
    pace.copied(10 * LEAST_BYTES_PER_SECOND)
    now[0] += 1
    with pytest.raises(Unavailable, match="comes too slowly"):
        pace.copied(10)
    monkeypatch.setattr(fetching, "MAX_BYTES", 1000)
    with pytest.raises(Invalid, match="is larger than"):
        Pace("s3://data/x.jsonl", "x.jsonl").copied(1001)


def test_how_far_it_is_can_be_seen(bucket: stores.FakeBucket, tmp_path: Path) -> None:
    bucket.objects |= {f"set/{number}.jsonl": LINES for number in range(4)}
    shares: list[float] = []
    reading = Reading(source_of(tmp_path, bucket.address, "data/set"), Workspace(tmp_path / "work", shares.append))
    list(reading.rows())
    assert shares == [25.0, 50.0, 75.0, 100.0]


def test_keys_that_are_missing_are_named(tmp_path: Path) -> None:
    source = DataSource(uri="s3://data/x.jsonl", bucket=Bucket(path="data/x.jsonl", credentials=stores.write_secret(tmp_path / "empty")))
    with pytest.raises(Invalid, match="AWS_ACCESS_KEY_ID") as refused:
        list(Reading(source).rows())
    assert refused.value.reason is Reason.ACCESS_DENIED
