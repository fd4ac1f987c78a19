"""The head on labelled positions gives the loss and gradients of TRL's own path; packed rows those of unpacked ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM
from trl import SFTConfig, SFTTrainer

from tuneloop_trainer.chat import IGNORED
from tuneloop_trainer.data.packing import pack
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.training import heads
from tuneloop_trainer.training.heads import has_plain_head, select_positions

TINY = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def rows() -> list[TokenRow]:
    """Rows of several lengths, whose last tokens are learned; one has none to learn from."""
    random = torch.Generator().manual_seed(7)
    made = []
    for length, learned in ((9, 3), (5, 2), (12, 7), (4, 0)):
        ids = torch.randint(3, 97, (length,), generator=random).tolist()
        made.append(TokenRow(ids, [IGNORED] * (length - learned) + ids[length - learned :], "d", length - learned))
    return made


def dataset(made: list[TokenRow]) -> Dataset:
    return Dataset.from_list(
        [{"input_ids": row.input_ids, "labels": row.labels, "seq_lengths": list(row.sequences or (len(row.input_ids),))} for row in made]
    )


def make_model(base: Path, method: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    if method == "Full":
        return model
    torch.manual_seed(1)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, adapter)


def step(base: Path, tmp_path: Path, method: str, made: list[TokenRow], packed: bool, selects: bool, items: int | None) -> Any:
    """Loss and gradients of one batch, and what TRL counted."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    arguments = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, padding_free=packed, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, report_to="none",
    )  # fmt: skip
    data = dataset(made)
    trainer = SFTTrainer(model=make_model(base, method), args=arguments, train_dataset=data, processing_class=tokenizer)
    if selects:
        assert select_positions(trainer.model)
    trainer.model.train()
    batch = trainer.data_collator([{key: row[key] for key in ("input_ids", "labels", "seq_lengths")} for row in data])
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradients, metrics


def assert_equal(left: Any, right: Any) -> None:
    assert left[0] == pytest.approx(right[0], rel=1e-5)
    assert left[1].keys() == right[1].keys()
    for name, gradient in left[1].items():
        torch.testing.assert_close(gradient, right[1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["LoRA", "Full"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("items", [None, 40])
def test_head_on_learned_positions_gives_the_loss_and_gradients_of_trl(
    base: Path, tmp_path: Path, method: str, packed: bool, items: int | None
) -> None:
    made = pack(rows(), 64) if packed else rows()
    theirs = step(base, tmp_path, method, made, packed, selects=False, items=items)
    ours = step(base, tmp_path, method, made, packed, selects=True, items=items)

    assert_equal(ours, theirs)
    assert ours[2] == pytest.approx(theirs[2], rel=1e-4), "token counts, entropy and accuracy are TRL's"


def test_logits_in_several_chunks_give_the_same(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = step(base, tmp_path, "Full", rows(), packed=False, selects=False, items=None)
    monkeypatch.setattr(heads, "POSITIONS_AT_ONCE", 3)

    assert_equal(step(base, tmp_path, "Full", rows(), packed=False, selects=True, items=None), theirs)


def test_rows_without_a_learned_token_have_no_loss_and_no_gradient(base: Path, tmp_path: Path) -> None:
    loss, gradients, _ = step(base, tmp_path, "Full", rows()[-1:], packed=False, selects=True, items=None)

    assert loss == 0.0
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_packed_rows_give_the_loss_and_gradients_of_unpacked_rows(base: Path, tmp_path: Path, method: str) -> None:
    unpacked = step(base, tmp_path, method, rows(), packed=False, selects=True, items=None)
    packed = step(base, tmp_path, method, pack(rows(), 64), packed=True, selects=True, items=None)

    assert len(pack(rows(), 64)) == 1
    assert_equal(packed, unpacked)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=30.0)), id="soft-capping"),
        pytest.param(lambda: CohereForCausalLM(CohereConfig(**TINY, logit_scale=0.25)), id="logit-scale"),
        pytest.param(lambda: GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=8.0)), id="logits-scaling"),
    ],
)
def test_model_whose_logits_are_more_than_its_head_keeps_its_own_forward(model: Any) -> None:
    built = model()
    before = built.forward

    assert not has_plain_head(built)
    assert not select_positions(built)
    assert built.forward == before


def test_completions_of_a_temperature_have_the_chances_that_trl_gives_them(base: Path) -> None:
    from trl.trainer.utils import add_fused_lm_head

    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(3))
    labels = ids.masked_fill(torch.arange(12) < 5, IGNORED)
    model = make_model(base, "Full").eval()
    add_fused_lm_head(model, temperature=0.6, outputs=("log_probs", "entropy"))
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
        assert select_positions(model, 0.6)
        ours = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)

    torch.testing.assert_close(ours.log_probs[:, -7:], theirs.log_probs[:, -7:])
    torch.testing.assert_close(ours.entropy[:, -7:], theirs.entropy[:, -7:])
