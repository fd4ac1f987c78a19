"""Rows are tokenised by several processes as by one: the same rows in the same order, and what goes wrong is told."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.trainer.builders import make_config, make_rows, make_source, replace, run_stage, write_jsonl

from tuneloop_trainer.contract import Reason, Stage
from tuneloop_trainer.data import parallel
from tuneloop_trainer.data.parallel import AHEAD, CHUNK_ITEMS, LEAST_ROWS, InOrder, processes
from tuneloop_trainer.errors import Invalid, OutOfMemory


def size_of(item: object) -> int:
    return 1


def results(call: Any, count: int, workers: int = 2) -> list[tuple[int, Any]]:
    return list(InOrder(call, size_of, workers).results(range(count)))


def test_results_come_in_the_order_of_the_items_from_other_processes() -> None:
    found = results(lambda number: (number * number, os.getpid()), 1050)
    assert [(item, square) for item, (square, _) in found] == [(number, number * number) for number in range(1050)]
    pids = {pid for _, (_, pid) in found}
    assert os.getpid() not in pids
    assert len(pids) <= 2


def test_one_worker_is_this_process() -> None:
    assert results(lambda number: os.getpid(), 3, workers=1) == [(number, os.getpid()) for number in range(3)]


def test_no_more_is_read_ahead_than_waits_for_the_processes() -> None:
    read = []

    def items() -> Iterator[int]:
        for number in range(100 * CHUNK_ITEMS):
            read.append(number)
            yield number

    for _ in zip(InOrder(str, size_of, 2).results(items()), range(1), strict=False):
        assert len(read) <= (2 * AHEAD + 2) * CHUNK_ITEMS


def test_what_is_wrong_with_a_row_is_told_with_its_reason() -> None:
    def refuse(number: int) -> int:
        if number == 700:
            raise Invalid("row 700 is wrong", Reason.DATA_EMPTY)
        return number

    with pytest.raises(Invalid, match="row 700 is wrong") as refused:
        results(refuse, 1000)
    assert (refused.value.reason, refused.value.exit_code) == (Reason.DATA_EMPTY, 10)


def test_a_process_that_is_killed_ends_the_stage_and_does_not_hang() -> None:
    def die(number: int) -> int:
        if number == 150:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(OutOfMemory, match="was killed"):
        results(die, 1000)


def prepared(root: Path, base: Path, threads: int, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[Any, dict[str, Any]]:
    monkeypatch.setattr(parallel, "LEAST_ROWS", 1)
    rows = [row | {"text": f"{row['text']} " + "very " * (int(str(row["id"])) * 7 % 24)} for row in make_rows(300)]
    config = make_config(root, base, [make_source(write_jsonl(root / "data" / "train.jsonl", rows))], threads=threads, **fields)
    result = run_stage(config, Stage.PREPARE)
    assert result.prepare is not None, result.message
    return result.prepare, json.loads((root / "work" / "prepare" / "card.json").read_text())


@pytest.mark.parametrize("packing", [False, True])
def test_the_content_digest_is_equal_for_one_and_two_workers(
    packing: bool, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_config(tmp_path / "x", base).training.model_copy(update={"packing": packing, "max_sequence_length": 112})
    pids: list[int] = []
    real = parallel._begin
    monkeypatch.setattr(parallel, "_processes", lambda call, workers, made=parallel._processes: pids.append(workers) or made(call, workers))
    one, first = prepared(tmp_path / "one", base, 1, monkeypatch, training=training)
    two, second = prepared(tmp_path / "two", base, 2, monkeypatch, training=training)

    assert parallel._begin is real
    assert pids == [2], "the second run had two processes, the first none"
    assert one.shards_digest == two.shards_digest
    assert (one.tokens, one.truncated, one.rows_kept, one.dropped) == (two.tokens, two.truncated, two.rows_kept, two.dropped)
    assert one.truncated > 0
    assert first == second


def test_few_rows_and_plug_ins_are_tokenised_in_one_process(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path, threads=3)
    assert processes(config, LEAST_ROWS) == 3
    assert processes(config, LEAST_ROWS - 1) == 1
    assert processes(replace(config, objective="Custom"), 10**6) == 1


def test_the_rate_is_measured_and_told(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr("tuneloop_trainer.stages.prepare.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    summary, _ = prepared(tmp_path, base, 1, monkeypatch)
    assert summary.rows_per_second == 30.0
    assert summary.peak_memory_bytes > 50 << 20
    shown = json.loads((tmp_path / "progress.json").read_text())
    assert shown["rowsPerSecond"] > 0
