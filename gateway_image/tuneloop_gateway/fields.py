"""The fields of a completion request that reach an engine, each with its bounds; what is not here is refused.

The models say what is accepted, in the gateway and in its OpenAPI document alike. Left out for good: what carries code or templates
(`chat_template`), tensors, addresses that the engine would fetch from, and what belongs to whoever runs the engine (`priority`,
`request_id`, transfer parameters).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tuneloop_gateway.errors import invalid

MAX_CHOICES = 16
MAX_MESSAGES = 2048
MAX_PROMPTS = 256
MAX_SEQUENCES = 512
"""Prompts times choices."""
MAX_TOKENS = 1 << 20
MAX_TOKEN_ID = (1 << 31) - 1
MAX_SCHEMA_CHARS = 64 << 10
MAX_GRAMMAR_CHARS = 16 << 10
MAX_REGEX_CHARS = 2048
MAX_REPEATS = 10_000
"""Product of all counts in braces, and any one bound of a schema: `(a{999}){999}` is short, and what is built of it is not."""
_COUNTS = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_BOUNDS = {"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties", "minContains", "maxContains"}

Object = dict[str, Any]  # free within the body's size and depth


# --- what engines compile, and what they would fetch ----------------------------


def _check_repeats(pattern: str) -> str:
    product = 1
    for counts in _COUNTS.findall(pattern):
        product *= max([1, *(int(count) if len(count) <= 5 else MAX_REPEATS + 1 for count in counts if count)])
        if product > MAX_REPEATS:
            raise ValueError(f"the counts in braces of a pattern or grammar may multiply to {MAX_REPEATS}")
    return pattern


def _check_schema(schema: Object) -> Object:
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
        raise ValueError(f"a JSON schema may have {MAX_SCHEMA_CHARS} characters")
    for name, value in _members(schema):
        if name == "pattern" and isinstance(value, str):
            _check_pattern(value)
        elif name == "patternProperties" and isinstance(value, dict):
            for pattern in value:
                _check_pattern(pattern)
        elif name in _BOUNDS and isinstance(value, int | float) and value > MAX_REPEATS:
            raise ValueError(f"'{name}' of a JSON schema may be {MAX_REPEATS}")
    return schema


def _check_pattern(pattern: str) -> None:
    if len(pattern) > MAX_REGEX_CHARS:
        raise ValueError(f"a pattern may have {MAX_REGEX_CHARS} characters")
    _check_repeats(pattern)


def _check_written_schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("a JSON schema must be valid JSON") from None
    _check_schema(schema)
    return text


def _members(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every name and value in it, at any depth."""
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from value.items()
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)


def _check_part(part: Object) -> Object:
    """Media come within the request: an engine that fetched what a user names would reach what the user cannot."""
    for name, value in _members(part):
        is_address = name == "url" or (name.endswith("_url") and not isinstance(value, dict))
        if is_address and not (isinstance(value, str) and value.startswith("data:")):
            raise ValueError("media are taken as data: URLs alone, not from other addresses")
    return part


# --- the fields ------------------------------------------------------------------

Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
Text = Annotated[str, Field(max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_TOKENS)]
Listed = Annotated[list[Text], Field(fail_fast=True, max_length=16)]
Regex = Annotated[str, Field(max_length=MAX_REGEX_CHARS), AfterValidator(_check_repeats)]
Grammar = Annotated[str, Field(max_length=MAX_GRAMMAR_CHARS), AfterValidator(_check_repeats)]
Schema = Annotated[Object, AfterValidator(_check_schema)]
WrittenSchema = Annotated[str, Field(max_length=MAX_SCHEMA_CHARS), AfterValidator(_check_written_schema)]
Part = Annotated[Object, AfterValidator(_check_part)]


class _Closed(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Closed):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Thinking(_Closed):
    """Of a chat template's variables the two that switch reasoning."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


class Structured(_Closed):
    """What an answer must look like, in vLLM's words."""

    json_: Schema | WrittenSchema | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: Regex | None = None
    grammar: Grammar | None = None
    choice: Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=256)] | None = None
    disable_any_whitespace: bool | None = None


class JsonSchema(_Closed):
    name: Text | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Closed):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(_Closed):
    name: Text
    description: Annotated[str, Field(max_length=16_384)] | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(_Closed):
    type: Literal["function"]
    function: Function


class Message(BaseModel):
    """One turn. Fields beside these (tool calls, names, reasoning) go to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    role: Annotated[str, Field(min_length=1, max_length=32)]
    content: str | Annotated[list[Part], Field(fail_fast=True, max_length=256)] | None = None


class _Sampling(_Closed):
    """What chat and completions have in common."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Text | Listed | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=64)] | None = None
    bad_words: Listed | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Structured | None = None
    user: Text | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None


class ChatRequest(_Sampling):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Text | Object | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Text | None = None
    include_reasoning: bool | None = None
    verbosity: Text | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: Thinking | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionRequest(_Sampling):
    """`POST /v1/completions`"""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    )
    best_of: Choices | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Annotated[str, Field(max_length=16_384)] | None = None

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        prompts = 1 if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else len(self.prompt)
        if prompts * max(self.n or 1, self.best_of or 1) > MAX_SEQUENCES:
            raise ValueError(f"a request may have {MAX_SEQUENCES} answers: prompts times 'n'")
        return self


def check_fields(body: Object, model: type[ChatRequest] | type[CompletionRequest]) -> None:
    """Raises Refused with a sentence about the first field that cannot go to an engine."""
    try:
        model.model_validate(body)
    except ValidationError as error:
        raise invalid(*_sentence(error)) from None


def _sentence(error: ValidationError) -> tuple[str, str | None]:
    """About the first field of all that are wrong, and its name. Of several forms that a field may have, the one that was meant."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    of_field = [e for e in found if e["loc"][:1] == found[0]["loc"][:1]]
    first = next((e for e in of_field if not e["type"].endswith("_type")), of_field[0])
    name = str(first["loc"][0])[:100] if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return f"The field '{'.'.join(str(part)[:100] for part in first['loc'])}' is not taken here.", name
    says = first["msg"].removeprefix("Value error, ")[:300].replace("Input should be", "must be").replace(" should have", " must have")
    if first["type"] in ("model_type", "dict_type"):
        says = "must be an object" if len(first["loc"]) == 1 else "must hold objects"
    if name is None:
        return f"{says[:1].upper()}{says[1:]}.", None
    return f"'{name}'{' ' if says.startswith('must') else ': '}{says}.", name
