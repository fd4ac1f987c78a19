"""What a crashed engine said: the sentence of its last exception, out of the tail of its log, and whether another start can do better."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tuneloop_operator.api.conditions import DeploymentReason
from tuneloop_operator.domain.conditions import shortened

EXCEPTION = re.compile(r"^(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?(?:\w+\.)*\w+(?:Error|Exception|NotFound): (?P<said>\S.*)$")
"""A line that ends a traceback, perhaps behind the prefixes of vLLM's processes and of its log."""
NO_MODULE = re.compile(r"^\S*python[\d.]*: (?P<said>(?:Error while finding module|No module named).*)$")
"""What Python says of `-m` before it runs anything."""
HEARSAY = ("Engine core initialization failed", "EngineCore encountered an issue", "WorkerProc initialization failed")
"""Exceptions that only say that another process had one."""
WRAPPED = re.compile(r"Worker failed with error '(?P<said>.*)', please check the stack trace")
DETAIL = "validation error"
"""pydantic says what is wrong in the lines after its first."""
SENTENCE_LENGTH = 300


@dataclass(frozen=True)
class Diagnosis:
    """A crash that is understood."""

    reason: DeploymentReason
    remedy: str
    is_permanent: bool
    """The next start fails in the same way: there is no use in waiting for it."""


R = DeploymentReason
KNOWN: tuple[tuple[str, Diagnosis], ...] = (
    (
        r"LoRA rank \d+ is greater than max_lora_rank",
        Diagnosis(R.ENGINE_FAILED, "Record the adapter's true rank (at most 512) as artifact.rank of a new ModelVersion.", True),
    ),
    (
        r"add_lora method failed|Loading lora .* failed|target_modules|deserializing header|adapter_config",
        Diagnosis(R.ENGINE_FAILED, "The adapter is damaged or was made for another base: package it again by a new FineTuneJob.", True),
    ),
    (
        r"No module named|Error while finding module",
        Diagnosis(R.ENGINE_FAILED, "Set engine.image to one with python3 and vLLM.", True),
    ),
    (
        r"\b40[13] Client Error|[Gg]ated repo|Access to model \S+ is restricted",
        Diagnosis(
            R.ACCESS_DENIED, "Name a Secret with a token that may read the model in spec.base.source.secretRef of a new version.", True
        ),
    ),
    (
        r"Repo id must be|Invalid repository ID|Repository Not Found|Revision Not Found|Invalid rev id|no file named",
        Diagnosis(R.MODEL_NOT_FOUND, "Put the model back where spec.base of the ModelVersion says, or serve another version.", True),
    ),
    (
        r"locate the files? on the Hub|outgoing traffic has been disabled|We couldn't connect|offline mode|Name or service not known"
        r"|Temporary failure in name resolution|Connection refused|Network is unreachable|cached snapshot folder",
        Diagnosis(
            R.MODEL_NOT_FOUND,
            "The engine's pods cannot reach the hub. Let them, or train by a FineTuneJob, which keeps the base on a claim.",
            False,
        ),
    ),
)
"""First match counts. Sentences of vLLM 0.32 and of the hub's client."""


def sentence(log: str) -> str:
    """The last exception that is no hearsay, without what wraps it; "" where the log has none."""
    lines = log.splitlines()
    found = [(index, match["said"]) for index, line in enumerate(lines) if (match := _match(line)) is not None]
    own = [(index, said) for index, said in found if not said.startswith(HEARSAY)] or found
    if not own:
        return ""
    index, said = own[-1]
    if DETAIL in said and index + 1 < len(lines):
        said = lines[index + 1].strip().removeprefix("Value error, ")
    return unwrapped(said)


def unwrapped(said: str) -> str:
    """Without what another process put around it."""
    wrapped = WRAPPED.search(said)
    return shortened(wrapped["said"] if wrapped is not None else said, SENTENCE_LENGTH)


def diagnose(log: str) -> Diagnosis | None:
    """Looks at the whole exception, wrapping included; None where it is not known."""
    lines = "\n".join(line for line in log.splitlines() if _match(line) or line.startswith("  Value error"))
    return known_by(lines)


def known_by(said: str) -> Diagnosis | None:
    return next((diagnosis for pattern, diagnosis in KNOWN if re.search(pattern, said)), None)


def _match(line: str) -> re.Match[str] | None:
    return EXCEPTION.match(line) or NO_MODULE.match(line)
