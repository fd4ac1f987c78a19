"""A revision's prompt, applied to a request before it goes to the engine."""

from __future__ import annotations

from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tuneloop_gateway.contract import Prompt, Revision
from tuneloop_gateway.errors import Refused, invalid
from tuneloop_gateway.inbound import CHAT_PATH, Inbound, Json, content_text, last_user_message

MAX_RENDERED_CHARS = 1 << 20


class PromptInvalid(Exception):
    """The template of a revision cannot be used; the message says why."""


def _environment() -> ImmutableSandboxedEnvironment:
    """No autoescape (it is no HTML), and a name that the template misspells is an error rather than nothing."""
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)


def render_template(template: Template, text: str) -> str:
    """The template over one text. Raises PromptInvalid."""
    try:
        rendered = template.render(text=text, input=text)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError) as error:
        raise PromptInvalid(f"The prompt template cannot be rendered: {error}"[:300]) from error
    if len(rendered) > MAX_RENDERED_CHARS:
        raise PromptInvalid("The prompt template renders to more than a million characters.")
    return rendered


class CompiledPrompt:
    """A revision's prompt with its template compiled. Raises PromptInvalid at once for a template that does not work."""

    def __init__(self, prompt: Prompt, model_id: str) -> None:
        self._prompt, self._model_id = prompt, model_id
        self._template: Template | None = None
        if prompt.template is not None:
            try:
                self._template = _environment().from_string(prompt.template)
            except (TemplateError, RecursionError) as error:
                raise PromptInvalid(f"The prompt template is not valid Jinja: {error}"[:300]) from error
            render_template(self._template, "a text to try the template on")

    def apply(self, inbound: Inbound) -> Json:
        """The body for the engine. The client's body is not changed."""
        prompt, body = self._prompt, dict(inbound.body)
        body["model"] = self._model_id
        if prompt.temperature is not None and body.get("temperature") is None:
            body["temperature"] = prompt.temperature
        if prompt.max_tokens is not None and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            body["max_tokens"] = prompt.max_tokens
        if inbound.path == CHAT_PATH:
            body["messages"] = self._messages(body["messages"])
        elif self._template is not None:
            body["prompt"] = self._completion_prompt(body["prompt"])
        return body

    def _messages(self, messages: list[Json]) -> list[Json]:
        prompt, result = self._prompt, list(messages)
        last = last_user_message(messages)
        if last is not None:
            at = next(i for i, message in enumerate(messages) if message is last)
            if self._template is not None:
                result[at] = {**last, "content": self._content(last.get("content"))}
            shots = [
                {"role": role, "content": content}
                for shot in prompt.few_shot
                for role, content in (("user", self._text(shot.input)), ("assistant", shot.output))
            ]
            result[at:at] = shots
        if prompt.system is not None and not any(m["role"] in ("system", "developer") for m in messages):
            result.insert(0, {"role": "system", "content": prompt.system})
        return result

    def _text(self, text: str) -> str:
        if self._template is None:
            return text
        try:
            return render_template(self._template, text)
        except PromptInvalid as error:
            raise Refused(500, str(error), code="prompt_error") from error

    def _content(self, content: Any) -> Any:
        """Rendered text in place of the text; other parts (images) stay."""
        rendered = self._text(content_text(content))
        if not isinstance(content, list):
            return rendered
        others = [part for part in content if not (isinstance(part, dict) and part.get("type") == "text")]
        return [{"type": "text", "text": rendered}, *others]

    def _completion_prompt(self, prompt: Any) -> Any:
        if isinstance(prompt, str):
            return self._text(prompt)
        if all(isinstance(p, str) for p in prompt):
            return [self._text(p) for p in prompt]
        raise invalid("This deployment has a prompt template: 'prompt' must be text, not token ids.", "prompt")


def compile_prompt(revision: Revision) -> CompiledPrompt:
    """The prompt of a revision. Raises PromptInvalid."""
    return CompiledPrompt(revision.prompt, revision.model_id)
