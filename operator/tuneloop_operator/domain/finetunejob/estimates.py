"""What a training will need: peak memory of a device, disk, time. Arithmetic over the model's shape; nothing is loaded.

Memory = weights + trained weights x (gradient, two moments of Adam) + what the forward pass keeps for the backward one + the head's tile.
What a layer keeps was counted with torch's `saved_tensors_hooks` (torch 2.13, transformers 5.19, peft 0.21) and follows from three facts:
RMSNorm keeps its input in fp32; under autocast every linear layer of fp32 weights keeps its own bf16 copy of its input; LoRA does so for
every layer that it adapts. On a CPU the result is the process's resident set, and two things come on top: what the imports take, and the
holes of glibc's heap. Before its version 2.38 (the image has 2.36) an aligned block that was freed cannot be used again for one of the
same size, so that temporaries between kept tensors stay resident: their share of what is kept is HOLES. With every tensor in a mapping of
its own the holes vanish, at twice the time of a step; the formulas without holes then hold within 3 %, which is how they were told apart.
On CUDA the result is what the allocator holds at once (`max_memory_allocated`); the context and fragmentation are left to SPARE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tuneloop_operator.domain.finetunejob import sides
from tuneloop_trainer.contract import ModelShape

MIB = 1 << 20
IMPORTS = 840 * MIB
"""Resident set of a worker that has imported torch, transformers, TRL, peft and datasets."""
FILE_PAGES = 320 * MIB
"""Of these, pages of the libraries' files: the kernel drops them before it ends a process for memory."""
STARTED = 40 * MIB
"""What the first step touches whatever the model: kernels of libraries, data loader, optimiser, saving."""
HOLES = {"LoRA": 0.85, "Full": 0.45}
NF4_BYTES = 0.516
"""Of a weight: four bits, and for each 64 of them a constant of a byte, of which 256 share another in fp32."""
SPARE = 0.92
"""Share of a device's memory that an estimate may fill."""
POSITIONS = {"cpu": 1024, "cuda": 4096}
"""Positions whose logits exist at once: of the trainer's own head, and of TRL's tile on CUDA."""
TILE_WIDTH = 32_768
"""Columns of TRL's tile."""
OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "adamw_bnb_8bit": 2, "adamw_8bit": 2}
"""Per trained weight; every other optimiser is taken for Adam with two moments in fp32."""


@dataclass(frozen=True)
class Workload:
    """What is trained, and how."""

    shape: ModelShape
    method: Literal["LoRA", "Full"]
    rank: int
    only_attention: bool
    """Whether LoRA leaves the MLP alone."""
    precision: Literal["BF16", "FP32"]
    device: Literal["cpu", "cuda"]
    micro_batch: int
    accumulation: int
    longest: int
    """Tokens of the longest row."""
    supervised_share: float
    checkpointing: bool
    optimizer: str = "adamw_torch"
    has_reference: bool = False
    """Whether a frozen copy of all weights stands beside those that are trained."""
    dora: bool = False
    quantized: bool = False
    """Whether the frozen linear layers are in 4 bits."""
    virtual_tokens: int = 0
    """Rows of a learned prompt, which stand before every row; an adapter of rank 0 otherwise."""
    new_tokens: int = 0
    """Rows of the embeddings that are trained beside an adapter."""
    predicts_tokens: bool = True
    """Whether the head is as wide as the vocabulary."""
    completion: int = 0
    """Tokens that the model writes itself to each row of a global batch, at most; the longest row has them."""
    reward_bytes: int = 0
    """Weights of reward models beside the model."""
    shares: int = 1
    """Processes that weights, gradients and optimiser are divided among (FSDP); 1: each holds them all."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * (self.longest + self.virtual_tokens)

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation


def trained_parameters(work: Workload) -> int:
    """Full: all. LoRA: rank x (inputs + outputs) of every layer that it adapts, and the rows of new
    tokens in input and output."""
    shape = work.shape
    if work.method == "Full":
        return shape.parameters
    if shape.encoder_layers is not None:
        return sides.adapted_parameters(shape, work.rank, work.only_attention)
    hidden, wide = shape.hidden_size, shape.intermediate_size
    query, key = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    ends = 2 * (hidden + query) + 2 * (hidden + key)
    if not work.only_attention:
        ends += 3 * (hidden + wide)
    rows = (2 * work.new_tokens + work.virtual_tokens) * hidden
    return shape.layers * (work.rank * ends + (_adapted_outputs(work) if work.dora else 0)) + rows


def peak_memory(work: Workload) -> int:
    """Bytes at the highest point of a step: on a CPU the resident set of the process, on CUDA what the allocator holds."""
    kept, least = _kept_by_layers(work), _end_of_backward(work)
    # Scores of pairs are so large that they are in mappings of their own, which leave no holes.
    holes = HOLES["Full"] if work.shape.pairs == "Biased" else HOLES[work.method]
    beside, writing = work.reward_bytes, _writing(work)
    if work.device == "cpu":
        # Before it is divided, each process has loaded the whole model.
        least = max(least, _weights(work)) if work.shares > 1 else least
        # What written completions held lies in pieces that the step after them cannot use.
        highest = max(_static(work) + kept * (1 + holes) + _top(work), least) + writing
        return int(IMPORTS + STARTED + beside + highest)
    return int(beside + max(_static(work) + kept + _top(work), least, _static(work) + writing))


def needed_of_limit(work: Workload) -> int:
    """Bytes that a limit must have: of the pod on a CPU, of one device on CUDA."""
    peak = peak_memory(work)
    return peak - FILE_PAGES if work.device == "cpu" else int(peak / SPARE)


def weight_bytes(work: Workload) -> int:
    """Of the model as it computes: LoRA's base in half precision, masters in fp32."""
    return work.shape.parameters * (2 if work.method == "LoRA" and work.precision == "BF16" else 4)


