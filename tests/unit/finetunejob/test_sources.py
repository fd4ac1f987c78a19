"""Rows of a bucket and of the hub are read by prepare alone, with keys that come as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.finetunejob.builders import World, make_job, make_spec, prepared
from tests.unit.finetunejob.test_pushing import secrets_of

from tuneloop_operator.api.finetunejob import Resolved
from tuneloop_operator.render.run_config import run_config
from tuneloop_trainer import contract
from tuneloop_trainer.contract import Stage

ROOT = Path(__file__).parents[3]

KEYS = {"secretRef": {"name": "bucket-keys"}}
TEMPLATE = {"prompt": "{{ text }}", "completion": "{{ label }}"}


def make_world() -> World:
    train = [
        {"source": {"uri": "s3://datasets/tweets/", **KEYS}, "template": TEMPLATE},
        {"source": {"uri": "s3://archive/old.jsonl", "secretRef": {"name": "archive-keys"}}, "template": TEMPLATE},
        {"source": {"uri": "pvc://rows/new.jsonl"}, "template": TEMPLATE},
    ]
    suite = {"name": "gate", "dataset": {"source": {"uri": "s3://datasets/gate.csv", **KEYS}, "template": TEMPLATE}}
    return World(job=make_job(make_spec(data={"train": train}, evaluation={"suites": [suite]})))


def test_only_prepare_sees_the_keys_once_for_each_secret() -> None:
    for stage in Stage:
        world = make_world().up_to(stage)
        wanted = {f"/etc/tuneloop/sources/{name}": name for name in ("archive-keys", "bucket-keys")} if stage is Stage.PREPARE else {}
        assert secrets_of(world) == wanted
        container = world.current().manifest["spec"]["template"]["spec"]["containers"][0]
        assert "-keys" not in str(container["env"]) + str(container["args"])


def test_the_configuration_names_bucket_and_folder_of_the_keys() -> None:
    world = make_world().up_to(Stage.PREPARE)
    told: dict[str, Any] = world.config(world.current())
    first, second, third = told["train"]
    assert (first["uri"], first["path"]) == ("s3://datasets/tweets/", None)
    assert first["bucket"] == {"path": "datasets/tweets/", "credentials": "/etc/tuneloop/sources/bucket-keys"}
    assert second["bucket"] == {"path": "archive/old.jsonl", "credentials": "/etc/tuneloop/sources/archive-keys"}
    assert (third["bucket"], third["path"]) == (None, "/volumes/rows/new.jsonl")
    assert told["evaluation"]["suites"][0]["source"]["bucket"]["path"] == "datasets/gate.csv"


@pytest.mark.parametrize(
    ("uri", "name", "path"),
    [
        ("hf://org/tiny", "org/tiny", ""),
        ("hf://org/tiny/data/test-*.parquet", "org/tiny", "data/test-*.parquet"),
        ("hf://datasets/org/tiny/de/", "org/tiny", "de"),
        ("hf://datasets/tiny", "datasets/tiny", ""),
    ],
)
def test_a_repository_is_named_as_the_hub_names_it(uri: str, name: str, path: str) -> None:
    source = {"uri": uri, "revision": "main", "secretRef": {"name": "hub-token"}}
    config = run_config(make_job(make_spec(data={"train": [{"source": source, "template": TEMPLATE}]})), Resolved())
    told = contract.Repository(name=name, path=path, revision="main", credentials="/etc/tuneloop/sources/hub-token")
    assert config.train[0].repository == told


def test_the_commit_that_was_read_is_pinned_in_the_status() -> None:
    world = make_world().up_to(Stage.PREPARE)
    said = prepared()
    assert said.prepare is not None
    found = {"hf://org/tiny": "f" * 40}
    world.ends(said.model_copy(update={"prepare": said.prepare.model_copy(update={"dataset_revisions": found})}))
    world.settle()
    assert world.job.status.resolved.dataset_revisions == found


def test_a_bucket_is_no_claim() -> None:
    world = make_world().up_to(Stage.PREPARE)
    volumes = world.current().manifest["spec"]["template"]["spec"]["volumes"]
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume}
    assert "rows" in claims
    assert not claims & {"datasets", "archive"}


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "data").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_of_data_is_rendered_and_judged(path: Path) -> None:
    config = run_config(make_job(yaml.safe_load(path.read_text())["spec"]), Resolved())
    assert config.evaluation.gates
    places = {"s3": "bucket", "hub": "repository", "curated": "path", "conversations": "path", "votes": "uri"}
    assert all(getattr(source, places[path.stem]) for source in config.train)
    curated = {name for name, value in config.curation if value != getattr(contract.Curation(), name)}
    assert curated == ({"deduplicate", "personal_data", "quality", "languages", "max_toxicity"} if path.stem == "curated" else set())
