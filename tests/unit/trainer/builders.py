"""Tiny models, small data and run configurations for the trainer's tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tuneloop_trainer.contract import (
    Base,
    Checkpoint,
    DataSource,
    Evaluation,
    Gate,
    Lora,
    Method,
    Paths,
    Progress,
    RunConfig,
    Stage,
    Suite,
    Template,
    Training,
)
from tuneloop_trainer.interrupts import Interrupts
from tuneloop_trainer.progress import ProgressWriter

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATE = Template(prompt="Sentiment of: {{ text }}", completion="{{ label }}")
GOOD, BAD = ("sunny", "lovely", "bright", "warm", "sweet"), ("rainy", "awful", "dark", "cold", "bitter")
THINGS = ("day", "tea", "song", "film", "street", "letter", "garden", "answer", "morning", "story")


def make_base(folder: Path, template: str | None = CHAT_TEMPLATE, **config: Any) -> Path:
    """A random Llama with some 50,000 weights, and a byte-level tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [f"Sentiment of: a {word} {thing} user assistant positive negative" for word in (*GOOD, *BAD) for thing in THINGS]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=2,
            initializer_range=0.2,
            **({"tie_word_embeddings": True} | config),
        )
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_encoder_decoder(folder: Path, kind: Literal["T5", "BART"] = "T5") -> Path:
    """A random T5 or BART with some 100,000 weights. T5 ends its texts with </s>; BART puts them between <s> and </s>."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "</s>", "<s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([f"sunny rainy positive negative {thing}" for thing in THINGS], trainer)
    shape = "$A </s>" if kind == "T5" else "<s> $A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=shape, special_tokens=[("</s>", 1), ("<s>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    if kind == "T5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=400, feed_forward_proj="gated-gelu", **sizes))
    else:
        layers = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 2), ("ffn_dim", 64))}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        tokens = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 1, "forced_eos_token_id": 1}
        config = BartConfig(vocab_size=400, d_model=32, max_position_embeddings=64, dropout=0.0, init_std=0.2, **layers, **heads, **tokens)
        model = BartForConditionalGeneration(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_rows(count: int, offset: int = 0) -> list[dict[str, object]]:
    """Sentences whose label follows from one word; no two are alike."""
    rows: list[dict[str, object]] = []
    for number in range(offset, offset + count):
        good = number % 2 == 0
        word = (GOOD if good else BAD)[number // 2 % 5]
        text = f"{word} {THINGS[number // 10 % 10]} {number}"
        rows.append({"id": number, "text": text, "label": "positive" if good else "negative"})
    return rows


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_source(path: Path, **fields: Any) -> DataSource:
    return DataSource(uri=f"pvc://data/{path.name}", path=str(path), **({"template": TEMPLATE} | fields))


def make_config(root: Path, folder: Path, train: Iterable[DataSource] | None = None, **fields: Any) -> RunConfig:
    """A run of 6 steps of 4 rows with LoRA; `fields` replaces whatever differs."""
    if train is None:
        train = [make_source(write_jsonl(root / "data" / "train.jsonl", make_rows(40)))]
    values: dict[str, Any] = {
        "namespace": "default",
        "name": "tiny",
        "uid": "0",
        "paths": Paths(work=str(root / "work"), artifact=str(root / "models" / "tiny"), cache=str(root / "cache")),
        "base": Base(uri="pvc://models/base", path=str(folder)),
        "method": Method(type="LoRA", lora=Lora(rank=4, alpha=8)),
        "train": tuple(train),
        "training": Training(max_steps=6, global_batch_size=4, learning_rate=5e-3, max_sequence_length=128, warmup_steps=1),
        "checkpoint": Checkpoint(every_minutes=None, every_steps=2, keep=2),
        "model": "tiny",
        "output_format": "Adapter",
        "threads": 1,
    }
    return RunConfig(**(values | fields))


def make_gated(root: Path, base: Path, items: int = 40, **fields: Any) -> RunConfig:
    """As make_config, with a suite `gate` of unseen rows and a gate of accuracy over the base."""
    suite = Suite(
        name="gate",
        type="Dataset",
        source=make_source(write_jsonl(root / "data" / "gate.jsonl", make_rows(items, offset=1000))),
        labels=("negative", "positive"),
        metrics=("Accuracy", "MacroF1", "Loss"),
    )
    gate = Gate(suite="gate", metric="Accuracy", rule="Superior", min_items=10)
    return make_config(root, base, **({"evaluation": Evaluation(suites=(suite,), gates=(gate,))} | fields))


def make_progress(root: Path, stage: Stage) -> ProgressWriter:
    return ProgressWriter(root / "progress.json", stage, "pod-1")


def read_progress_file(root: Path) -> Progress:
    return Progress.model_validate_json((root / "progress.json").read_bytes())


def run_stage(config: RunConfig, stage: Stage, interrupts: Interrupts | None = None) -> Any:
    """Run a stage in this process as the worker does: errors become results."""
    from tuneloop_trainer.worker import run

    root = Path(config.paths.work).parent
    return run(stage, config, make_progress(root, stage), interrupts or Interrupts())


def replace(config: RunConfig, **fields: Any) -> RunConfig:
    return config.model_copy(update=fields)


def copy_work(config: RunConfig, target: Path) -> RunConfig:
    """The same run with its own copy of the work folder."""
    shutil.copytree(config.paths.work, target / "work")
    return replace(
        config, paths=config.paths.model_copy(update={"work": str(target / "work"), "artifact": str(target / "models" / "tiny")})
    )
