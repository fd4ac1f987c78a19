"""The shape of the base model, read from its config and the headers of its weights: no tensor is loaded for it."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneloop_trainer.contract import ModelShape

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d{1,4})\.")
MAX_HEADER = 100 << 20
"""Bytes of a header; the format allows no larger one."""


def read_shape(folder: Path) -> ModelShape | None:
    """None where the config does not describe a transformer in the usual words, or the files cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return ModelShape.of(config, list(_headers(folder))) if isinstance(config, dict) else None
    except (OSError, ValueError, struct.error):
        return None


def layers_missing(folder: Path) -> tuple[int, int] | None:
    """Layers that the config speaks of, and those that the weights have, where they are fewer: they would be drawn at random."""
    config = json.loads((folder / "config.json").read_text())
    if not isinstance(config, dict):
        return None
    named = next((config[word] for word in LAYERS if isinstance(config.get(word), int)), 0)
    found = [int(match[1]) for header in _headers(folder) for name in header if (match := LAYER.search(name))]
    has = max(found, default=-1) + 1
    return (named, has) if 0 < has < named else None


def _headers(folder: Path) -> Iterator[dict[str, Any]]:
    """The JSON at the beginning of each safetensors file, behind its length in eight bytes."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise ValueError(f"{path.name} has a header of {length} bytes")
            header = json.loads(file.read(length))
            yield header if isinstance(header, dict) else {}
