"""What share of a device's peak a training reaches is told where it is known, and near what others publish."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tuneloop_trainer.training.utilisation import utilisation

LLAMA_8B = SimpleNamespace(
    hidden_size=4096, num_hidden_layers=32, vocab_size=128_256, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14_336
)


def test_a_cpu_has_no_utilisation() -> None:
    assert utilisation(LLAMA_8B, 512.0, is_frozen=False, processes=1) is None


@pytest.mark.parametrize(("is_frozen", "expected"), [(False, 100 * 6 * 7.5e9 * 6667 / 989e12), (True, 100 * 4 * 7.5e9 * 6667 / 989e12)])
def test_utilisation_is_near_what_is_published_of_eight_billion_parameters(
    is_frozen: bool, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6,667 tokens a second on an H100 are a third of its peak: 6 FLOPs a parameter and token, 4 below frozen weights."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    found = utilisation(LLAMA_8B, 512.0, is_frozen=is_frozen, processes=1)
    shared = utilisation(LLAMA_8B, 512.0, is_frozen=is_frozen, processes=8)

    assert found is not None
    assert found(6667) == pytest.approx(expected, rel=0.05)
    assert shared is not None
    assert shared(8 * 6667) == pytest.approx(found(6667))


@pytest.mark.parametrize(("device", "model"), [("Some New Device", LLAMA_8B), ("NVIDIA H100 80GB HBM3", SimpleNamespace(d_model=8))])
def test_utilisation_of_what_is_not_known_is_not_told(device: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)

    assert utilisation(model, 512.0, is_frozen=False, processes=1) is None
