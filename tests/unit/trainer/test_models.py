"""A model is loaded whole or not at all: no weight of it is drawn at random without anybody having asked."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tuneloop_trainer import models
from tuneloop_trainer.contract import Reason
from tuneloop_trainer.errors import Invalid

LABELS = ("good", "bad")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def deepen(folder: Path) -> None:
    """The config speaks of a layer that the weights do not have."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"num_hidden_layers": 3, "layer_types": None}))


def test_tied_weights_are_no_missing_ones(base: Path) -> None:
    assert models.load_model(base, "tiny", "float32").config.tie_word_embeddings


def test_layer_without_weights_is_not_drawn_at_random(copy: Path) -> None:
    deepen(copy)

    with pytest.raises(Invalid, match=r"Model tiny does not load .* lack 9 of the weights .*model\.layers\.2") as caught:
        models.load_model(copy, "tiny", "float32")
    assert caught.value.reason == Reason.MODEL_NOT_FOUND


def test_layer_without_weights_is_not_drawn_for_a_classifier(copy: Path) -> None:
    deepen(copy)

    with pytest.raises(Invalid, match=r"lack 9 of the weights"):
        models.load_classifier(copy, "tiny", "float32", LABELS)


def test_body_of_another_size_is_not_drawn_for_a_classifier(copy: Path) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 80}))

    with pytest.raises(Invalid, match=r"lack 6 of the weights"):
        models.load_classifier(copy, "tiny", "float32", LABELS)


def test_classifier_gets_a_new_head_when_it_is_to_be_trained_only(base: Path, tmp_path: Path) -> None:
    trained = models.load_classifier(base, "tiny", "float32", LABELS)
    trained.save_pretrained(tmp_path / "whole")
    headless = {name: tensor for name, tensor in trained.state_dict().items() if not name.startswith("score")}
    trained.save_pretrained(tmp_path / "headless", state_dict=headless)

    assert models.load_classifier(tmp_path / "whole", "tiny", "float32", None).config.num_labels == 2
    with pytest.raises(Invalid, match=r"lack 1 of the weights .*score\.weight"):
        models.load_classifier(tmp_path / "headless", "tiny", "float32", None)


@pytest.mark.parametrize("size", [0, 100, 60_000])
def test_broken_weights_are_named(size: int, copy: Path) -> None:
    os.truncate(copy / "model.safetensors", size)

    with pytest.raises(Invalid, match="Model tiny does not load"):
        models.load_model(copy, "tiny", "float32")
    with pytest.raises(Invalid, match="Model tiny does not load"):
        models.load_classifier(copy, "tiny", "float32", LABELS)
