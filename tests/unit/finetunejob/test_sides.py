"""What an encoder-decoder takes to train is told from its two sides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tuneloop_operator.domain.finetunejob import estimates, sides
from tuneloop_operator.domain.finetunejob.estimates import Workload
from tuneloop_trainer.contract import ModelShape

T5_CONFIG = {
    "d_model": 512, "d_ff": 1024, "d_kv": 64, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 6, "vocab_size": 32_128,
    "is_encoder_decoder": True, "relative_attention_num_buckets": 32,
}  # fmt: skip
BART_CONFIG = {
    "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "num_hidden_layers": 6,
    "encoder_attention_heads": 12, "decoder_attention_heads": 12, "vocab_size": 50_265, "is_encoder_decoder": True,
    "attention_dropout": 0.1,
}  # fmt: skip


def shape_of(config: dict[str, Any], parameters: int) -> ModelShape:
    shape = ModelShape.of(config, [{"w": {"shape": [parameters]}}])
    assert shape is not None
    return shape


T5 = shape_of(T5_CONFIG, 76_961_152)
BART = shape_of(BART_CONFIG, 139_420_416)
WORK = Workload(
    shape=T5, method="LoRA", rank=16, only_attention=False, precision="BF16", device="cpu", micro_batch=1, accumulation=16, longest=1024,
    supervised_share=0.25, checkpointing=False,
)  # fmt: skip


def test_both_sides_of_a_config_are_read() -> None:
    assert (T5.encoder_layers, T5.layers, T5.heads, T5.head_size, T5.intermediate_size, T5.pairs) == (8, 8, 6, 64, 1024, "Biased")
    assert (BART.encoder_layers, BART.layers, BART.heads, BART.intermediate_size, BART.pairs) == (6, 6, 12, 3072, "Dropped")
    plain = shape_of(BART_CONFIG | {"attention_dropout": 0.0}, 1)
    assert plain.pairs is None
    assert shape_of(T5_CONFIG | {"is_encoder_decoder": False}, 1).encoder_layers is None


def test_lora_adapts_the_attention_of_the_decoder_to_the_encoder_too() -> None:
    assert estimates.trained_parameters(WORK) == 16 * (8 * (4 * 896 + 3 * 1536) + 8 * (8 * 896 + 3 * 1536))
    assert sides.adapted_parameters(BART, 8, only_attention=True) == 8 * (6 * 4 * 1536 + 6 * 8 * 1536)


@pytest.mark.parametrize(
    ("change", "grows"),
    [
        ({"longest": 2048}, True),
        ({"method": "Full"}, True),
        ({"precision": "FP32"}, True),
        ({"checkpointing": True}, False),
        ({"micro_batch": 2}, True),
        ({"supervised_share": 0.5}, True),
        ({"shape": T5.model_copy(update={"pairs": None})}, False),
        ({"shape": T5.model_copy(update={"encoder_layers": 4})}, False),
    ],
)
def test_each_setting_moves_the_peak_of_an_encoder_decoder(change: dict[str, Any], grows: bool) -> None:
    before, after = estimates.peak_memory(WORK), estimates.peak_memory(replace(WORK, **change))
    assert after > before if grows else after < before


def test_dropped_scores_are_kept_on_a_cpu_alone() -> None:
    def peaks(pairs: str | None, device: Any) -> int:
        return estimates.peak_memory(replace(WORK, shape=BART.model_copy(update={"pairs": pairs}), device=device))

    assert peaks("Dropped", "cpu") > peaks(None, "cpu")
    assert peaks("Dropped", "cuda") == peaks(None, "cuda")


def test_a_token_goes_through_its_own_side() -> None:
    whole = 6 * sum(sides.weights_of_a_token(T5, share) for share in (0.0, 1.0))
    one_head = T5.parameters - T5.vocabulary * T5.hidden_size
    assert whole == pytest.approx(6 * one_head, rel=0.01), "both sides together are the model, less the embeddings, which compute nothing"
    assert estimates.flops_per_token(replace(WORK, method="Full")) < whole
