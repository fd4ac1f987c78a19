"""Prompts and completions as tokens: exactly the prompt that the engine renders, followed by the answer and its end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tuneloop_trainer.contract import Reason
from tuneloop_trainer.costs import TooCostly
from tuneloop_trainer.errors import Invalid

IGNORED = -100
"""The label of a token without loss."""


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str
    learned: bool
    """Whether an assistant's turn is one to learn."""


def turns_of(values: Iterable[Sequence[Any]] | None) -> tuple[Turn, ...] | None:
    """As JSON has them."""
    return None if values is None else tuple(Turn(*value) for value in values)


History = Sequence[Turn] | None
"""The turns of a conversation between the system turn and the last prompt; None: there are none."""


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

    def prompt_text(self, prompt: str, system: str | None = None, history: History = None) -> str:
        if not self._chat and history:
            raise Invalid("A conversation is rendered by the base model's chat template. Set promptFormat: Chat.")
        if not self._chat:
            return prompt if system is None else f"{system}\n{prompt}"
        return self._render(_messages(prompt, system, history), add_generation_prompt=True)

    def prompt_ids(self, prompt: str, system: str | None = None, history: History = None) -> list[int]:
        """Chat: the template writes the special tokens itself. Text: the tokenizer adds what it adds when serving."""
        return self._ids(self.prompt_text(prompt, system, history))

    def _ids(self, prompt_text: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt_text, add_special_tokens=not self._chat)["input_ids"]
        while not self._chat and len(ids) > 1 and ids[-1] in self._stop_ids:
            ids = ids[:-1]
        return [*self.before, *ids]

    def encode(self, prompt: str, completion: str, system: str | None = None, history: History = None) -> Encoded:
        prompt_text = self.prompt_text(prompt, system, history)
        rest = completion
        if self._chat:
            messages = [*_messages(prompt, system, history), {"role": "assistant", "content": completion}]
            whole = self._render(messages, add_generation_prompt=False)
            if not whole.startswith(prompt_text):
                raise Invalid(
                    "The base model's chat template renders a prompt differently once it has an answer, so that what is trained on "
                    "would not be what is served. Set promptFormat: Text."
                )
            rest = whole[len(prompt_text) :]
        ids: list[int] = self._tokenizer(rest, add_special_tokens=False)["input_ids"]
        return Encoded(self._ids(prompt_text), self._ended(ids))

    def converse(
        self, prompt: str, completion: str, system: str | None, history: Sequence[Turn], limit: int
    ) -> tuple[list[int], list[int], int]:
        """Token ids and labels of a conversation, cut at the limit, and its length uncut.

        Each answer that is learned stands behind exactly what the engine reads when it is asked for it: all turns so far, rendered and
        tokenised anew. Raises Invalid where that does not begin with what the row has so far.
        """
        whole = self.encode(prompt, completion, system, history)
        ids: list[int] = []
        labels: list[int] = []
        for place, turn in enumerate((*history, Turn("user", prompt, False), Turn("assistant", completion, True))):
            if not turn.learned:
                continue
            if len(ids) >= limit:
                break
            earlier = place < len(history)
            one = self.encode(history[place - 1].content, turn.content, system, history[: place - 1]) if earlier else whole
            if one.prompt[: len(ids)] != ids:
                raise Invalid(
                    f"turn {place + 1 + (system is not None)}: the base model's chat template or tokenizer writes the turns before it "
                    "otherwise than when they were answers: one row cannot be what is served. Make a row of each answer, with weight: 0 on "
                    "the assistant's turns before it, or use another base model."
                )
            labels += [IGNORED] * (len(one.prompt) - len(ids)) + one.completion
            ids = one.prompt + one.completion
        return ids[:limit], labels[:limit], len(whole.prompt) + len(whole.completion)

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


def _messages(prompt: str, system: str | None, history: History = None) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    said = [{"role": turn.role, "content": turn.content} for turn in history or ()]
    return [*before, *said, {"role": "user", "content": prompt}]
