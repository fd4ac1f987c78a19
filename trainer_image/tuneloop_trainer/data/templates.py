"""Sandboxed Jinja over a row's columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tuneloop_trainer.contract import RunConfig
from tuneloop_trainer.costs import TooCostly, bounded

MAX_OUTPUT = 256 * 1024
MAX_PRODUCT = 1 << 20
"""Largest string or list that `*` may make inside a template."""
MAX_BITS = 4096
"""Of a product of whole numbers: nothing interrupts a multiplication."""


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: object, operator: str, left: object, right: object) -> object:
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_BITS:
            raise TemplateError(f"{operator} makes too large a number")
        if isinstance(left, int | float) and isinstance(right, int | float) and operator == "*":
            return left * right
        for value, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, str | list | tuple) and isinstance(times, int) and len(value) * times <= MAX_PRODUCT:
                return value * times
        raise TemplateError(f"{operator} makes too large a value")


_ENVIRONMENT = _Environment(undefined=StrictUndefined, autoescape=False)


class RowTemplate:
    """A compiled template. Raises TemplateError, and TooCostly where it takes more time or memory than a row is worth, from
    construction too: constants are computed there."""

    def __init__(self, source: str) -> None:
        with _told(), bounded():
            self._template: Template = _ENVIRONMENT.from_string(source)
            names = meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
        self.variables: frozenset[str] = frozenset(names - _ENVIRONMENT.globals.keys())
        """The columns that the template reads."""

    def render(self, values: Mapping[str, object]) -> str:
        """The text; at most MAX_OUTPUT characters, and an undefined name is an error."""
        parts: list[str] = []
        size = 0
        with _told(), bounded():
            for part in self._template.generate(values):
                size += len(part)
                if size > MAX_OUTPUT:
                    raise TemplateError(f"the template's output is longer than {MAX_OUTPUT} characters")
                parts.append(part)
        return "".join(parts)


@contextmanager
def _told() -> Iterator[None]:
    """Whatever a template does wrong as an error of the template's."""
    try:
        yield
    except (TemplateError, TooCostly):
        raise
    except Exception as error:  # a template may call any method of a text, in any wrong way
        raise TemplateError(type(error).__name__) from error


def served_prompt(config: RunConfig, text: str) -> str | None:
    """What a gateway makes of a user's text; None where it cannot. A version has the prompt template of the first source with one; rows of
    other sources and suites may have been made otherwise."""
    templates = (source.template.prompt for source in config.train if source.template is not None)
    served = next((template for template in templates if template is not None), None)
    if served is None:
        return text
    try:
        return RowTemplate(served).render({"text": text})
    except (TemplateError, TooCostly):
        return None
