"""What training devices hold and do: a small table, matched against the node labels that a job asks for.

Rates are what training reaches, not peaks; an interval, because batch, length and attention decide where in it a run lies. H100 from the
published 402 TFLOP/s of NeMo AutoModel (Llama 3 8B, LoRA) and 321 of torchtitan (8B, full); A100 from torchtitan's 140; the others are
a quarter to a half of the data sheets' dense bf16 rate. CPU: one core with AVX-512, measured here between 25 and 90 GFLOP/s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GIB = 1 << 30
TERA = 10**12


@dataclass(frozen=True)
class Device:
    """Memory in bytes; FLOP/s that training reaches, from and to; bytes of memory a second, by the data sheet."""

    name: str
    memory: int
    slowest: float
    fastest: float
    bandwidth: float


DEVICES = (
    Device("h200", 141 * 10**9, 200 * TERA, 420 * TERA, 4.8 * TERA),
    Device("h100", 80 * GIB, 200 * TERA, 400 * TERA, 3.35 * TERA),
    Device("a100-80gb", 80 * GIB, 80 * TERA, 180 * TERA, 2.0 * TERA),
    Device("a100", 40 * GIB, 80 * TERA, 180 * TERA, 1.55 * TERA),
    Device("l40s", 48 * 10**9, 80 * TERA, 180 * TERA, 0.86 * TERA),
    Device("a6000", 48 * 10**9, 35 * TERA, 80 * TERA, 0.77 * TERA),
    Device("a10", 24 * 10**9, 30 * TERA, 65 * TERA, 0.6 * TERA),
    Device("l4", 24 * 10**9, 25 * TERA, 60 * TERA, 0.3 * TERA),
    Device("t4", 16 * 10**9, 8 * TERA, 30 * TERA, 0.32 * TERA),
)
"""In this order: a longer name stands before the one that it holds."""
CPU_CORE = Device("cpu", 0, 20e9, 100e9, 10e9)
"""Of one core; its memory is the pod's."""


def device_of(labels: Iterable[str]) -> Device | None:
    """The first device whose name is part of one of these texts, for example the value of `nvidia.com/gpu.product`."""
    texts = [text.lower() for text in labels]
    return next((device for device in DEVICES if any(device.name in text for text in texts)), None)
