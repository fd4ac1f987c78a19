"""What a model from scratch is made of: a tokenizer, given or trained, and the rows' frequencies."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tests.unit.trainer.builders import run_stage, write_jsonl
from tests.unit.trainer.objectives import SMALL, made, make_scratch, row

from tuneloop_trainer import scratch
from tuneloop_trainer.contract import Base, ExitCode, Reason, Stage
from tuneloop_trainer.data.records import Record


def records(count: int) -> list[Record]:
    texts = [f"{row('Pretraining', number)['text']} zürich 東京 {number}" for number in range(count)]
    return [Record("", text, str(number), text, number) for number, text in enumerate(texts)]


def test_a_tokenizer_that_needs_code_is_refused(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenizer.Mine", None]}}))
    config = make_scratch(tmp_path, SMALL.model_copy(update={"vocabulary_size": None}), Base(uri="pvc://models/given", path=str(given)))

    result = run_stage(config, Stage.PREPARE)

    assert (result.exit_code, result.reason) == (ExitCode.INVALID, Reason.MODEL_NOT_FOUND)
    assert "needs code of its own (auto_map in tokenizer_config.json)" in result.message


def test_a_link_out_of_a_claim_is_not_copied_into_the_model(tmp_path: Path, base: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (given / name).write_bytes((base / name).read_bytes())
    (tmp_path / "secret").write_text("token")
    (given / "vocab.json").symlink_to(tmp_path / "secret")
    config = make_scratch(tmp_path, SMALL.model_copy(update={"vocabulary_size": None}), Base(uri="pvc://models/given", path=str(given)))

    result = run_stage(config, Stage.PREPARE)

    assert (result.exit_code, result.reason) == (ExitCode.INVALID, Reason.MODEL_NOT_FOUND)
    assert "vocab.json is a link that leads outside its claim" in result.message
    assert not made(config).exists()


def test_every_text_comes_back_from_a_tokenizer_that_never_saw_its_letters() -> None:
    tokenizer = scratch.train_tokenizer(lambda: records(50), 400)

    for text in ("sunny day", "Ωmega 🚀 \t  two  spaces\n", "\u0000\u007f"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 400
    assert tokenizer.convert_tokens_to_ids(scratch.END) == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_a_corpus_beyond_the_bound_is_sampled_by_its_content() -> None:
    everything = records(400)
    size = sum(len(record.completion.encode()) for record in everything)

    some = list(scratch.sampled(lambda: everything, size // 4))

    assert 0.5 < sum(map(len, some)) / (size / 4) < 1.5
    assert sorted(some) == sorted(scratch.sampled(lambda: everything[::-1], size // 4)), "the order is not what decides"
    assert len(list(scratch.sampled(lambda: everything, size))) == 400


def test_frequencies_are_those_of_the_training_rows(tmp_path: Path) -> None:
    from tuneloop_trainer.evaluation.frequencies import log_shares

    config = make_scratch(tmp_path)
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": "a a a b " + "c" * number} for number in range(1, 40)])
    assert run_stage(config, Stage.PREPARE).exit_code == ExitCode.DONE

    shares = log_shares(tmp_path / "work" / "prepare", 1)

    assert sum(map(math.exp, shares)) == pytest.approx(1)
