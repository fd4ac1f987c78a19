"""Every way to break a schema by one value, found by walking it beside a manifest that sets every field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]
WRONG_TYPE = {"string": 7, "integer": "seven", "boolean": "yes", "array": "one", "object": "one"}


@dataclass(frozen=True)
class Violation:
    """A value that must be refused, where it stands, and what the refusal must say."""

    path: str
    value: object
    sentence: str

    def __str__(self) -> str:
        return f"{self.path}: {self.sentence}"


def shown(path: str) -> str:
    """The path as the API server writes it."""
    return re.sub(r"\.(\d+)", r"[\1]", path)


def violations(schema: Schema, sample: Any, path: str) -> Iterator[Violation]:
    """All single-value violations of the schema at and below `path`."""
    yield Violation(path, WRONG_TYPE[schema["type"]], f"must be of type {schema['type']}")
    yield from _bounds(schema, path)
    yield from _sentences(schema, path)
    if schema["type"] == "object":
        yield from _of_object(schema, sample, path)
    if schema["type"] == "array":
        yield from _of_array(schema, sample, path)


def _bounds(schema: Schema, path: str) -> Iterator[Violation]:
    if "enum" in schema:
        yield Violation(path, "Nonsense", "supported values: " + ", ".join(f'"{value}"' for value in schema["enum"]))
    if "minimum" in schema:
        yield Violation(path, schema["minimum"] - 1, f"should be greater than or equal to {schema['minimum']}")
    if "maximum" in schema:
        yield Violation(path, schema["maximum"] + 1, f"should be less than or equal to {schema['maximum']}")
    if "maxLength" in schema:
        yield Violation(path, "x" * (schema["maxLength"] + 1), f"Too long: may not be more than {schema['maxLength']} bytes")
    if schema.get("minLength"):
        yield Violation(path, "", f"should be at least {schema['minLength']} chars long")
    if "maxProperties" in schema:
        many = {f"k{number}": "1" for number in range(schema["maxProperties"] + 1)}
        yield Violation(path, many, f"must have at most {schema['maxProperties']} items")


def _sentences(schema: Schema, path: str) -> Iterator[Violation]:
    """Rules over a single string, and over the keys of a map: the bad value follows from the rule."""
    for rule in schema.get("x-kubernetes-validations", ()):
        text, message = rule["rule"], rule["message"]
        if text.startswith("self.matches("):
            yield Violation(path, "?" * max(1, schema.get("minLength", 1)), message)
            if "double(self) > 0.0" in text:
                yield Violation(path, "0", message)
            if limit := re.search(r"double\(self\) <= ([0-9.]+)", text):
                yield Violation(path, str(float(limit[1]) + 0.01), message)
            if "contains('..')" in text:
                yield Violation(path, "pvc://claim/../other", message)
        elif option := re.match(r"!\('([^']+)' in self\)", text):
            yield Violation(path, {option[1]: "?"}, message)
        elif limit := re.match(r"self.all\(key, key.size\(\) <= (\d+)\)", text):
            yield Violation(path, {"x" * (int(limit[1]) + 1): "1"}, message)


def _of_object(schema: Schema, sample: Any, path: str) -> Iterator[Violation]:
    for name in schema.get("required", ()):
        yield Violation(f"{path}.{name}", ..., "Required value")
    for name, field in schema.get("properties", {}).items():
        if name in sample:
            yield from violations(field, sample[name], f"{path}.{name}")
    if "additionalProperties" in schema:
        for key, value in sample.items():
            if "." not in key:
                yield from violations(schema["additionalProperties"], value, f"{path}.{key}")
    if "properties" in schema and "x-kubernetes-preserve-unknown-fields" not in schema:
        yield Violation(f"{path}.nonsense", "x", f'unknown field "{shown(path)}.nonsense"')


def _of_array(schema: Schema, sample: Any, path: str) -> Iterator[Violation]:
    if "maxItems" in schema:
        yield Violation(path, [sample[0]] * (schema["maxItems"] + 1), f"must have at most {schema['maxItems']} items")
    if schema.get("minItems"):
        yield Violation(path, [], f"should have at least {schema['minItems']} items")
    if schema.get("x-kubernetes-list-type") == "map":
        yield Violation(path, [sample[0], sample[0]], "Duplicate value")
    for index, item in enumerate(sample):
        yield from violations(schema["items"], item, f"{path}.{index}")


def unset_fields(schema: Schema, sample: Any, path: str) -> Iterator[str]:
    """Fields of the schema that the sample leaves out; of lists, the items count together."""
    for name, field in schema.get("properties", {}).items():
        if name not in sample:
            yield f"{path}.{name}"
        elif field["type"] == "object":
            yield from unset_fields(field, sample[name], f"{path}.{name}")
        elif field["type"] == "array" and field["items"]["type"] == "object":
            missing = [set(unset_fields(field["items"], item, f"{path}.{name}[]")) for item in sample[name]]
            yield from set.intersection(*missing)
