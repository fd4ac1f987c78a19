"""Several processes that train together see the rows of one, in its order, and come to its losses; they stop and resume as one."""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.training.conftest import Attempt, Zygote, free_port
from tests.training.runs import forwards, killed_and_resumed, losses, prepared_run, rows_of_steps, rows_together, together, wait_for_step
from tests.unit.trainer.builders import copy_work

from tuneloop_trainer.contract import (
    ENV_NODES,
    ENV_RENDEZVOUS,
    ExactMatch,
    ExitCode,
    Quantization,
    Reward,
    Rollouts,
    RunConfig,
    Stage,
    StageResult,
)
from tuneloop_trainer.workers import ENV_NODE

STEPS = 12


@pytest.fixture(scope="module")
def prepared(zygote: Zygote, base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Without dropout, whose random numbers each process draws for itself."""
    return prepared_run(zygote, base, tmp_path_factory.mktemp("prepared"), STEPS, dropout=0.0)


def assert_as_alone(config: RunConfig, alone: RunConfig) -> None:
    assert rows_together(config) == {step: sorted(rows) for step, rows in rows_of_steps(alone).items()}
    assert {forward.rank for forward in forwards(config)} == {0, 1}
    assert losses(config) == pytest.approx(losses(alone), rel=0.02)


def assert_taken_up_by_one(config: RunConfig, alone: RunConfig, at: int) -> None:
    """Two did the steps up to `at`, one the others: no row is left out, and none comes twice."""
    of_two = {step: rows for step, rows in rows_together(config).items() if step <= at}
    of_one = {step: sorted(rows) for step, rows in rows_of_steps(config).items() if step > at}
    assert of_two | of_one == {step: sorted(rows) for step, rows in rows_of_steps(alone).items()}
    assert losses(config) == pytest.approx(losses(alone), rel=0.02)


def test_two_processes_train_as_one_does(zygote: Zygote, prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path) -> None:
    config = copy_work(prepared, tmp_path)

    result = zygote.run(config, Stage.TRAIN, **together())

    assert result.exit_code == ExitCode.DONE
    assert result.train is not None
    assert (result.train.step, result.train.samples) == (STEPS, 4 * STEPS)
    assert_as_alone(config, undisturbed)


def test_signal_to_one_process_stops_both_at_the_same_step_and_one_takes_it_up(
    zygote: Zygote, prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path
) -> None:
    config = copy_work(prepared, tmp_path)
    attempt = zygote.start(config, Stage.TRAIN, **together())
    wait_for_step(attempt, config, 4)

    attempt.signal_worker(attempt.workers()[1], signal.SIGTERM)
    code = attempt.wait()
    stopped = attempt.result().train
    finished = zygote.run(config, Stage.TRAIN).train  # with another number of processes

    assert code == ExitCode.INTERRUPTED
    assert stopped is not None
    assert finished is not None
    assert (finished.resumed_from_step, finished.steps_lost) == (stopped.step, 0)
    assert_taken_up_by_one(config, undisturbed, stopped.step)


@pytest.mark.parametrize("rest", [2, 1])
def test_process_that_is_killed_ends_all_and_they_or_the_rest_go_on(
    zygote: Zygote, prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path, rest: int
) -> None:
    config = copy_work(prepared, tmp_path)

    assert killed_and_resumed(zygote, config, rest).resumed_from_step == 5
    assert_as_alone(config, undisturbed) if rest == 2 else assert_taken_up_by_one(config, undisturbed, 5)


@pytest.mark.parametrize("index", [0, 1])
def test_process_that_waits_for_others_gives_its_devices_back_at_once(
    zygote: Zygote, prepared: RunConfig, tmp_path: Path, index: int
) -> None:
    config, port = copy_work(prepared, tmp_path), free_port()
    place = {ENV_NODES: "2", ENV_NODE: str(index), ENV_RENDEZVOUS: f"127.0.0.1:{free_port()}", "PROGRESS_PORT": str(port)}
    attempt = zygote.start(config, Stage.TRAIN, **place)
    wait_for_phase(port, "WaitingForPeers")

    attempt.signal_launcher(signal.SIGTERM)

    assert attempt.wait() == ExitCode.INTERRUPTED


@pytest.mark.long
def test_completions_of_one_prompt_are_written_and_compared_by_two_processes(zygote: Zygote, base: Path, tmp_path: Path) -> None:
    rollouts = Rollouts(rewards=(Reward(exact_match=ExactMatch()),), num_generations=4, max_completion_length=4)
    config = prepared_run(zygote, base, tmp_path / "alone", 4, objective="GRPO", rollouts=rollouts)
    both = copy_work(config, tmp_path / "both")

    results = [zygote.run(config, Stage.TRAIN), zygote.run(both, Stage.TRAIN, **together())]

    assert [result.exit_code for result in results] == [ExitCode.DONE, ExitCode.DONE]
    assert rows_together(both) == {step: sorted(rows) for step, rows in rows_of_steps(config).items()}
    assert {step: len(set(rows)) for step, rows in rows_together(both).items()} == dict.fromkeys(range(1, 5), 1), "one prompt a step"
    assert {forward.rank: len(forward.rows) for forward in forwards(both)} == {0: 2, 1: 2}


@pytest.mark.long
def test_two_processes_train_an_adapter_on_a_base_in_four_bits_as_one_does(zygote: Zygote, base: Path, tmp_path: Path) -> None:
    alone = prepared_run(zygote, base, tmp_path / "alone", 6, dropout=0.0, quantization=Quantization())
    both = copy_work(alone, tmp_path / "both")

    results = [zygote.run(alone, Stage.TRAIN), zygote.run(both, Stage.TRAIN, **together())]

    assert [result.exit_code for result in results] == [ExitCode.DONE, ExitCode.DONE]
    assert_as_alone(both, alone)


@pytest.mark.long
def test_two_launchers_as_two_pods_train_as_one_process_does(
    zygote: Zygote, prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path
) -> None:
    config = copy_work(prepared, tmp_path / "shared")
    with two_nodes(zygote, config, tmp_path) as (first, second):
        codes = (first.wait(), second.wait())

    assert codes == (ExitCode.DONE, ExitCode.DONE)
    assert_as_alone(config, undisturbed)
    told = StageResult.model_validate_json((tmp_path / "first" / "termination").read_bytes())
    assert told.uri is not None, "the first one publishes"


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_node_that_is_lost_without_a_word_ends_the_other_which_goes_on_alone(
    zygote: Zygote, prepared: RunConfig, undisturbed: RunConfig, tmp_path: Path, lost: int
) -> None:
    """As an elastic training does it. The first node holds the rendezvous, and writes the checkpoints."""
    config = copy_work(prepared, tmp_path / "shared")
    with two_nodes(zygote, config, tmp_path) as nodes:
        wait_for_step(nodes[1], config, 7)
        nodes[lost].kill_all()
        codes = [node.wait() for node in nodes]
    finished = zygote.run(config, Stage.TRAIN).train

    assert codes[1 - lost] == ExitCode.PEER_LOST
    assert finished is not None
    assert (finished.resumed_from_step, finished.step) == (5, STEPS)
    assert_taken_up_by_one(config, undisturbed, 5)


@contextmanager
def two_nodes(zygote: Zygote, config: RunConfig, folder: Path) -> Iterator[tuple[Attempt, Attempt]]:
    """Two launchers, each with its own scratch and termination message, on one store, as the pods of an Indexed Job."""
    other = Zygote()
    rendezvous = {ENV_NODES: "2", ENV_RENDEZVOUS: f"127.0.0.1:{free_port()}"}
    try:
        second = other.start(config, Stage.TRAIN, **rendezvous, **own_place(folder / "second", index=1))
        first = zygote.start(config, Stage.TRAIN, **rendezvous, **own_place(folder / "first", index=0))
        yield first, second
    finally:
        other.stop()


def own_place(folder: Path, index: int) -> dict[str, str]:
    folder.mkdir()
    return {ENV_NODE: str(index), "TERMINATION_PATH": str(folder / "termination"), "TMPDIR": str(folder)}


def wait_for_phase(port: int, phase: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=2) as answer:
            if json.loads(answer.read())["phase"] == phase:
                return
        time.sleep(0.05)
    raise AssertionError(f"never in phase {phase}")
