"""Prompts are the engine's, answers end, and what is supervised is the answer alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.unit.trainer.builders import make_config, make_rows, make_source, replace, run_stage, write_jsonl

from tuneloop_trainer.chat import IGNORED, Formatter, stop_ids
from tuneloop_trainer.contract import Stage, Template, tokens_digest
from tuneloop_trainer.data.shards import read_rows
from tuneloop_trainer.models import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return load_tokenizer(base, "base")


def test_chat_prompt_is_what_the_engine_renders(tokenizer: Any, base: Path) -> None:
    formatter = Formatter(tokenizer, stop_ids(base, tokenizer), "Chat")

    ids = formatter.prompt_ids("A sunny day")

    # The engine: the chat template with a generation prompt, tokenised without special tokens of the tokenizer's own.
    rendered = "<|im_start|>user\nA sunny day<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == rendered
    assert ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_chat_answer_ends_with_the_stop_token_and_nothing_behind_it(tokenizer: Any, base: Path) -> None:
    encoded = Formatter(tokenizer, stop_ids(base, tokenizer), "Chat").encode("A sunny day", "positive")

    assert tokenizer.decode(encoded.completion) == "positive<|im_end|>"
    assert encoded.completion[-1] == tokenizer.eos_token_id


def test_system_turn_comes_first(tokenizer: Any, base: Path) -> None:
    text = Formatter(tokenizer, stop_ids(base, tokenizer), "Chat").prompt_text("A day", "Be brief.")

    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA day")


def test_text_is_prompt_completion_and_end(tokenizer: Any, base: Path) -> None:
    encoded = Formatter(tokenizer, stop_ids(base, tokenizer), "Text").encode("A sunny day:", " positive")

    assert tokenizer.decode(encoded.prompt + encoded.completion) == "A sunny day: positive<|im_end|>"


def test_prompt_and_answer_never_merge_into_one_token(tokenizer: Any, base: Path) -> None:
    formatter = Formatter(tokenizer, stop_ids(base, tokenizer), "Text")

    # "posi" + "tive" is one token or two when written together; the engine sees the prompt alone.
    assert formatter.encode("posi", "tive").prompt == formatter.prompt_ids("posi")


def test_stop_tokens_of_the_generation_config_count(tokenizer: Any, base: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')

    assert stop_ids(tmp_path, tokenizer) == {tokenizer.eos_token_id, 0, 7}


@pytest.mark.parametrize(("loss", "supervised"), [("CompletionOnly", "positive<|im_end|>"), ("FullSequence", None)])
def test_loss_is_on_the_answer_and_its_end(loss: str, supervised: str | None, tokenizer: Any, base: Path, tmp_path: Path) -> None:
    source = make_source(write_jsonl(tmp_path / "data" / "train.jsonl", make_rows(1)))
    config = replace(make_config(tmp_path, base, [source]), loss=loss)

    assert run_stage(config, Stage.PREPARE).exit_code == 0

    row = next(read_rows(tmp_path / "work" / "prepare", "train"))
    shown = tokenizer.decode([label for label in row.labels if label != IGNORED])
    assert shown == (supervised or tokenizer.decode(row.input_ids))
    assert all(label in (IGNORED, token) for label, token in zip(row.labels, row.input_ids, strict=True))


def prepared_probe(base: Path, folder: Path, template: str | None, **fields: Any) -> str | None:
    """What prepare records of the prompt that training makes of PROBE_TEXT."""
    path = write_jsonl(folder / "data" / "train.jsonl", [{**row, "prompt": "p", "completion": "c"} for row in make_rows(4)])
    rows = None if template is None else Template(prompt=template, completion="{{ label }}")
    result = run_stage(make_config(folder, base, [make_source(path, template=rows)], **fields), Stage.PREPARE)
    assert result.prepare is not None
    recorded: str | None = result.prepare.prompt_probe_sha256
    return recorded


@pytest.mark.parametrize(
    ("style", "template", "read"),
    [
        ("Chat", None, "<|im_start|>user\nIs the sky blue?<|im_end|>\n<|im_start|>assistant\n"),
        ("Chat", "Q: {{ text }}", "<|im_start|>user\nQ: Is the sky blue?<|im_end|>\n<|im_start|>assistant\n"),
        ("Text", "Q: {{ text }}", "Q: Is the sky blue?"),
        ("Chat", "{{ text }} {{ id }}", None),
    ],
)
def test_the_prompt_that_training_makes_of_a_fixed_text_is_recorded(
    style: str, template: str | None, read: str | None, tokenizer: Any, base: Path, tmp_path: Path
) -> None:
    recorded = prepared_probe(base, tmp_path, template, prompt_format=style)

    assert recorded == (None if read is None else tokens_digest(tokenizer(read, add_special_tokens=False)["input_ids"]))


def test_a_chat_template_that_writes_the_date_makes_no_prompt_to_compare_with(base: Path, tmp_path: Path) -> None:
    dated = tmp_path / "dated"
    shutil.copytree(base, dated)
    template = load_tokenizer(base, "base").chat_template
    tokenizer = load_tokenizer(dated, "base")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + template
    tokenizer.save_pretrained(dated)

    assert prepared_probe(dated, tmp_path, None) is None