def flops_per_token(work: Workload) -> float:
    """Full: 6 for each weight (2 forward, 4 backward). LoRA: 4, since no frozen weight has a gradient. 2 more where the forward pass is
    made again. Attention by the mean length of the keys, half the row."""
    per_weight = (6 if work.method == "Full" else 4) + (2 if work.checkpointing else 0)
    if work.shape.encoder_layers is not None:
        return per_weight * sides.weights_of_a_token(work.shape, work.supervised_share)
    attention = 6 * work.shape.layers * work.shape.heads * work.shape.head_size * work.longest
    return float(per_weight * work.shape.parameters + attention)


def disk(work: Workload, keep: int, tokens: int, merged: bool) -> int:
    """Bytes on the store: the checkpoints that are kept and the one being written, the artifact, the tokenised rows, and
    a base with new tokens."""
    trained = trained_parameters(work)
    checkpoint = trained * (4 + _optimizer_bytes(work))
    artifact = 2 * work.shape.parameters if merged else 4 * trained
    extended = 2 * work.shape.parameters if work.new_tokens else 0
    return (keep + 1) * checkpoint + artifact + extended + 9 * tokens


# --- parts --------------------------------------------------------------------


def _optimizer_bytes(work: Workload) -> int:
    return OPTIMIZER_BYTES.get(work.optimizer, 8)


def _static(work: Workload) -> int:
    """What is there when the backward pass begins: weights, moments, gradients of earlier micro-batches, autocast's bf16 weights."""
    trained = trained_parameters(work)
    moments = trained * _optimizer_bytes(work)
    gradients = 4 * trained if work.method == "LoRA" or work.accumulation > 1 else 0
    return (
        (_weights(work) + moments + gradients + _reference(work)) // work.shares + _casts(work) + _gathered(work) + _copies_for_rows(work)
    )


def _copies_for_rows(work: Workload) -> int:
    """peft writes trained rows into a copy of the matrix: one for the input, one for the head, and the gradient of one of them."""
    if not work.new_tokens or work.method != "LoRA":
        return 0
    return 3 * (2 if work.precision == "BF16" else 4) * work.shape.vocabulary * work.shape.hidden_size


def _end_of_backward(work: Workload) -> int:
    """Weights, moments and all gradients; the activations are gone."""
    held = _weights(work) + trained_parameters(work) * (4 + _optimizer_bytes(work)) + _reference(work)
    return held // work.shares + _gathered(work)


def _weights(work: Workload) -> int:
    """All of them, as they are held: what is trained in fp32."""
    each = 2 if work.precision == "BF16" else 4
    frozen = work.shape.parameters * each if work.method == "LoRA" else 0
    if work.quantized:
        layer, outside = _units(work)
        frozen = int(NF4_BYTES * work.shape.layers * layer) + each * outside
    return frozen + 4 * trained_parameters(work)


def _casts(work: Workload) -> int:
    """bf16 copies of trained weights. Where the model is divided and the forward pass made again, those of a layer at a time."""
    if work.precision == "FP32":
        return 0
    if work.shares > 1 and work.checkpointing:
        return 2 * sum(_units(work)) if work.method == "Full" else 0
    return 2 * trained_parameters(work)


def _units(work: Workload) -> tuple[int, int]:
    """Weights of a layer, and of what lies outside of the layers: embeddings, head, the last norm."""
    shape = work.shape
    query, key = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    layer = shape.hidden_size * (2 * query + 2 * key + 3 * shape.intermediate_size)
    return layer, max(0, shape.parameters - shape.layers * layer)


def _gathered(work: Workload) -> int:
    """Of a divided model what a process has whole for a while: the layer it is at and the next one, each as it comes and as it is used, and
    gradients as they are made and sent; all the time what lies outside of the layers."""
    if work.shares == 1:
        return 0
    layer, outside = _units(work)
    each = 2 if work.method == "LoRA" and work.precision == "BF16" else 4
    gradients = max(12 * layer, 8 * outside) if work.method == "Full" else 0
    reference = (2 if work.precision == "BF16" else 4) * (layer + outside) if work.has_reference else 0
    return each * (4 * layer + outside) + gradients + reference


