"""The base model's shape is read from its config and its headers, and tells so in few bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.trainer.builders import make_config, run_stage

from tuneloop_trainer.contract import ModelShape, Stage
from tuneloop_trainer.shapes import read_shape


def test_shape_is_that_of_the_loaded_model(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    shape = read_shape(base)
    assert shape is not None
    assert shape.parameters == model.num_parameters()
    assert (shape.hidden_size, shape.intermediate_size, shape.layers, shape.heads, shape.key_value_heads) == (32, 64, 2, 4, 2)
    assert (shape.head_size, shape.vocabulary) == (8, 400)


def test_prepare_tells_the_shape_and_the_longest_row(tmp_path: Path, base: Path) -> None:
    from tuneloop_trainer.data.shards import read_table

    summary = run_stage(make_config(tmp_path, base), Stage.PREPARE).prepare
    assert summary.model == read_shape(base)
    assert summary.longest_row == max(read_table(tmp_path / "work" / "prepare", "train")["length"].to_pylist())


def test_shape_at_its_maximum_takes_at_most_210_bytes() -> None:
    largest = ModelShape(
        parameters=10**13,
        hidden_size=10**6,
        intermediate_size=10**6,
        layers=10**4,
        heads=10**4,
        key_value_heads=10**4,
        head_size=10**4,
        vocabulary=10**7,
        encoder_layers=10**4,
        pairs="Dropped",
    )
    assert len(largest.model_dump_json(by_alias=True)) <= 210


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ({"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 100}, True),
        ({"text_config": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100}}, True),
        ({"d_model": 64, "num_heads": 4, "num_layers": 2, "vocab_size": 100, "d_ff": 128, "d_kv": 16}, True),
        ({"hidden_size": 64, "num_attention_heads": 0, "num_hidden_layers": 2, "vocab_size": 100}, False),
        ({"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 10**9, "vocab_size": 100}, False),
        ({}, False),
    ],
)
def test_other_words_for_the_same_are_understood(config: dict[str, object], known: bool) -> None:
    assert (ModelShape.of(config, [{"w": {"shape": [10, 10]}}]) is not None) == known


def test_unreadable_weights_leave_the_shape_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 9})
    )
    (tmp_path / "model.safetensors").write_bytes(b"\x01")
    assert read_shape(tmp_path) is None
