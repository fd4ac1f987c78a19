"""`tuneloop estimate`: the operator's own arithmetic, on a folder with a model's config and headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneloop_operator.cli import main

CONFIG = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
}


def write_model(folder: Path, config: dict[str, Any] | None = None, parameters: int = 134_515_008) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"dtype": "BF16", "shape": [parameters], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def write_job(path: Path, **spec: Any) -> Path:
    whole = {
        "baseModel": {"uri": "pvc://models/base"},
        "data": {"train": [{"source": {"uri": "pvc://data/rows.jsonl"}}]},
        "output": {"model": "tiny", "store": {"uri": "pvc://models"}},
        "compute": {"acceleratorsPerNode": 0, "pod": {"resources": {"limits": {"cpu": "4", "memory": "4Gi"}}}},
    }
    path.write_text(
        yaml.safe_dump({"apiVersion": "tuneloop.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "tiny"}, "spec": whole | spec})
    )
    return path


def estimate(*arguments: object) -> int:
    return main(["estimate", *map(str, arguments)])


def test_a_job_is_estimated_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate("-f", write_job(tmp_path / "job.yaml"), "--model", write_model(tmp_path / "m"), "--rows", 5000, "--tokens", 60) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["device"] == "cpu"
    assert said["memoryLimitBytes"] == 4 << 30
    assert 1 << 30 < said["peakMemoryBytes"] < 4 << 30
    assert float(said["hoursTo"]) > float(said["hoursFrom"]) > 0


def test_what_does_not_fit_exits_with_one_and_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(
        tmp_path / "job.yaml", method={"type": "Full"}, compute={"acceleratorsPerNode": 1, "pod": {"nodeSelector": {"gpu": "l4"}}}
    )
    assert estimate("-f", job, "--model", write_model(tmp_path / "m", parameters=8 * 10**9)) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["device"] == "l4"
    assert err.startswith("tuneloop: DoesNotFit: Training needs about ")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"hidden_size": 8}, "does not tell layers"),
        ([], "does not tell layers"),
        ({"num_attention_heads": "9", "hidden_size": 8}, "does not tell"),
    ],
)
def test_a_config_without_the_usual_words_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any, sentence: str
) -> None:
    assert estimate("-f", write_job(tmp_path / "job.yaml"), "--model", write_model(tmp_path / "m", config)) == 1
    assert sentence in capsys.readouterr().err


def test_weights_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    assert estimate("-f", write_job(tmp_path / "job.yaml"), "--model", folder) == 1
    assert "is no safetensors file" in capsys.readouterr().err


def test_a_file_without_a_job_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert estimate("-f", tmp_path / "empty.yaml", "--model", tmp_path) == 1
    assert "holds 0 FineTuneJobs" in capsys.readouterr().err


def test_an_unknown_argument_is_refused_as_the_operator_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path / "job.yaml", training={"extraArguments": {"wieght_decay": "0.1"}})
    assert estimate("-f", job, "--model", write_model(tmp_path / "m")) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tuneloop: InvalidArgument: training.extraArguments has no 'wieght_decay' with SFT; did you mean weight_decay?")
