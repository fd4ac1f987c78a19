"""Scores a model on items: log-probabilities of labels, held-out loss, greedy answers. Batches hold items of like length."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tuneloop_trainer.chat import Encoded
from tuneloop_trainer.models import Model

TOKENS_PER_BATCH = {"cpu": 512, "cuda": 65536}
"""On a CPU small batches stay in its caches: measured at a fifth less time an item than with four times as many tokens."""
LABEL_SCORING = "summed-log-probability/1"
"""Name of the scoring rule in cache keys; a change of the rule changes it."""
Done = Callable[[int], None]
Tensor = Any  # torch is followed by no type checker here


def label_scores(model: Model, prompts: Sequence[list[int]], labels: Sequence[Sequence[list[int]]], done: Done) -> list[list[float]]:
    """Summed log-probability of each label after each prompt, its stop token included.

    What all prompts begin with (system turn, instruction) is computed once, each prompt's own tokens once for all its labels.
    `labels[i][k]` are the tokens of label k after prompt i.
    """
    shared = common_prefix(prompts)
    prefix = _prefix_cache(model, prompts[0][:shared]) if shared else None
    scores: list[list[float]] = [[] for _ in prompts]
    finished = 0
    for batch in batches([len(prompt) - shared for prompt in prompts], model.device.type):
        rows = _label_batch(model, prefix, shared, [prompts[index][shared:] for index in batch], [labels[index] for index in batch])
        for index, row in zip(batch, rows, strict=True):
            scores[index] = row
        finished += len(batch)
        done(finished)
    return scores


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with; each keeps at least one of its own."""
    longest = min(map(len, prompts), default=1) - 1
    first = prompts[0] if prompts else []
    return next((place for place in range(longest) if any(prompt[place] != first[place] for prompt in prompts)), longest)


@torch.inference_mode()
def _prefix_cache(model: Model, prefix: list[int]) -> Any:
    ids = torch.tensor([prefix], device=model.device)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def _label_batch(model: Model, prefix: Any, shared: int, prompts: list[list[int]], labels: list[Sequence[list[int]]]) -> list[list[float]]:
    ids, mask = _left_padded(prompts, model.device)
    positions = _positions(mask) + shared
    mask = torch.cat([torch.ones((len(prompts), shared), dtype=mask.dtype, device=mask.device), mask], dim=1)
    cache = copy.deepcopy(prefix)
    if cache is not None:
        cache.batch_repeat_interleave(len(prompts))
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    first = torch.log_softmax(out.logits[:, -1].float(), dim=-1)
    count = len(labels[0])
    flat = [label for choices in labels for label in choices]
    sums = first.repeat_interleave(count, 0).gather(1, torch.tensor([[label[0]] for label in flat], device=model.device)).squeeze(1)
    if max(map(len, flat)) > 1:
        sums = sums + _later_tokens(model, out.past_key_values, mask, flat, count)
    rows: list[list[float]] = sums.reshape(-1, count).tolist()
    return rows


def _later_tokens(model: Model, cache: Any, mask: Tensor, labels: list[list[int]], count: int) -> Tensor:
    """Log-probability of each label behind its first token, over the prompts' keys and values."""
    cache.batch_repeat_interleave(count)
    inputs, real = right_padded([label[:-1] for label in labels], model.device)
    whole = torch.cat([mask.repeat_interleave(count, 0), real], dim=1)
    positions = mask.sum(1, keepdim=True).repeat_interleave(count, 0) + torch.arange(inputs.shape[1], device=model.device)
    out = model(input_ids=inputs, attention_mask=whole, position_ids=positions, past_key_values=cache, use_cache=True)
    targets, kept = right_padded([label[1:] for label in labels], model.device)
    chances = torch.log_softmax(out.logits.float(), dim=-1).gather(2, targets.unsqueeze(2)).squeeze(2)
    return (chances * kept).sum(1)


