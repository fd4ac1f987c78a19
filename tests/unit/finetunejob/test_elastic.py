"""An elastic training goes on with the nodes that there are, and asks for all again."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.finetunejob.builders import World, failed, make_job, make_pod, make_spec
from tests.unit.finetunejob.test_nodes import env
from tests.unit.finetunejob.test_sizing import LLAMA, after_prepare

from tuneloop_operator.api.kubernetes import Pod
from tuneloop_operator.domain import times
from tuneloop_trainer.contract import Reason, Stage

LOST = failed(Stage.TRAIN, 14, Reason.INTERNAL_ERROR, "Another process of the training went away.")
NO_NODE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}


def elastic(nodes: int = 3, min_nodes: int | None = 1, devices: int = 0, batch: int = 12, **compute: Any) -> World:
    placing = {"nodes": nodes, "acceleratorsPerNode": devices} | compute
    if min_nodes is not None:
        placing["minNodes"] = min_nodes
    return World(job=make_job(make_spec(compute=placing, training={"globalBatchSize": batch}))).up_to(Stage.TRAIN)


def pod(found: World, index: int, *, is_placed: bool) -> Pod:
    run = found.current()
    state = {"running": {"startedAt": times.to_text(found.now)}} if is_placed else None
    made = make_pod(run.job, state, conditions=[] if is_placed else [NO_NODE])
    labels = {"batch.kubernetes.io/job-completion-index": str(index)}
    metadata = {"labels": labels, "name": f"p-{index}", "creation_timestamp": times.to_text(found.now)}
    return made.model_copy(update={"metadata": made.metadata.model_copy(update=metadata)})


def finds_nodes_for(found: World, *indices: int) -> None:
    """These pods of the current attempt run, and no node takes the others."""
    run = found.current()
    found.replace_run(run, pods=tuple(pod(found, index, is_placed=index in indices) for index in range(run.nodes)))
    found.settle()


def loses_a_node(found: World) -> None:
    found.ends(LOST)
    found.settle()
    found.wait(10)
    found.settle()


def test_training_that_lost_a_node_asks_for_all_and_goes_on_with_the_rest_after_a_minute() -> None:
    found = elastic()
    loses_a_node(found)
    assert found.current().nodes == 3
    finds_nodes_for(found, 0, 2)
    assert (found.job.status.phase, found.current().nodes) == ("Pending", 3)

    found.wait(60)
    found.settle()

    run = found.current()
    assert (run.number, run.nodes, found.job.status.attempts) == (3, 2, 3)
    assert env(run)["TUNELOOP_NODES"] == "2"
    assert "tweets-train-2" not in found.runs, "what it took the place of holds devices"
    assert found.message() == "The model is being trained on 2 of 3 nodes, with the same global batch: no node took the others."
    finds_nodes_for(found, 0, 1)
    assert (found.job.status.phase, found.message().startswith("The model is being trained on 2 of 3 nodes")) == ("Training", True)


def test_attempt_that_was_replaced_goes_even_where_the_operator_died_before_it_removed_it() -> None:
    found = elastic()
    finds_nodes_for(found, 0, 1)
    found.wait(60)
    old = found.current()
    found.settle()
    finds_nodes_for(found, 0, 1)
    found.runs[old.job.metadata.name] = old
    found.settle()

    assert found.current().number == 2
    assert list(found.runs) == ["tweets-prepare-1", "tweets-train-2"], "two attempts would write the same checkpoints"


def test_it_is_looked_at_again_when_the_minute_is_over() -> None:
    found = elastic()
    finds_nodes_for(found, 0)
    found.wait(50)
    assert found.decide().requeue_after == 10


def test_next_attempt_asks_for_all_nodes_again() -> None:
    found = elastic()
    finds_nodes_for(found, 0, 1)
    found.wait(60)
    found.settle()
    loses_a_node(found)
    assert found.current().nodes == 3


def test_node_that_could_not_be_had_uses_up_no_restart() -> None:
    found = elastic()
    for restart in range(1, 4):
        finds_nodes_for(found, 0)
        found.wait(60)
        found.settle()
        found.ends(LOST)
        found.settle()
        assert f"restart {restart} of 3" in found.message()
        found.wait(300)
        found.settle()


@pytest.mark.parametrize(
    ("batch", "devices", "placed", "nodes"),
    [
        (12, 0, (0, 1, 2), 3),
        (8, 0, (0, 1, 2), 2),  # 3 do not divide it
        (8, 4, (0, 1, 2), 2),
        (12, 0, (3,), 1),
    ],
)
def test_as_many_go_on_as_share_the_global_batch_evenly(batch: int, devices: int, placed: tuple[int, ...], nodes: int) -> None:
    found = elastic(nodes=4, batch=batch * max(1, devices), devices=devices)
    finds_nodes_for(found, *placed)
    found.wait(60)
    found.settle()
    assert found.current().nodes == nodes


def test_last_one_alone_is_an_ordinary_job_with_no_peers() -> None:
    found = elastic(nodes=2)
    finds_nodes_for(found, 1)
    found.wait(60)
    found.settle()
    run = found.current()
    assert "completionMode" not in run.manifest["spec"]
    assert env(run) == {}


@pytest.mark.parametrize(("min_nodes", "placed"), [(None, (0, 1)), (2, (0,)), (1, ())])
def test_it_waits_where_the_spec_wants_more_than_there_are(min_nodes: int | None, placed: tuple[int, ...]) -> None:
    found = elastic(min_nodes=min_nodes)
    finds_nodes_for(found, *placed)
    found.wait(3600)
    found.settle()
    assert (found.current().number, found.job.status.phase) == (1, "Pending")
    assert "0/3 nodes are available" in found.message()


def test_divided_model_needs_two_to_be_divided_among() -> None:
    found = elastic(nodes=3, parallelism="FSDP")
    finds_nodes_for(found, 0)
    found.wait(60)
    found.settle()
    assert found.current().nodes == 3
    finds_nodes_for(found, 0, 1)
    found.wait(60)
    found.settle()
    assert found.current().nodes == 2


def test_divided_model_has_to_fit_the_fewest_nodes_that_it_may_come_down_to() -> None:
    needed = {}
    for min_nodes in (None, 2):
        compute: dict[str, Any] = {"nodes": 8, "acceleratorsPerNode": 1, "parallelism": "FSDP"} | ({"minNodes": 2} if min_nodes else {})
        found = after_prepare(World(job=make_job(make_spec(compute=compute))), LLAMA)
        assert found.job.status.estimate is not None
        needed[min_nodes] = found.job.status.estimate.peak_memory_bytes
    assert needed[2] > needed[None]


def test_suspended_training_waits_for_no_node() -> None:
    found = elastic()
    finds_nodes_for(found, 0, 1)
    found.edit(make_spec(compute={"nodes": 3, "minNodes": 1}, runPolicy={"suspend": True}))
    found.wait(3600)
    found.settle()
    assert (found.job.status.phase, found.current().nodes) == ("Suspended", 3)
