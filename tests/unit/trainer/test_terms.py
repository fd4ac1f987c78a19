"""Which words get tokens of their own, and how a tokenizer takes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tuneloop_trainer import extending
from tuneloop_trainer.data.records import Record
from tuneloop_trainer.data.terms import KEPT, MAX_CHARACTERS, Term, find_terms, texts_of, words


def letters(found: list[str]) -> list[int]:
    """A tokenizer of one token for three letters."""
    return [-(-len(word.strip()) // 3) for word in found]


def find(texts: list[str], count: int = 2, fertility: int = 3, most: int = 10, kept: int = KEPT) -> list[Term]:
    return find_terms(lambda: texts, letters, count, fertility, most, kept)


def test_words_that_save_the_most_tokens_come_first() -> None:
    texts = ["a stenting, a stenting", "the angioplasty", "the angioplasty of a lump", "a lump a lump", "once cardiology"]
    assert find(texts) == [Term(" angioplasty", 2, 4), Term(" stenting", 2, 3)]
    assert find(texts, most=1) == [Term(" angioplasty", 2, 4)]
    assert [term.saved for term in find(texts)] == [6, 4]


def test_a_word_is_counted_with_the_space_before_it() -> None:
    assert list(words("stent in (stent) 12 a_b x\nstent")) == ["stent", " in", "stent", " a_b", " x", "stent"]


def test_runs_without_an_end_are_no_words() -> None:
    assert list(words("x" * (MAX_CHARACTERS + 1))) == []


def test_every_text_of_a_record_counts_and_equal_corpora_give_equal_terms() -> None:
    record = Record("a prompt", "the answer", "d", "c", 1, system="a system", rejected="another")
    assert list(texts_of([record])) == ["a system", "a prompt", "the answer", "another"]
    texts = [f"word{number % 50:03}more text" for number in range(500)]
    assert find(texts) == find(list(reversed(texts)))


def test_few_words_are_kept_and_none_that_is_frequent_is_lost() -> None:
    asked: list[int] = []

    def pieces(found: list[str]) -> list[int]:
        asked.append(len(found))
        return letters(found)

    rare = [f"x angioplasty {number:09}x" for number in range(5_000)]
    terms = find_terms(lambda: rare, pieces, 1, 3, 10_000, kept=50)
    assert terms[0] == Term(" angioplasty", 5_000, 4), "counted exactly, though its count was taken down on the way"
    assert max(asked) <= 101


# --- tokenizers ---------------------------------------------------------------


def byte_level() -> Callable[[], object]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}

    def load() -> object:
        tokenizer = Tokenizer(models.BPE(alphabet, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!")

    return load


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a stent", ["a", " stent"]),
        ("stent", ["stent"]),
        ("(stent)", ["(", "stent", ")"]),
        ("a stents", ["a", " stent", "s"]),
        ("astent", list("astent")),
        ("stents", list("stents")),
    ],
)
def test_a_term_is_taken_where_it_is_a_word_or_with_its_space_the_beginning_of_one(text: str, tokens: list[str]) -> None:
    new, fit = extending.add_terms(byte_level(), [" stent", "stent"])
    assert fit == [" stent", "stent"]
    assert new.convert_ids_to_tokens(extending.pieces(new, text)) == tokens
    assert extending.written(new, text) == text


def test_words_that_would_not_come_back_are_left_out() -> None:
    """A byte-level decoder takes each letter of an added token for a byte, where all of them could be one."""
    new, fit = extending.add_terms(byte_level(), ["café", " café", "stent"])
    assert fit == [" café", "stent"]
    assert extending.written(new, "(café) a café") == "(café) a café"


def test_rows_are_rounded_to_bfloat16_as_torch_does() -> None:
    import torch

    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert extending.WRITE["BF16"](values) == torch.tensor(values).bfloat16().view(torch.int16).numpy().tobytes()
    assert (extending.READ["BF16"](extending.WRITE["BF16"](values)) == torch.tensor(values).bfloat16().float().numpy()).all()


def test_matrix_that_only_looks_like_embeddings_is_refused() -> None:
    with pytest.raises(extending.Invalid, match="no known kind of embedding"):
        extending._is_embedding("model.layers.0.mlp.up_proj.weight", {"shape": [400, 32], "dtype": "BF16", "data_offsets": [0, 1]}, 400)
