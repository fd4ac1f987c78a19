"""The shape of the base model, read from its config and the headers of its weights: no tensor is loaded for it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneloop_trainer.contract import ModelShape

MAX_HEADER = 100 << 20
"""Bytes of a header; the format allows no larger one."""


def read_shape(folder: Path) -> ModelShape | None:
    """None where the config does not describe a transformer in the usual words, or the files cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return ModelShape.of(config, list(_headers(folder))) if isinstance(config, dict) else None
    except (OSError, ValueError, struct.error):
        return None


def _headers(folder: Path) -> Iterator[dict[str, Any]]:
    """The JSON at the beginning of each safetensors file, behind its length in eight bytes."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise ValueError(f"{path.name} has a header of {length} bytes")
            header = json.loads(file.read(length))
            yield header if isinstance(header, dict) else {}
