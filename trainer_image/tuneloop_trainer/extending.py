"""Writes a base model with more tokens: its tokenizer with the new words, its embeddings with a row for each.

A row begins as the mean of the rows of the pieces that the word was cut into before, in the input and, where it has its own, in the output
matrix. The files are rewritten as a stream: no weight but the rows of those pieces is loaded, and no library of tensors is needed.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tuneloop_trainer.bases import PATTERNS
from tuneloop_trainer.contract import Reason
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.models import Tokenizer, vocabulary_size
from tuneloop_trainer.shapes import MAX_HEADER

EMBEDDINGS = ("embed", "wte", "lm_head", "shared")
"""Parts of the names of matrices with a row for each token."""
OLD_TOKENIZER = frozenset(
    {"vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json", "special_tokens_map.json", "tokenizer.json"}
)
"""Files of the old tokenizer: a loader that preferred one of them would not know the new words."""
CHUNK = 1 << 24
Floats = npt.NDArray[np.float32]
Tensor = dict[str, Any]
"""`dtype`, `shape` and `data_offsets` of a safetensors header."""


# --- the tokenizer ------------------------------------------------------------


def add_terms(load: Callable[[], Tokenizer], terms: Sequence[str]) -> tuple[Tokenizer, list[str]]:
    """The tokenizer with those terms that leave every text as it was, and which they are.

    A term is matched before anything is normalised. One with its space is matched behind any character, and as the beginning of a longer
    word too, like any piece of a word: asked for whole words (`single_word`), tokenizers want no letter before that space either. One
    without is a whole word. Left out are words that the decoder would not write as they are: bare ones with letters beyond ASCII, where
    it takes letters for bytes.
    """
    old, tried = load(), load()
    _add(tried, terms)
    fit = [term for term in terms if _is_read_and_written(old, tried, term)]
    if len(fit) == len(terms):
        return tried, fit
    new = load()
    _add(new, fit)
    return new, fit


def _add(tokenizer: Tokenizer, terms: Sequence[str]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(term, single_word=not term.startswith(" "), normalized=False, special=False) for term in terms])


def _is_read_and_written(old: Tokenizer, new: Tokenizer, term: str) -> bool:
    text = f"of{term} and" if term.startswith(" ") else f"({term})"
    return new.convert_tokens_to_ids(term) in pieces(new, text) and written(new, text) == written(old, text)


def pieces(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def written(tokenizer: Tokenizer, text: str) -> str:
    """The text, as it comes back from its tokens."""
    back: str = tokenizer.decode(pieces(tokenizer, text), clean_up_tokenization_spaces=False)
    return back


# --- the model ----------------------------------------------------------------


def extend(base: Path, target: Path, old: Tokenizer, new: Tokenizer, terms: Sequence[str]) -> list[int]:
    """Write the base with the new tokenizer to `target`; returns the new tokens' ids. Raises Invalid for a model whose embeddings are
    not found."""
    target.mkdir()
    for path in sorted({path for pattern in PATTERNS for path in base.glob(pattern)}):
        if path.name not in OLD_TOKENIZER and path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
    new.save_pretrained(target)
    origins = {int(new.convert_tokens_to_ids(term)): pieces(old, term) for term in terms}
    config = json.loads((base / "config.json").read_text())
    before = vocabulary_size(base)
    rows = max(before, max(origins) + 1)
    found = [_rewrite(path, target / path.name, before, rows, origins) for path in sorted(base.glob("*.safetensors"))]
    if not any(found):
        raise Invalid(
            "The base model has no embeddings of as many rows as its vocabulary: it cannot learn new words.", Reason.MODEL_NOT_FOUND
        )
    (config if "vocab_size" in config else config["text_config"])["vocab_size"] = rows
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return sorted(origins)


def _rewrite(path: Path, target: Path, before: int, after: int, origins: Mapping[int, Sequence[int]]) -> int:
    """Copy a safetensors file, its embeddings with their new rows. Returns how many those were."""
    with path.open("rb") as source:
        header = _header(source)
        start = source.tell()
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        growing = [name for name, tensor in tensors.items() if _is_embedding(name, tensor, before)]
        if not growing:
            shutil.copyfile(path, target)
            return 0
        ordered = sorted(tensors, key=lambda name: tensors[name]["data_offsets"][0])
        with target.open("wb") as sink:
            _write_header(sink, header, ordered, growing, after)
            for name in ordered:
                first, last = tensors[name]["data_offsets"]
                place = sink.tell()
                _copy(source, start + first, last - first, sink)
                if name in growing:
                    _write_rows(source, start + first, tensors[name], sink, place, origins)
    return len(growing)


def _header(file: BinaryIO) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER:
        raise Invalid("The base model's weights have no readable header.", Reason.MODEL_NOT_FOUND)
    header: dict[str, Any] = json.loads(file.read(length))
    return header


def _is_embedding(name: str, tensor: Tensor, vocabulary: int) -> bool:
    if tensor["shape"][:1] != [vocabulary]:
        return False
    if len(tensor["shape"]) <= 2 and any(part in name for part in EMBEDDINGS) and tensor["dtype"] in READ:
        return True
    raise Invalid(
        f"The base model's {name[:80]} has as many rows as its vocabulary, and is no known kind of embedding.", Reason.MODEL_NOT_FOUND
    )


def _write_header(sink: BinaryIO, header: dict[str, Any], ordered: Sequence[str], growing: Sequence[str], rows: int) -> None:
    written: dict[str, Any] = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    place = 0
    for name in ordered:
        tensor, (first, last) = header[name], header[name]["data_offsets"]
        shape = [rows, *tensor["shape"][1:]] if name in growing else tensor["shape"]
        size = _row_bytes(tensor) * rows if name in growing else last - first
        written[name] = {"dtype": tensor["dtype"], "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(written, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(struct.pack("<Q", len(text)) + text)


def _row_bytes(tensor: Tensor) -> int:
    width: int = math.prod(tensor["shape"][1:]) * WIDTHS[tensor["dtype"]]
    return width


def _copy(source: BinaryIO, start: int, size: int, sink: BinaryIO) -> None:
    source.seek(start)
    while size:
        block = source.read(min(size, CHUNK))
        if not block:
            raise Invalid("The base model's weights are cut off.", Reason.MODEL_NOT_FOUND)
        sink.write(block)
        size -= len(block)


def _write_rows(source: BinaryIO, start: int, tensor: Tensor, sink: BinaryIO, place: int, origins: Mapping[int, Sequence[int]]) -> None:
    """Behind the old rows, or over rows that stood there unused."""
    width, dtype = _row_bytes(tensor), tensor["dtype"]
    end = sink.tell()
    for id_, parts in sorted(origins.items()):
        sink.seek(place + id_ * width)
        sink.write(WRITE[dtype](np.mean(list(_rows(source, start, width, dtype, parts)), axis=0, dtype=np.float32)))
    sink.seek(max(end, sink.tell()))


def _rows(source: BinaryIO, start: int, width: int, dtype: str, ids: Sequence[int]) -> Iterator[Floats]:
    for id_ in ids:
        source.seek(start + id_ * width)
        yield READ[dtype](source.read(width))


def _of_bfloat16(content: bytes) -> Floats:
    return (np.frombuffer(content, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: Floats) -> bytes:
    """Rounded to the nearest, and to the even one of two."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}
READ: dict[str, Callable[[bytes], Floats]] = {
    "BF16": _of_bfloat16,
    "F16": lambda content: np.frombuffer(content, dtype="<f2").astype(np.float32),
    "F32": lambda content: np.frombuffer(content, dtype="<f4").astype(np.float32),
}
WRITE: dict[str, Callable[[Floats], bytes]] = {
    "BF16": _to_bfloat16,
    "F16": lambda values: values.astype("<f2").tobytes(),
    "F32": lambda values: values.astype("<f4").tobytes(),
}
