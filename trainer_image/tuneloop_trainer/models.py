"""Loads models and tokenisers from local, verified folders; nothing here reaches the network or runs a model's own code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from tuneloop_trainer.contract import Quantization, Reason
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.hardware import loaded_to

Model = Any  # transformers and torch are followed by no type checker here
Tokenizer = Any


def load_tokenizer(folder: Path, uri: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever is wrong with a model's files, it is the model that has to change
        raise Invalid(f"The tokenizer of {uri} does not load: {error}", Reason.MODEL_NOT_FOUND) from error


def load_model(folder: Path, uri: str, dtype: Literal["bfloat16", "float32"], quantization: Quantization | None = None) -> Model:
    """The causal language model on the device, in evaluation mode; with `quantization` its linear layers are kept in so many bits and
    computed in `dtype`. Raises Invalid, also where a weight would have to be drawn."""
    from transformers import AutoModelForCausalLM

    if quantization is None:
        return _load(AutoModelForCausalLM, folder, uri, dtype, "a causal language model")
    model = _load(
        AutoModelForCausalLM, folder, uri, dtype, "a causal language model", quantization_config=_in_few_bits(quantization, dtype)
    )
    return _kept_trainable(model)


def load_seq2seq(folder: Path, uri: str, dtype: Literal["bfloat16", "float32"]) -> Model:
    """As load_model, an encoder-decoder."""
    from transformers import AutoModelForSeq2SeqLM

    return _load(AutoModelForSeq2SeqLM, folder, uri, dtype, "an encoder-decoder")


def _load(kind: Any, folder: Path, uri: str, dtype: Literal["bfloat16", "float32"], words: str, **chosen: Any) -> Model:
    import torch
    from safetensors import SafetensorError

    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
            **chosen,
        )
        _refuse_drawn(info["missing_keys"])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise Invalid(f"Model {uri} does not load as {words}: {error}", Reason.MODEL_NOT_FOUND) from error
    return model.to(loaded_to()).eval()


def load_classifier(folder: Path, uri: str, dtype: Literal["bfloat16", "float32"], labels: Sequence[str] | None) -> Model:
    """A model with a classification head, on the device, in evaluation mode. `labels` are those of a base that is to be trained: a
    head of another size is drawn anew. None: the folder's own, which must have been trained. Raises Invalid."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if labels is None and not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
            raise ValueError("it was trained for something else")
        if labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: number for number, label in enumerate(labels)}
            # The head reads the last token that is no padding: what that is must not change between training and use.
            config.pad_token_id = padding(load_tokenizer(folder, uri))
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=labels is not None,
            output_loading_info=True,
        )
        drawn = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        body = f"{model.base_model_prefix}."
        _refuse_drawn(drawn if labels is None else (name for name in drawn if name.startswith(body)))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise Invalid(f"Model {uri} does not load as a classification model: {error}", Reason.MODEL_NOT_FOUND) from error
    return model.to(loaded_to()).eval()


def _in_few_bits(quantization: Quantization, dtype: str) -> Any:
    """4-bit NormalFloat, the constants of its blocks quantised too (Dettmers et al. 2023, "QLoRA")."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=quantization.bits == 4,
        bnb_4bit_quant_type=quantization.type.lower(),
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def _kept_trainable(model: Model) -> Model:
    """On CPUs that compute in bf16, bitsandbytes packs a layer anew when it is first evaluated, for a kernel without a backward pass:
    what is trained after an evaluation would lose the gradients through it without a word. What is not quantised is taken out of the
    files' pages, which would stay in memory for it, whole."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.clone()
    return model


def _refuse_drawn(names: Iterable[str]) -> None:
    """Raises ValueError for weights that the configuration asks for and the files lack: transformers draws them at random, with a
    warning. Weights that are tied to others are not among them."""
    missing = sorted(names)
    if missing:
        raise ValueError(f"its files lack {len(missing)} of the weights that its config.json asks for, the first being {missing[0]}")


def padding(tokenizer: Tokenizer) -> int:
    """The token that rows are filled up with: the tokenizer's own, else its end."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def load_adapter(model: Model, folder: Path) -> Model:
    """The model with a LoRA adapter in the model's own precision: as the engine applies it. With a learned prompt: see there."""
    from peft import PeftModel

    if virtual_tokens(folder):
        return _with_prompt(model, folder)
    dtype = next(model.parameters()).dtype
    return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).to(dtype).eval()


def virtual_tokens(folder: Path) -> int:
    """Rows of the learned prompt that the folder holds; 0 for every other model."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    return int(config["num_virtual_tokens"]) if config.get("peft_type") == "PROMPT_TUNING" else 0


def _with_prompt(model: Model, folder: Path) -> Model:
    """The model with the rows of a learned prompt behind its input embeddings, so that they can be asked for as tokens: as the ids from
    the number of its own rows on. Cached prefixes, padding and generation then work as for any text; peft's own wrapper takes a
    prompt apart from them. The head knows nothing of the rows."""
    import torch
    from safetensors.torch import load_file

    rows = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    old = model.get_input_embeddings()
    weight = torch.cat([old.weight.data, rows.to(old.weight)])
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight, freeze=True, padding_idx=old.padding_idx))
    return model


def vocabulary_size(folder: Path) -> int:
    """Rows of the model's embeddings, by its configuration. Raises Invalid."""
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("vocab_size"), int):
            return int(part["vocab_size"])
    raise Invalid("The base model's config.json does not say how large its vocabulary is.", Reason.MODEL_NOT_FOUND)
