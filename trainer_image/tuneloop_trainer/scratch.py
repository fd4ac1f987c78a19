"""A model from scratch: its tokenizer and configuration, written by prepare as a base without weights, and the weights, drawn by train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tuneloop_trainer import models
from tuneloop_trainer.contract import ModelShape, Reason, RunConfig, Scratch
from tuneloop_trainer.data.records import Record
from tuneloop_trainer.data.sources import root_of
from tuneloop_trainer.errors import Invalid

END, PAD = "<|endoftext|>", "<|pad|>"
SAMPLE_BYTES = 128 << 20
"""Texts that a tokenizer is trained on, at most: its trainer keeps every distinct word of them. Which ones is decided by their content."""
LONGEST_TOKEN = 64
"""Letters of a token, at most."""
FEWEST = 2
"""Times that a pair of tokens occurs which become one."""
MULTIPLE = 64
"""Embedding rows are a multiple of this: matrices of such sizes are multiplied faster."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip

Texts = Callable[[], Iterable[Record]]


def write_base(config: RunConfig, asked: Scratch, given: Path | None, train: Sequence[Iterable[Record]], folder: Path) -> models.Tokenizer:
    """Tokenizer and configuration below `folder`; returns the tokenizer. `given` has the one to take, where none is trained."""
    folder.mkdir()
    if asked.vocabulary_size is not None:
        trained = train_tokenizer(lambda: (record for records in train for record in records), asked.vocabulary_size)
        trained.model_max_length = config.training.max_sequence_length
        trained.save_pretrained(folder)
    elif given is not None:
        _copy_tokenizer(given, folder, config.base.uri)
    tokenizer = models.load_tokenizer(folder, config.base.uri)
    if tokenizer.eos_token_id is None:
        raise Invalid(f"The tokenizer of {config.base.uri} has no end-of-sequence token.", Reason.MODEL_NOT_FOUND)
    shape = _configuration(config, asked, tokenizer)
    shape.save_pretrained(folder)
    tokens = {name: value for name in ("bos_token_id", "eos_token_id", "pad_token_id") if (value := getattr(shape, name)) is not None}
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=1))
    return tokenizer


def _copy_tokenizer(given: Path, folder: Path, uri: str) -> None:
    """What is copied becomes part of the model: nothing from elsewhere on the machine may be."""
    root = root_of(given)
    for path in (given / name for name in TOKENIZER_FILES):
        if not path.resolve().is_relative_to(root):
            raise Invalid(f"Model {uri}: {path.name} is a link that leads outside its claim. Copy the file.", Reason.MODEL_NOT_FOUND)
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def train_tokenizer(records: Texts, size: int) -> models.Tokenizer:
    """Byte-level BPE: every text can be written, whatever its script. The same texts give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=FEWEST,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sampled(records, SAMPLE_BYTES), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def sampled(records: Texts, most: int) -> Iterator[str]:
    """All texts, or about as many as have so many bytes."""
    total = sum(len(record.completion.encode()) for record in records())
    bound = (most << 64) // max(total, most)
    return (record.completion for record in records() if int.from_bytes(record.key[:8]) < bound)


def _configuration(config: RunConfig, asked: Scratch, tokenizer: models.Tokenizer) -> Any:  # Any: transformers is untyped
    from transformers import AutoConfig

    tokens = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)
    return AutoConfig.for_model(
        asked.family.lower(),
        architectures=[f"{asked.family}ForCausalLM"],
        vocab_size=-(-tokens // MULTIPLE) * MULTIPLE,
        hidden_size=asked.hidden_size,
        intermediate_size=asked.intermediate_size,
        num_hidden_layers=asked.layers,
        num_attention_heads=asked.heads,
        num_key_value_heads=asked.key_value_heads,
        head_dim=asked.hidden_size // asked.heads,
        max_position_embeddings=config.training.max_sequence_length,
        tie_word_embeddings=asked.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )


def read_shape(folder: Path) -> ModelShape | None:
    """As `shapes.read_shape`, of a base without weights: they are counted on a device that holds none."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    return ModelShape.of(json.loads((folder / "config.json").read_text()), [{"weights": {"shape": [model.num_parameters()]}}])


def draw(folder: Path, seed: int, dtype: str) -> models.Model:
    """The model with weights drawn as its class draws them, on a CPU whatever the device: the same seed gives the same weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tuneloop_trainer.hardware import device

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.to(getattr(torch, dtype)).to(device()).eval()
