"""Checkpoints in parts: each process writes its share of weights and optimiser, and any number of processes takes them up again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, convert_outputs_to_fp32
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy

FOLDER = "parts"
MODEL, OPTIMIZER = "model", "optimizer"
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
"""Of a model with an adapter the adapter alone; the base is read where it lies."""


def keep_precision(arguments: Any) -> None:
    """Weights are gathered, and gradients reduced, as they are: in fp32 where they are trained."""
    if arguments.fsdp_plugin_args is not None:
        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()


def compute_in_half(model: Any, device: str) -> None:
    """What is computed in bf16 is autocast's choice, as accelerate does it for a model that is not divided. Not with autocast's cache,
    which would keep a copy of all layers' weights."""
    whole = model.forward

    @functools.wraps(whole)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
            return whole(*args, **kwargs)

    model.forward = convert_outputs_to_fp32(forward)


def divide_on_any_device(accelerator: Any, arguments: dict[str, Any]) -> None:
    """accelerate takes an FSDP plugin on devices only, and trains by DDP on CPUs without a word. What it does from then on is the same
    on both."""
    if accelerator.state.distributed_type != DistributedType.FSDP:
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**arguments)


def save(model: Any, optimizer: Any, folder: Path) -> None:
    """All processes at once: each writes a file of its own, and the first one the list of what lies where."""
    with _telling():
        dcp.save(_states(model, optimizer), checkpoint_id=folder / FOLDER, no_dist=not _is_together())


def load(model: Any, optimizer: Any, folder: Path) -> None:
    """Each process reads what is its own now, whoever wrote it."""
    found = _states(model, optimizer)
    with _telling():
        dcp.load(found, checkpoint_id=folder / FOLDER, no_dist=not _is_together())
    set_state_dict(model, _plain(optimizer), model_state_dict=found[MODEL], optim_state_dict=found[OPTIMIZER], options=OPTIONS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The whole weights that were trained, in the host's memory. Asks no other process."""
    reader = dcp.FileSystemReader(folder / FOLDER)
    kept = {
        name.removeprefix(f"{MODEL}."): of
        for name, of in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(f"{MODEL}.")
    }
    found = {name: torch.empty(of.size, dtype=of.properties.dtype) for name, of in kept.items() if isinstance(of, TensorStorageMetadata)}
    with _telling():
        dcp.load({MODEL: found}, storage_reader=reader, no_dist=True)
    return found


@contextmanager
def _telling() -> Iterator[None]:
    """torch tells all processes what failed in one of them, by an exception that is no Exception."""
    try:
        yield
    except CheckpointException as error:
        first = next((cause for cause, _ in error.failures.values()), None)
        raise first if isinstance(first, Exception) else RuntimeError(str(error)) from error


def _states(model: Any, optimizer: Any) -> dict[str, Any]:
    """Weights that are tied to others are these others."""
    weights, state = get_state_dict(model, _plain(optimizer), options=OPTIONS)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {MODEL: {name: weight for name, weight in weights.items() if name not in tied}, OPTIMIZER: state}


def _plain(optimizer: Any) -> Any:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _is_together() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())
