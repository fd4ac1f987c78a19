"""A sample of what users would have said goes with the model: by the sources' weights, bounded, and only of what a user can say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.unit.trainer.builders import make_config, make_rows, make_source, run_stage, write_jsonl

from tuneloop_trainer.contract import REFERENCE_FILE, Artifact, Stage
from tuneloop_trainer.data import reference
from tuneloop_trainer.data.records import Record
from tuneloop_trainer.data.reference import write_reference
from tuneloop_trainer.manifests import verify
from tuneloop_trainer.stages.evaluate import conclude


def records(name: str, count: int, **fields: Any) -> list[Record]:
    return [Record(f"Q: {name} {n}", "yes", f"{name}-{n}", name, n, **({"user": f"{name} {n}"} | fields)) for n in range(count)]


def written(folder: Path, sources: Sequence[list[Record]], weights: Sequence[float], seed: int = 0) -> list[str] | None:
    train = [make_source(folder / f"{n}.jsonl", weight=weight) for n, weight in enumerate(weights)]
    config = make_config(folder, folder, train)
    seeded = config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})
    write_reference(seeded, sources, folder)  # type: ignore[arg-type]
    path = folder / REFERENCE_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def test_what_a_user_would_say_is_drawn_by_the_weights_of_the_sources_and_always_alike(tmp_path: Path) -> None:
    texts = written(tmp_path, [records("old", 3000), records("new", 900)], [0.5, 0.5])

    assert texts is not None
    assert [sum(text.startswith(name) for text in texts) for name in ("old", "new")] == [500, 500]
    assert len(set(texts)) == 1000
    assert not any(text.startswith("Q:") for text in texts), "the prompt's template is the gateway's"
    assert written(tmp_path, [records("old", 3000), records("new", 900)], [0.5, 0.5]) == texts
    assert written(tmp_path, [records("old", 3000), records("new", 900)], [0.5, 0.5], seed=1) != texts


@pytest.mark.parametrize("rows", [records("few", 299), records("columns", 500, user=None), records("turns", 500, system="Be brief.")])
def test_nothing_is_written_of_too_few_rows_that_a_user_could_say(rows: list[Record], tmp_path: Path) -> None:
    assert written(tmp_path, [rows], [1.0]) is None


def test_the_sample_is_bounded(tmp_path: Path) -> None:
    long = [Record("p", str(n), str(n), "c", n, user="\u00e9\ud800" * 20_000 + str(n)) for n in range(400)]

    texts = written(tmp_path, [long], [1.0])

    assert texts is not None
    assert len(texts) == 400
    assert (tmp_path / REFERENCE_FILE).stat().st_size < reference.MAX_BYTES


def test_prepare_writes_it_beside_its_rows(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MIN_TEXTS", 30)
    rows = make_rows(40)
    config = make_config(tmp_path, base, [make_source(write_jsonl(tmp_path / "data" / "train.jsonl", rows))])

    assert run_stage(config, Stage.PREPARE).exit_code == 0

    folder = tmp_path / "work" / "prepare"
    assert REFERENCE_FILE in {file.path for file in verify(folder).files}
    assert set(json.loads((folder / REFERENCE_FILE).read_text())) == {row["text"] for row in rows}


@pytest.mark.parametrize("has_one", [True, False])
def test_evaluate_puts_it_beside_its_full_result(tmp_path: Path, has_one: bool) -> None:
    config = make_config(tmp_path, tmp_path)
    prepared = tmp_path / "work" / "prepare"
    prepared.mkdir(parents=True)
    if has_one:
        (prepared / REFERENCE_FILE).write_text('["a"]')

    result = conclude(config, Artifact(path="a", manifest_digest="sha256:1", format="Adapter", base=config.base), {}, {}, {}, {}, [])

    assert result.evaluate is not None
    assert result.evaluate.has_reference is has_one
    assert result.uri is not None
    assert (Path(result.uri).parent / REFERENCE_FILE).is_file() is has_one
