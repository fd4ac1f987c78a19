"""What was fetched once for a store is not fetched again, as long as it is the same, there is room, and the same keys may read it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.unit.trainer.builders import TEMPLATE, make_config
from tests.unit.trainer.hubs import Hub
from tests.unit.trainer.stores import FakeBucket
from tests.unit.trainer.test_data_buckets import LINES, ROWS, bucket, impatient, source_of
from tests.unit.trainer.test_data_hub import ROWS as HUB_ROWS
from tests.unit.trainer.test_data_hub import downloads, hub
from tests.unit.trainer.test_data_hub import source_of as hub_source_of
from tests.unit.trainer.test_data_parts import run_pods

from tuneloop_trainer.data import shelves
from tuneloop_trainer.data.fetching import Workspace
from tuneloop_trainer.data.shelves import KEPT_SECONDS, Shelf
from tuneloop_trainer.data.sources import Reading

__all__ = ["bucket", "hub", "impatient"]


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The store's disk; a test may fill it."""
    disk = SimpleNamespace(total=100 << 30, free=80 << 30)
    monkeypatch.setattr(shelves.shutil, "disk_usage", lambda path: disk)
    return disk


def read(root: Path, served: FakeBucket, path: str = "data/rows.jsonl") -> tuple[list[object], int]:
    """The rows, and how many requests for objects there were."""
    served.asked.clear()
    reading = Reading(source_of(root, served.address, path), Workspace(root / "work", shelf=Shelf(root / "shelf")))
    rows: list[object] = [row.values for row in reading.rows()]
    assert list((root / "work").iterdir()) == []
    return rows, sum(asked.startswith("GET") for asked in served.asked)


def kept(root: Path) -> list[Path]:
    return [path for path in (root / "shelf").iterdir() if path.suffix != ".lock"]


def test_an_object_is_fetched_once_for_all_that_share_the_store(bucket: FakeBucket, tmp_path: Path) -> None:
    bucket.objects["rows.jsonl"] = LINES
    first, again = read(tmp_path, bucket), read(tmp_path, bucket)
    assert first[0] == again[0] == ROWS
    assert (first[1] > 0, again[1]) == (True, 0)
    assert [path.read_bytes() for path in kept(tmp_path)] == [LINES]


def test_pods_that_prepare_one_set_fetch_it_once(bucket: FakeBucket, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.objects["rows.jsonl"] = LINES
    requests = read(tmp_path, bucket)[1]
    bucket.asked.clear()
    config = make_config(tmp_path, base, [source_of(tmp_path, bucket.address, template=TEMPLATE)])

    result = run_pods(config, 3, monkeypatch)

    assert result.exit_code == 0, result.message
    assert sum(asked.startswith("GET") for asked in bucket.asked) == requests
    assert [path.read_bytes() for path in (tmp_path / "cache" / "rows").iterdir() if path.suffix != ".lock"] == [LINES]


def test_an_object_that_changed_since_is_fetched_anew(bucket: FakeBucket, tmp_path: Path) -> None:
    bucket.objects["rows.jsonl"] = LINES
    read(tmp_path, bucket)
    bucket.objects["rows.jsonl"] = b'{"text": "new"}\n'
    rows, requests = read(tmp_path, bucket)
    assert rows == [{"text": "new"}]
    assert requests > 0


def test_what_one_key_fetched_another_one_has_to_ask_for(bucket: FakeBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.objects["rows.jsonl"] = LINES
    read(tmp_path, bucket)
    monkeypatch.setattr("tests.unit.trainer.stores.ACCESS", "another")
    assert read(tmp_path, bucket)[1] > 0


def test_files_of_the_hub_are_fetched_once_for_each_token(hub: Hub, tmp_path: Path) -> None:
    def reading(token: str) -> list[object]:
        (tmp_path / token).mkdir(exist_ok=True)
        (tmp_path / token / "token").write_text(token)
        hub.asked.clear()
        work = Workspace(tmp_path / "work", shelf=Shelf(tmp_path / "shelf"))
        return [row.values for row in Reading(hub_source_of(credentials=str(tmp_path / token)), work).rows()]

    for token, fetched in (("one", 2), ("one", 0), ("two", 2)):
        assert reading(token) == HUB_ROWS
        assert len(downloads(hub)) == fetched


def test_several_pods_at_once_fetch_once(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    fetched = []

    def take(number: int) -> None:
        def fetch() -> Path:
            begun.set()
            assert go_on.wait(10)
            fetched.append(number)
            return written(tmp_path / str(number))

        found = Shelf(tmp_path / "shelf").take("x", tmp_path / str(number), fetch, lambda: True)
        assert found.read_text() == "rows"

    (tmp_path / "shelf").mkdir()
    threads = [threading.Thread(target=take, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_what_changed_as_it_was_fetched_is_read_and_not_kept(tmp_path: Path) -> None:
    assert take(tmp_path, "one", is_current=lambda: False).read_text() == "rows"
    assert kept(tmp_path) == []


def test_nothing_is_kept_where_the_store_has_little_room(tmp_path: Path, roomy: SimpleNamespace) -> None:
    take(tmp_path, "one")
    assert len(kept(tmp_path)) == 1
    roomy.free = 49 << 30
    assert take(tmp_path, "two").read_text() == "rows"
    assert kept(tmp_path) == [], "what was kept goes, too: checkpoints need the room"


def test_what_is_kept_goes_where_a_file_needs_its_room(bucket: FakeBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(tmp_path, "one", now=time.time())

    def disk(path: Path) -> SimpleNamespace:
        return SimpleNamespace(total=3000, free=2000 if kept(tmp_path) else 3000)

    monkeypatch.setattr(shelves.shutil, "disk_usage", disk)
    bucket.objects["rows.jsonl"] = LINES
    assert len(LINES) > 2000
    assert read(tmp_path, bucket)[0] == ROWS


def test_what_nobody_read_for_a_week_goes_and_its_last_reader_still_has_it(tmp_path: Path) -> None:
    reader = take(tmp_path, "one")
    take(tmp_path, "two", now=1e9 + KEPT_SECONDS - 1)
    assert len(kept(tmp_path)) == 2
    take(tmp_path, "one", now=1e9 + KEPT_SECONDS)  # as it was read now, it stays
    Shelf(tmp_path / "shelf", lambda: 1e9 + 2 * KEPT_SECONDS - 1).make_room()
    assert len(kept(tmp_path)) == 1
    Shelf(tmp_path / "shelf", lambda: 1e9 + 2 * KEPT_SECONDS).make_room()
    assert kept(tmp_path) == []
    assert reader.read_text() == "rows"


@pytest.mark.parametrize("failing", ["link", "utime", "fsync"])
def test_a_store_that_cannot_do_this_fetches_as_ever(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, failing, refuse)
    for _ in range(2):
        shutil.rmtree(tmp_path / "target", ignore_errors=True)
        assert take(tmp_path, "one").read_text() == "rows"
    assert len(kept(tmp_path)) == (failing == "utime"), "what is not surely on the disk is not kept"


def take(root: Path, identity: str, now: float = 1e9, is_current: Callable[[], bool] = lambda: True) -> Path:
    (root / "target").mkdir(exist_ok=True)
    target = root / "target" / f"{identity}-{now}"
    return Shelf(root / "shelf", lambda: now).take(identity, target, lambda: written(target), is_current)


def written(path: Path) -> Path:
    path.write_text("rows")
    return path
