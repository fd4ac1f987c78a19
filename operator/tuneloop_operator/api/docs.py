"""The reference of the API as one Markdown page, from the same schema as the CRDs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tuneloop_operator.api import API_VERSION
from tuneloop_operator.api.crds import DEFINITIONS, Schema, render_crd
from tuneloop_operator.api.definitions import Definition
from tuneloop_operator.api.objectives import combinations, defaults

COMBINATIONS = f"""## What goes together

{combinations()}

## What a run is trained with

Where the spec is silent. `settings.json` beside the trained weights has every value of a run, and where it came from.

{defaults()}
"""

INTRODUCTION = f"""# API reference

Generated from `operator/tuneloop_operator/api` by `make generate`; do not edit. Group and version: `{API_VERSION}`.
`kubectl explain` shows the same. Numbers that Kubernetes tools would mangle are strings. Every string, list and map is bounded; the
bounds are in the CRDs.
"""


def render_reference() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, COMBINATIONS, *(_kind(definition) for definition in DEFINITIONS)])


def _kind(definition: Definition) -> str:
    schema = render_crd(definition)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    lines = [f"## {definition.kind} (`{definition.short_name}`)", "", schema["description"], ""]
    lines += ["### spec", "", "| field | type | default | |", "|---|---|---|---|", *_rows(schema["properties"]["spec"], "")]
    lines += ["", "What is refused beyond types and bounds:", "", *(f"- {sentence}" for sentence in _sentences(definition, schema))]
    lines += ["", "### status", "", "| field | type | |", "|---|---|---|"]
    lines += [_without_default(row) for row in _rows(schema["properties"]["status"], "")]
    return "\n".join([*lines, ""])


def _rows(schema: Schema, path: str) -> Iterator[str]:
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        here = f"{path}.{name}".lstrip(".")
        default = field.get("default") if field["type"] != "object" else None
        cells = [f"`{here}`", _type(field), "**required**" if name in required else _code(default), _text(field["description"])]
        yield "| " + " | ".join(cells) + " |"
        yield from _rows(field, here)
        yield from _rows(field.get("items", {}), f"{here}[]")


def _without_default(row: str) -> str:
    field, type_, _, text = row.strip("| ").split(" | ", 3)
    return f"| {field} | {type_} | {text} |"


def _type(field: Schema) -> str:
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if "additionalProperties" in field:
        return f"map of {_type(field['additionalProperties'])}"
    return str(field["type"])


def _sentences(definition: Definition, schema: Schema) -> Iterator[str]:
    """Rules over several fields, with the object that they look at; those of single strings stand in the CRDs."""
    immutable = [rule["fieldPath"] for rule in definition.rules if "fieldPath" in rule]
    for rule in definition.rules:
        if "fieldPath" not in rule:
            yield rule["message"]
    if immutable:
        example = next(rule for rule in definition.rules if "fieldPath" in rule)
        fields = ", ".join(f"`{path.lstrip('.')}`" for path in immutable)
        yield f"{fields}: {example['message'].partition(' ')[2]}"
    yield from _rules_below(schema["properties"]["spec"], "spec")


def _rules_below(schema: Schema, path: str) -> Iterator[str]:
    if schema["type"] == "object" and "properties" in schema:
        for rule in schema.get("x-kubernetes-validations", ()):
            yield f"`{path}`: {rule['message']}"
    for name, field in schema.get("properties", {}).items():
        yield from _rules_below(field, f"{path}.{name}")
    if "items" in schema:
        yield from _rules_below(schema["items"], f"{path}[]")


def _code(value: Any) -> str:
    """A default of any JSON type, as YAML users would write it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f'`"{value}"`' if isinstance(value, str) and value[:1].isdigit() else f"`{value}`"


def _text(description: str) -> str:
    """Table cells end at a bar."""
    return description.replace("|", "\\|")