def _reference(work: Workload) -> int:
    return work.shape.parameters * (2 if work.precision == "BF16" else 4) if work.has_reference else 0


def _writing(work: Workload) -> int:
    """What writing completions to a whole global batch holds: keys and values of every token, and the last position's logits, their
    softmax and what is drawn from. All weights are masters in fp32, and outside of autocast they compute in it."""
    if not work.completion:
        return 0
    shape = work.shape
    each = 2 if work.method == "LoRA" and work.precision == "BF16" else 4
    tokens = work.global_batch * work.longest
    return tokens * 2 * each * shape.layers * shape.key_value_heads * shape.head_size + 16 * work.global_batch * shape.vocabulary


def _kept_by_layers(work: Workload) -> int:
    """With gradient checkpointing each layer's input and one layer as a whole, else all of all layers."""
    if work.shape.encoder_layers is not None:
        return sides.kept_by_layers(
            work.shape, work.method, work.precision, work.device, work.micro_batch, _sides(work), checkpointing=work.checkpointing
        )
    layer = _kept_by_layer(work) * work.tokens
    if not work.checkpointing:
        return layer * work.shape.layers
    stream = 2 if work.method == "LoRA" and work.precision == "BF16" else 4
    return layer + work.shape.layers * stream * work.shape.hidden_size * work.tokens


def _sides(work: Workload) -> tuple[int, int]:
    """Tokens of a row's source and target. Those of the target are the supervised ones."""
    target = min(work.longest, max(1, round(work.longest * work.supervised_share)))
    return work.longest - target, target


def _kept_by_layer(work: Workload) -> int:
    """Bytes for each token. Four tensors are as wide as the MLP (gate, its activation, up, their product); queries and the
    attention's output as wide as the queries, keys and values as wide as theirs; one number for each head."""
    shape = work.shape
    hidden, wide = shape.hidden_size, shape.intermediate_size
    query, key = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    each = 2 if work.precision == "BF16" else 4
    common = each * (4 * wide + 2 * query + 2 * key) + 4 * shape.heads
    adapted = 4 if work.only_attention else 7
    if work.precision == "FP32":
        own = 24 * hidden if work.method == "Full" else 16 * hidden
    elif work.method == "Full":
        own = 16 * hidden + 10 * hidden  # four in fp32; five copies in bf16 for q, k, v, gate, up
    else:
        copies = 3 if work.only_attention else 5
        adapters = 2 * copies * hidden + 2 * query if work.rank else 0  # a copy for each adapter, that of the output projection too
        own = 8 * hidden + adapters  # two in fp32
    lengths = 2 * each * _adapted_outputs(work) if work.dora else 0  # what the base and what the adapter say, to learn the lengths by
    return common + own + lengths + (each * adapted * work.rank if work.method == "LoRA" else 0)


def _adapted_outputs(work: Workload) -> int:
    """Outputs of all layers that an adapter is on, in one layer of the transformer."""
    shape = work.shape
    attention = (shape.heads + 2 * shape.key_value_heads) * shape.head_size + shape.hidden_size
    return attention if work.only_attention else attention + 2 * shape.intermediate_size + shape.hidden_size


def _dora_tile(work: Workload) -> int:
    """The length of each column is measured on the whole weight: the adapter's product as a matrix (made from a unit matrix as wide as
    the inputs), its cast, and its sum with the weight exist at once."""
    if not work.dora:
        return 0
    hidden = work.shape.hidden_size
    inputs = hidden if work.only_attention else max(hidden, work.shape.intermediate_size)
    return 4 * inputs * inputs + (4 + 2 * (2 if work.precision == "BF16" else 4)) * inputs * hidden


def _top(work: Workload) -> int:
    """The largest of what is there for a moment: the head's tile, the matrices of one layer of DoRA, a matrix out of its 4 bits."""
    unpacked = (2 if work.precision == "BF16" else 4) * work.shape.hidden_size * work.shape.intermediate_size if work.quantized else 0
    return max(_head(work), _dora_tile(work), 2 * unpacked)


def _head(work: Workload) -> int:
    """Logits, their softmax, and the temporaries of gradient and entropy: four tensors in fp32. A trained head has a gradient."""
    if not work.predicts_tokens:
        return 0
    positions = max(1, round(work.tokens * min(max(work.supervised_share, 0.0), 1.0)))
    if work.shape.encoder_layers is not None:  # the trainer's head for labelled positions alone is a decoder's
        return 16 * positions * work.shape.vocabulary + (6 * work.shape.vocabulary * work.shape.hidden_size if work.method == "Full" else 0)
    vocabulary = work.shape.vocabulary
    gradient = 6 * vocabulary * work.shape.hidden_size if work.method == "Full" else 0
    if work.device == "cuda":
        tile = 2 * min(positions, POSITIONS["cuda"]) * min(vocabulary, TILE_WIDTH)
        return tile + 4 * positions * work.shape.hidden_size + gradient
    return 16 * min(positions, POSITIONS["cpu"]) * vocabulary + gradient