@torch.inference_mode()
def head_outputs(model: Model, texts: Sequence[list[int]], done: Done) -> list[list[float]]:
    """What a classification head says to each text: one number a class."""
    scores: list[list[float]] = [[] for _ in texts]
    finished = 0
    for batch in batches([len(text) for text in texts], model.device.type):
        ids, mask = right_padded([texts[index] for index in batch], model.device)
        ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
        rows = model(input_ids=ids, attention_mask=mask).logits.float().tolist()
        for index, row in zip(batch, rows, strict=True):
            scores[index] = row
        finished += len(batch)
        done(finished)
    return scores


def held_out_losses(model: Model, items: Sequence[Encoded], limit: int, done: Done) -> list[tuple[float, int]]:
    """Per item the summed negative log-probability of the completion's tokens, and their number; cut at `limit` tokens."""
    losses: list[tuple[float, int]] = [(0.0, 0)] * len(items)
    rows = [(item.prompt + item.completion)[:limit] for item in items]
    finished = 0
    for batch in batches([len(row) for row in rows], model.device.type):
        counts = [min(len(rows[index]) - len(items[index].prompt), len(rows[index]) - 1) for index in batch]
        for index, loss in zip(batch, _loss_batch(model, [rows[index] for index in batch], counts), strict=True):
            losses[index] = loss
        finished += len(batch)
        done(finished)
    return losses


@torch.inference_mode()
def _loss_batch(model: Model, rows: list[list[int]], counts: list[int]) -> list[tuple[float, int]]:
    ids, mask = _left_padded(rows, model.device)
    longest = max(1, *counts) if len(counts) > 1 else max(1, counts[0])
    out = model(input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=False, logits_to_keep=longest + 1)
    chances = torch.log_softmax(out.logits[:, :-1].float(), dim=-1)
    chosen = chances.gather(2, ids[:, -longest:].unsqueeze(2)).squeeze(2)
    return [(float(-chosen[row, longest - max(count, 0) :].sum()), max(count, 0)) for row, count in enumerate(counts)]


@dataclass(frozen=True, slots=True)
class Greedy:
    """The most likely continuation of a prompt, without its stop token."""

    tokens: list[int]
    leads: list[float]
    """Per step, that of the stop token included: by how much the likeliest token's logit led the next one's."""


def greedy_answers(model: Model, prompts: Sequence[list[int]], max_tokens: int, stops: frozenset[int], done: Done) -> list[Greedy]:
    """The most likely continuation of each prompt, token by token."""
    from transformers import GenerationConfig

    stop_list = sorted(stops)
    settings = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, num_beams=1, eos_token_id=stop_list, pad_token_id=stop_list[0])
    answers: list[Greedy] = [Greedy([], [])] * len(prompts)
    finished = 0
    for batch in batches([len(prompt) + max_tokens for prompt in prompts], model.device.type):
        ids, mask = _left_padded([prompts[index] for index in batch], model.device)
        steps: list[list[float]] = []
        note = functools.partial(_note_leads, steps)
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=[note])
        for place, (index, row) in enumerate(zip(batch, out[:, ids.shape[1] :].tolist(), strict=True)):
            end = next((place for place, token in enumerate(row) if token in stops), len(row))
            answers[index] = Greedy(row[:end], [leads[place] for leads in steps[: end + 1]])
        finished += len(batch)
        done(finished)
    return answers


def _note_leads(steps: list[list[float]], _: Tensor, logits: Tensor) -> Tensor:
    """A logits processor that changes nothing."""
    best = logits.float().topk(2, dim=-1).values
    steps.append((best[:, 0] - best[:, 1]).tolist())
    return logits


def batches(lengths: Sequence[int], device: str) -> Iterator[list[int]]:
    """Indices in batches of at most so many padded tokens, longest first: what does not fit fails at once."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > TOKENS_PER_BATCH[device]:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _left_padded(rows: Sequence[list[int]], device: Any) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def right_padded(rows: Sequence[list[int]], device: Any) -> tuple[Tensor, Tensor]:
    width = max(1, *map(len, rows)) if len(rows) > 1 else max(1, len(rows[0]))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)
