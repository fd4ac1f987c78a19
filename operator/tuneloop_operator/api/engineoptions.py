"""Engine options that a ModelDeployment may set: vLLM's flags by name, each with the values it takes. What is not here is not passed."""

from __future__ import annotations

import re
from collections.abc import Mapping

INTEGER, POSITIVE, FRACTION, FLAG = r"[0-9]{1,9}", r"[1-9][0-9]{0,8}", r"0\.[0-9]{1,4}|1(\.0)?", r"true|false"

ENGINE_OPTIONS: dict[str, str] = {
    "async-scheduling": FLAG,
    "block-size": POSITIVE,
    "dtype": "auto|bfloat16|float16|float32|half|float",
    "enable-chunked-prefill": FLAG,
    "enable-prefix-caching": FLAG,
    "enforce-eager": FLAG,
    "generation-config": "auto|vllm",
    "gpu-memory-utilization": FRACTION,
    "kv-cache-dtype": "auto|bfloat16|fp8|fp8_e4m3|fp8_e5m2",
    "load-format": "auto|safetensors|fastsafetensors|runai_streamer",
    "max-num-batched-tokens": POSITIVE,
    "max-num-queued-reqs": POSITIVE,
    "max-num-queued-tokens": POSITIVE,
    "max-num-seqs": POSITIVE,
    "pipeline-parallel-size": POSITIVE,
    "quantization": "awq|gptq|fp8|bitsandbytes|compressed-tensors|modelopt",
    "seed": INTEGER,
    "tensor-parallel-size": POSITIVE,
}
"""Option -> pattern of its values. Left out for good: whatever reads code or other files (trust-remote-code, chat-template, middleware,
plugins), opens an endpoint, or is ours to set (model, port, keys, LoRA)."""


def option_problem(options: Mapping[str, str]) -> str | None:
    """A sentence about the first option that is unknown or has a value it does not take; None where all are fine."""
    for name, value in sorted(options.items()):
        pattern = ENGINE_OPTIONS.get(name)
        if pattern is None:
            return f"Field engine.options has no '{name}'; it takes {', '.join(ENGINE_OPTIONS)}."
        if not re.fullmatch(pattern, value):
            return f"Field engine.options.{name} cannot be '{value[:32]}'; it must match {pattern}."
    return None


def option_arguments(options: Mapping[str, str]) -> list[str]:
    """vLLM's arguments for options that have no problem, in the order of their names. A flag that is false is negated."""
    arguments: list[str] = []
    for name, value in sorted(options.items()):
        if ENGINE_OPTIONS[name] == FLAG:
            arguments.append(f"--{name}" if value == "true" else f"--no-{name}")
        else:
            arguments += [f"--{name}", value]
    return arguments


def option_rules() -> tuple[tuple[str, str], ...]:
    """The same as CEL rules over the map `options`, each with what the user reads."""
    names = ", ".join(ENGINE_OPTIONS)
    known = (f"self.all(name, name in {list(ENGINE_OPTIONS)})", f"options takes only {names}: other engine flags are refused.")
    values = (
        (f"!('{name}' in self) || self['{name}'].matches('^({_cel(pattern)})$')", _sentence(name, pattern))
        for name, pattern in ENGINE_OPTIONS.items()
    )
    return (known, *values)


def _cel(pattern: str) -> str:
    return pattern.replace("\\", "\\\\")


def _sentence(name: str, pattern: str) -> str:
    if pattern == FRACTION:
        return f"options.{name} must be a number from 0 to 1, as a string, for example '0.9'."
    if pattern in (INTEGER, POSITIVE):
        return f"options.{name} must be a whole number{' above 0' if pattern == POSITIVE else ''}, as a string."
    return f"options.{name} must be one of {', '.join(pattern.split('|'))}."
