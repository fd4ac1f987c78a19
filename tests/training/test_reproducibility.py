"""The same spec, seed and data give the same shards and the same model, and the card tells where the model comes from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.unit.trainer.builders import make_config, make_rows, make_source, replace, run_stage, write_jsonl

from tuneloop_trainer.contract import ExitCode, RunConfig, Stage
from tuneloop_trainer.manifests import verify


def run_all(config: RunConfig) -> RunConfig:
    for stage in (Stage.PREPARE, Stage.TRAIN, Stage.PACKAGE):
        assert run_stage(config, stage).exit_code == ExitCode.DONE
    return config


def shards_digest(config: RunConfig) -> str:
    return str(run_stage(config, Stage.PREPARE).prepare.shards_digest)


def test_shards_are_the_same_with_one_and_two_threads_and_others_with_another_seed(tmp_path: Path, base: Path) -> None:
    one = make_config(tmp_path / "one", base, threads=1, validation_fraction=0.2)
    two = make_config(tmp_path / "two", base, threads=2, validation_fraction=0.2)
    assert shards_digest(one) == shards_digest(two)
    other = make_config(tmp_path / "other", base, validation_fraction=0.2)
    other = replace(other, training=other.training.model_copy(update={"seed": 1}))
    assert shards_digest(other) != shards_digest(one), "the seed draws what is held out"


def test_two_runs_of_one_spec_package_the_same_model(tmp_path: Path, base: Path) -> None:
    rows = make_source(write_jsonl(tmp_path / "rows.jsonl", make_rows(40)))
    first, second = (run_all(make_config(tmp_path / name, base, [rows])) for name in ("first", "second"))
    assert verify(Path(first.paths.artifact)).digest() == verify(Path(second.paths.artifact)).digest()


@pytest.mark.long
def test_shards_do_not_depend_on_the_process(tmp_path: Path, base: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.unit.trainer.builders import make_config, run_stage;"
        "from tuneloop_trainer.contract import Stage;"
        "print(run_stage(make_config(Path(sys.argv[1]), Path(sys.argv[2])), Stage.PREPARE).prepare.shards_digest)"
    )
    said = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", script, str(tmp_path / seed), str(base)]
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        said.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert said[0] == said[1] != ""


def test_card_has_a_header_for_hubs_and_the_counts_of_the_data(tmp_path: Path, base: Path) -> None:
    config = run_all(make_config(tmp_path, base))
    card = (Path(config.paths.artifact) / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {"base_model": "pvc://models/base", "library_name": "peft", "tags": ["tuneloop", "sft", "lora"]}
    assert "| rows trained on | 40 |" in card
    assert "The base model's files do not say" in card
    assert str(tmp_path) not in card
