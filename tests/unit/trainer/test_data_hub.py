"""Rows of a data set on the hub: data files alone, at one commit, verified; what the hub refuses is named, what it lacks is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.unit.trainer.builders import TEMPLATE, make_config, make_rows, run_stage
from tests.unit.trainer.hubs import COMMIT, Hub, hub_of
from tests.unit.trainer.stores import write_secret

from tuneloop_trainer.contract import DataSource, Evaluation, ExitCode, Reason, Repository, Stage, Suite
from tuneloop_trainer.data.fetching import Workspace
from tuneloop_trainer.data.repositories import chosen
from tuneloop_trainer.data.sources import Reading
from tuneloop_trainer.errors import Invalid, Unavailable

ROWS = make_rows(40)
OTHER_COMMIT = "f" * 40


def lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, object]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "nothing").mkdir()
    with hub_of(tmp_path / "nothing", monkeypatch, "datasets") as served:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        served.files = {
            "README.md": b"# rows",
            "rows.py": b"raise SystemExit('a loading script was run')",
            "data/train-00000-of-00002.parquet": parquet(ROWS[:20]),
            "data/train-00001-of-00002.parquet": parquet(ROWS[20:]),
            "data/test-00000-of-00001.parquet": parquet(make_rows(12, offset=1000)),
            "../train-escaped.jsonl": b"{}",
        }
        yield served


def source_of(path: str = "", **fields: Any) -> DataSource:
    place = {name: fields.pop(name) for name in ("revision", "credentials") if name in fields}
    return DataSource(uri=f"hf://org/tiny/{path}".rstrip("/"), repository=Repository(name="org/tiny", path=path, **place), **fields)


def reading_of(root: Path, path: str = "", **fields: Any) -> Reading:
    return Reading(source_of(path, **fields), Workspace(root / "work"))


def fill_cache(hub: Hub, root: Path, prefix: str) -> None:
    from huggingface_hub import hf_hub_download

    for name in hub.files:
        if name.startswith(prefix):
            hf_hub_download("org/tiny", name, repo_type="dataset", cache_dir=root / "hub")
    hub.asked.clear()


def downloads(hub: Hub) -> list[str]:
    return [asked.rpartition("/")[2] for asked in hub.asked if asked.startswith("GET /datasets")]


# --- what is read -------------------------------------------------------------


def test_the_training_split_is_read_at_its_commit_and_nothing_else_is_fetched(hub: Hub, tmp_path: Path) -> None:
    reading = reading_of(tmp_path)
    assert [row.values for row in reading.rows()] == ROWS
    assert reading.revision == COMMIT
    assert downloads(hub) == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [], "each file goes once it was read"


def test_a_run_is_prepared_from_the_hub_with_both_splits_at_one_commit(hub: Hub, tmp_path: Path, base: Path) -> None:
    suite = Suite(name="gate", type="Dataset", source=source_of("data/test-*.parquet", template=TEMPLATE), metrics=("Accuracy",))
    config = make_config(tmp_path, base, [source_of(template=TEMPLATE)], evaluation=Evaluation(suites=(suite,)))
    result = run_stage(config, Stage.PREPARE)

    assert result.exit_code == ExitCode.DONE, result.message
    assert result.prepare.rows_in == 40
    assert result.prepare.dataset_revisions == {"hf://org/tiny": COMMIT}
    card = json.loads((tmp_path / "work" / "prepare" / "card.json").read_text())
    assert card["sources"][0]["revision"] == COMMIT
    # The commit that was found for the suite is asked for by its name: main may have moved meanwhile.
    assert [asked for asked in hub.asked if asked.startswith("GET /api")][1:] == [f"GET /api/datasets/org/tiny/revision/{COMMIT}"]


def test_what_is_in_the_cache_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    fill_cache(hub, tmp_path, "data/train")
    assert [row.values for row in reading_of(tmp_path).rows()] == ROWS
    assert downloads(hub) == []


def test_offline_the_cache_alone_is_read(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_cache(hub, tmp_path, "data/")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    reading = reading_of(tmp_path, "data/test-00000-of-00001.parquet")
    assert len(list(reading.rows())) == 12
    assert reading.revision == COMMIT
    with pytest.raises(Invalid, match="is not in the hub's cache, and HF_HUB_OFFLINE forbids"):
        list(reading_of(tmp_path, revision=OTHER_COMMIT).rows())
    assert hub.asked == []
    assert (tmp_path / "hub").is_dir(), "the cache is not ours to tidy up"
    assert len(list((tmp_path / "hub").rglob("*.parquet"))) == 3


def test_the_token_of_the_source_is_sent_and_never_told(hub: Hub, tmp_path: Path) -> None:
    credentials = write_secret(tmp_path / "secret", token="hf_of_this_source")
    list(reading_of(tmp_path, credentials=credentials).rows())
    assert hub.tokens == {"Bearer hf_of_this_source"}

    hub.failures = [403]
    with pytest.raises(Invalid) as refused:
        list(reading_of(tmp_path, credentials=credentials).rows())
    assert "hf_of_this_source" not in str(refused.value)


FILES = ["README.md", "a.py", "data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet", "de/rows.csv", "en/rows.csv"]


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        (FILES, "", ["data/train-0.parquet", "data/train-1.parquet"]),
        (FILES, "data", ["data/train-0.parquet", "data/train-1.parquet"]),
        (FILES, "data/test-*.parquet", ["data/test-0.parquet"]),
        (FILES, "data/test-0.parquet", ["data/test-0.parquet"]),
        (FILES, "de/", ["de/rows.csv"]),
        (["b.jsonl", "a.jsonl", "x/.gitattributes"], "", ["a.jsonl", "b.jsonl"]),
        (["train.csv", "contest.csv"], "", ["train.csv"]),
        (["training/restrained.csv"], "", ["training/restrained.csv"]),
        (["trainer.csv"], "", ["trainer.csv"]),
    ],
)
def test_what_is_read_follows_from_the_names(names: list[str], path: str, expected: list[str]) -> None:
    assert chosen(names, path, "hf://org/tiny") == expected


@pytest.mark.parametrize(
    ("names", "path", "said"),
    [
        (["de/train.csv", "en/train.csv"], "", "has files in 2 folders: de, en. Name one of them in the uri."),
        (["test.csv", "validation.csv"], "", "has no training split; it has test.csv, validation.csv."),
        (["tiny.py", "README.md"], "", "loading scripts are not run"),
        (["rows.zip"], "rows.zip", "is of no known format"),
        (["train.csv"], "nowhere", "has no file that ends in"),
    ],
)
def test_what_is_not_plain_is_asked_for(names: list[str], path: str, said: str) -> None:
    with pytest.raises(Invalid, match=said):
        chosen(names, path, "hf://org/tiny")


# --- what goes wrong ----------------------------------------------------------


@pytest.mark.parametrize(("status", "reason"), [(404, Reason.DATA_INVALID), (401, Reason.ACCESS_DENIED), (403, Reason.ACCESS_DENIED)])
def test_refusal_of_the_hub_is_named_at_once(status: int, reason: Reason, hub: Hub, tmp_path: Path) -> None:
    hub.failures = [status] * 3
    with pytest.raises(Invalid, match="Dataset hf://org/tiny") as refused:
        list(reading_of(tmp_path).rows())
    assert refused.value.reason == reason
    assert len(hub.asked) == 1


def test_a_gated_set_that_may_be_looked_at_and_not_read_is_named(hub: Hub, tmp_path: Path) -> None:
    real = hub.answer

    def gated(handler: Any) -> None:
        hub.failures = [403] if "/resolve/" in handler.path else []
        real(handler)

    hub.answer = gated  # type: ignore[method-assign]
    with pytest.raises(Invalid, match="Dataset hf://org/tiny is gated") as refused:
        list(reading_of(tmp_path).rows())
    assert refused.value.reason == Reason.ACCESS_DENIED


@pytest.mark.parametrize("status", [500, 429, 0])
def test_a_hub_that_is_down_for_a_moment_is_asked_again_and_one_that_stays_down_is_told(status: int, hub: Hub, tmp_path: Path) -> None:
    hub.failures = [status, status]
    assert len(list(reading_of(tmp_path).rows())) == len(ROWS)
    hub.failures = [status] * 100
    with pytest.raises(Unavailable, match="The hub does not answer for hf://org/tiny") as away:
        list(reading_of(tmp_path).rows())
    assert away.value.reason == Reason.SOURCE_UNAVAILABLE


@pytest.mark.parametrize("name", ["data/train-00000-of-00002.parquet", "data/train.jsonl"])
def test_a_file_that_comes_otherwise_than_the_hub_has_it_is_not_read(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.files["data/train.jsonl"] = lines(ROWS)
    content = hub.files[name]
    hub.changed[name] = content[:-9] + b"changed" + content[-2:]
    with pytest.raises(Unavailable, match="came otherwise than the hub has it"):
        list(reading_of(tmp_path, name).rows())
    assert [path for path in (tmp_path / "work").rglob("*") if path.is_file()] == []


def test_a_revision_that_does_not_exist_is_named(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="does not exist at revision v9"):
        list(reading_of(tmp_path, revision="v9").rows())
