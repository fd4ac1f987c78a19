"""What an encoder-decoder writes, and how likely it finds what it should have written; how like two texts are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tuneloop_trainer.evaluation.scoring import Done, batches, right_padded
from tuneloop_trainer.models import Model

ASKED = 500
"""Items of a suite that answers are written to: enough for a gate's 400, and bounded where a beam search takes a second an item."""
IGNORED = -100


@torch.inference_mode()
def losses(model: Model, items: Sequence[tuple[list[int], list[int]]], done: Done) -> list[tuple[float, int]]:
    """Per source and target the target's summed negative log-probability, and its tokens."""
    found: list[tuple[float, int]] = [(0.0, 0)] * len(items)
    finished = 0
    for batch in batches([len(source) + len(target) for source, target in items], model.device.type):
        ids, mask = right_padded([items[index][0] for index in batch], model.device)
        targets, kept = right_padded([items[index][1] for index in batch], model.device)
        before = model.prepare_decoder_input_ids_from_labels(targets.masked_fill(kept == 0, IGNORED))
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=before, use_cache=False).logits
        chances = torch.log_softmax(logits.float(), dim=-1).gather(2, targets.unsqueeze(2)).squeeze(2)
        for index, row in zip(batch, -(chances * kept).sum(1), strict=True):
            found[index] = (float(row), len(items[index][1]))
        finished += len(batch)
        done(finished)
    return found


def answers(model: Model, sources: Sequence[list[int]], max_tokens: int, beams: int, done: Done) -> list[list[int]]:
    """The answer to each source: the likeliest token after token, or with beams the likeliest of so many whole ones."""
    settings = _generation(model, max_tokens, beams)
    found: list[list[int]] = [[] for _ in sources]
    finished = 0
    for batch in batches([beams * len(source) for source in sources], model.device.type):
        ids, mask = right_padded([sources[index] for index in batch], model.device)
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for index, row in zip(batch, out.tolist(), strict=True):
            found[index] = row
        finished += len(batch)
        done(finished)
    return found


def _generation(model: Model, max_tokens: int, beams: int) -> Any:
    """How to write: of the base's own configuration only the tokens that begin and end an answer. Penalties, forced lengths and the
    like are its authors' wishes for another task."""
    from transformers import GenerationConfig

    own = model.generation_config
    names = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id")
    # A classic of BART: its end is also what its decoder starts with.
    tokens = {name: value for name in names if (value := getattr(own, name, None)) is not None}
    start = tokens.get("decoder_start_token_id", getattr(model.config, "decoder_start_token_id", None))
    return GenerationConfig(
        **{**tokens, "decoder_start_token_id": start}, max_new_tokens=max_tokens, num_beams=beams, do_sample=False, early_stopping=beams > 1
    )


def chrf(answers: Sequence[str], expected: Sequence[str]) -> list[float]:
    """Per answer its F-score over runs of up to six characters, 0 to 1 (M. Popović, "chrF: character n-gram F-score for automatic MT
    evaluation", WMT 2015), by sacreBLEU."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    return [metric.sentence_score(answer, [text]).score / 100 for answer, text in zip(answers, expected, strict=True)]


def bleu(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Of all answers together, 0 to 1, by sacreBLEU with its own defaults."""
    from sacrebleu.metrics import BLEU

    return float(BLEU().corpus_score(list(answers), [list(expected)]).score) / 100 if answers else 0.0
