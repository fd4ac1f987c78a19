"""How a kind presents itself to the API server, beside its fields: names, columns, scale, and rules over the whole object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tuneloop_operator.api.types import Model

Rule = dict[str, str]
"""An entry of `x-kubernetes-validations`."""


@dataclass(frozen=True)
class Column:
    """A column of `kubectl get`; priority 1 shows it with `-o wide` only."""

    name: str
    path: str
    type: Literal["string", "integer", "date"] = "string"
    priority: int = 0


@dataclass(frozen=True)
class Scale:
    """Paths of the scale subresource."""

    spec_replicas: str
    status_replicas: str
    selector: str


@dataclass(frozen=True)
class Definition:
    """Everything of a CustomResourceDefinition that the fields do not say."""

    kind: str
    plural: str
    short_name: str
    model: type[Model]
    columns: tuple[Column, ...]
    rules: tuple[Rule, ...] = ()
    scale: Scale | None = None


def condition(type_: str) -> str:
    """JSON path of a condition's status."""
    return f'.status.conditions[?(@.type=="{type_}")].status'


NAME_RULE: Rule = {
    "rule": "self.metadata.name.size() <= 52 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
    "message": "metadata.name must be at most 52 characters, start with a letter, and have only a-z, 0-9 and '-': "
    "the names of Services, Jobs and labels are made from it.",
}


def immutable(model: type[Model], *but: str, path: str, when: str, message: str) -> tuple[Rule, ...]:
    """One rule for each field of `model` (but `but`, named as in YAML) that forbids its change while `when` holds.

    `path` is where the fields stand ("" = the rules stand beside them); `message` has one {field}.
    """
    return tuple(
        _immutable(field.alias or name, path, when, message) for name, field in model.model_fields.items() if field.alias not in but
    )


def _immutable(field: str, path: str, when: str, message: str) -> Rule:
    new, old = f"self{path}.{field}", f"oldSelf{path}.{field}"
    unchanged = f"has({new}) == has({old}) && (!has({new}) || {new} == {old})"
    rule = {"rule": f"!({when}) || ({unchanged})" if when else unchanged, "message": message.format(field=field)}
    return {**rule, "fieldPath": f"{path}.{field}"} if path else rule
