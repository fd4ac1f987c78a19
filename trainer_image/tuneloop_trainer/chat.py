"""Prompts and completions as tokens: exactly the prompt that the engine renders, followed by the answer and its end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuneloop_trainer.contract import Reason
from tuneloop_trainer.costs import TooCostly
from tuneloop_trainer.errors import Invalid

IGNORED = -100
"""The label of a token without loss."""


@dataclass(frozen=True, slots=True)
class Encoded:
    prompt: list[int]
    completion: list[int]
    """Ends with a token at which the engine stops."""


class Formatter:
    """Renders and tokenises. Chat: the tokenizer's chat template, prompt as user turn, completion as assistant turn.

    Prompt and completion are tokenised apart, because the engine tokenises the prompt alone: tokens that would merge across
    the border never do when it serves.
    """

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int], style: Literal["Chat", "Text"]) -> None:  # Any: transformers is untyped
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._chat = style == "Chat"
        self.before: tuple[int, ...] = ()
        """Ids that stand before every text: those of a learned prompt."""
        if self._chat and tokenizer.chat_template is None:
            raise Invalid("The base model's tokenizer has no chat template. Set promptFormat: Text.")

    @property
    def tells_time(self) -> bool:
        """The chat template writes the date into every prompt, which is then another one each day."""
        return self._chat and "strftime_now" in str(self._tokenizer.chat_template)

    @property
    def stops(self) -> frozenset[int]:
        """The tokens at which the engine stops."""
        return self._stop_ids

    def prompt_text(self, prompt: str, system: str | None = None) -> str:
        if not self._chat:
            return prompt if system is None else f"{system}\n{prompt}"
        return self._render(_messages(prompt, system), add_generation_prompt=True)

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """Chat: the template writes the special tokens itself. Text: the tokenizer adds what it adds when serving."""
        return self._ids(self.prompt_text(prompt, system))

    def _ids(self, prompt_text: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt_text, add_special_tokens=not self._chat)["input_ids"]
        while not self._chat and len(ids) > 1 and ids[-1] in self._stop_ids:
            ids = ids[:-1]
        return [*self.before, *ids]

    def encode(self, prompt: str, completion: str, system: str | None = None) -> Encoded:
        prompt_text = self.prompt_text(prompt, system)
        rest = completion
        if self._chat:
            whole = self._render([*_messages(prompt, system), {"role": "assistant", "content": completion}], add_generation_prompt=False)
            if not whole.startswith(prompt_text):
                raise Invalid(
                    "The base model's chat template renders a prompt differently once it has an answer, so that what is trained on "
                    "would not be what is served. Set promptFormat: Text."
                )
            rest = whole[len(prompt_text) :]
        ids: list[int] = self._tokenizer(rest, add_special_tokens=False)["input_ids"]
        return Encoded(self._ids(prompt_text), self._ended(ids))

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def _ended(self, ids: list[int]) -> list[int]:
        """Cut behind the last stop token (templates write a newline there that is never generated), or one appended."""
        ends = [place for place, token in enumerate(ids) if token in self._stop_ids]
        if self._chat and ends:
            return ids[: ends[-1] + 1]
        return [*ids, self._tokenizer.eos_token_id]

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        except TooCostly:
            raise
        except Exception as error:  # a template may raise anything, by its own raise_exception too
            raise Invalid(f"The base model's chat template fails: {error}", Reason.DATA_INVALID) from error
        return text


def stop_ids(model_folder: Path, tokenizer: Any) -> frozenset[int]:  # Any: transformers is untyped
    """The tokens at which the engine stops: the tokenizer's end and those of generation_config.json."""
    if tokenizer.eos_token_id is None:
        raise Invalid("The base model's tokenizer has no end-of-sequence token.", Reason.MODEL_NOT_FOUND)
    path = model_folder / "generation_config.json"
    configured = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    more = configured if isinstance(configured, list) else [configured]
    return frozenset([tokenizer.eos_token_id, *(token for token in more if isinstance(token, int))])


def _messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    user = {"role": "user", "content": prompt}
    return [user] if system is None else [{"role": "system", "content": system}, user]
