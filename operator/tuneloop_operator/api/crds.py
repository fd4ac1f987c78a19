"""From the pydantic models to CustomResourceDefinitions: structural OpenAPI v3 with CEL, columns and subresources.

What pydantic writes and a structural schema forbids is rewritten here: `$ref` becomes the type itself, `anyOf` with null an optional
field, `const` an enum, numeric exclusive bounds their boolean form, `propertyNames` a rule. Patterns that carry a sentence become
CEL rules, since "should match '^[a-z…" tells nobody what to change. The status gets no defaults: a value that the API server adds
would differ from what was written, and be written again for ever.
"""

from __future__ import annotations

from typing import Any

import yaml

from tuneloop_operator.api import GROUP, VERSION, finetunejob, modeldeployment, modelversion
from tuneloop_operator.api.definitions import Definition
from tuneloop_operator.api.types import RANGE, SENTENCE

Schema = dict[str, Any]
"""JSON schema: its shape is pydantic's on the way in and Kubernetes' on the way out."""

DEFINITIONS: tuple[Definition, ...] = (finetunejob.DEFINITION, modelversion.DEFINITION, modeldeployment.DEFINITION)
KEPT = (
    "type",
    "description",
    "enum",
    "format",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "pattern",
)
HEADER = "# Generated from operator/tuneloop_operator/api by `make generate`; do not edit.\n"


def render_crd(definition: Definition) -> dict[str, Any]:
    """The CustomResourceDefinition of one kind."""
    version: dict[str, Any] = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": [_column(column.name, column.type, column.path, column.priority) for column in definition.columns],
        "schema": {"openAPIV3Schema": _root(definition)},
        "subresources": {"status": {}},
    }
    if definition.scale is not None:
        version["subresources"]["scale"] = {
            "specReplicasPath": definition.scale.spec_replicas,
            "statusReplicasPath": definition.scale.status_replicas,
            "labelSelectorPath": definition.scale.selector,
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{definition.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": definition.kind,
                "listKind": f"{definition.kind}List",
                "plural": definition.plural,
                "singular": definition.kind.lower(),
                "shortNames": [definition.short_name],
                "categories": ["tuneloop"],
            },
            "scope": "Namespaced",
            "versions": [version],
        },
    }


def render_files() -> dict[str, str]:
    """File name -> text of every generated CRD."""
    return {f"{definition.plural}.yaml": HEADER + _dump(render_crd(definition)) for definition in DEFINITIONS}


def render_chart_templates() -> dict[str, str]:
    """The same as templates of the chart, where uninstalling must keep the CRDs: with them would go every object."""
    files = {}
    for definition in DEFINITIONS:
        crd = render_crd(definition)
        crd["metadata"]["annotations"] = {"helm.sh/resource-policy": "keep"}
        text = _dump(crd).replace("{{", '{{ "{{" }}')
        files[f"{definition.plural}.yaml"] = f"{HEADER}{{{{- if .Values.crds.install }}}}\n{text}{{{{- end }}}}\n"
    return files


def _column(name: str, type_: str, path: str, priority: int) -> dict[str, Any]:
    column: dict[str, Any] = {"name": name, "type": type_, "jsonPath": path}
    return {**column, "priority": priority} if priority else column


def _root(definition: Definition) -> Schema:
    source = definition.model.model_json_schema(by_alias=True)
    types: dict[str, Schema] = source.get("$defs", {})
    parts = source["properties"]
    spec, status = structural(parts["spec"], types), without_defaults(structural(parts["status"], types))
    for name, part in (("spec", spec), ("status", status)):
        part.pop("default", None)
        part["description"] = types[parts[name]["$ref"].rpartition("/")[2]]["description"]
    root: Schema = {
        "type": "object",
        "description": source["description"],
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}."},
            "kind": {"type": "string", "description": f"{definition.kind}."},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
    }
    if definition.rules:
        root["x-kubernetes-validations"] = [dict(rule) for rule in definition.rules]
    return root


def structural(schema: Schema, types: dict[str, Schema]) -> Schema:
    """One node of pydantic's schema, and all below it, as a structural schema."""
    node = _resolve(schema, types)
    result: Schema = {key: node[key] for key in KEPT if key in node}
    if "const" in node:
        result["enum"] = [node["const"]]
    if "description" in result:
        result["description"] = " ".join(result["description"].split())
    for bound, flag in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if flag in node:
            result[bound], result[flag] = node[flag], True
    result |= {key: value for key, value in node.items() if key.startswith("x-kubernetes-") and key != "x-kubernetes-validations"}
    if "items" in node:
        result["items"] = structural(node["items"], types)
    if isinstance(node.get("additionalProperties"), dict):
        result["additionalProperties"] = structural(node["additionalProperties"], types)
    if "properties" in node:
        result["properties"] = {name: structural(field, types) for name, field in node["properties"].items()}
        if node.get("required"):
            result["required"] = list(node["required"])
    if rules := _rules(node, result):
        result["x-kubernetes-validations"] = rules
    return _with_default(node, result)


def without_defaults(schema: Schema) -> Schema:
    """The same schema, with no default anywhere."""
    result = {key: value for key, value in schema.items() if key != "default"}
    if "properties" in result:
        result["properties"] = {name: without_defaults(field) for name, field in result["properties"].items()}
    for key in ("items", "additionalProperties"):
        if key in result:
            result[key] = without_defaults(result[key])
    return result


def _resolve(schema: Schema, types: dict[str, Schema]) -> Schema:
    """Follow `$ref` and take the one type out of `anyOf: [type, null]`; what stands beside them wins."""
    beside = {key: value for key, value in schema.items() if key not in ("$ref", "anyOf", "title")}
    if "$ref" in schema:
        return {**_resolve(types[schema["$ref"].rpartition("/")[2]], types), **beside}
    if "anyOf" in schema:
        choices = [choice for choice in schema["anyOf"] if choice.get("type") != "null"]
        if len(choices) != 1:
            raise ValueError(f"a structural schema has no unions: {schema}")
        return {**_resolve(choices[0], types), **beside}
    return beside


def _rules(node: Schema, result: Schema) -> list[dict[str, str]]:
    rules: list[dict[str, str]] = list(node.get("x-kubernetes-validations", ()))
    if SENTENCE in node:
        pattern = result.pop("pattern")
        checks = [f"self.matches({_quote(pattern)})", *([node[RANGE]] if RANGE in node else [])]
        rules.append({"rule": " && ".join(checks), "message": node[SENTENCE]})
    limit = node.get("propertyNames", {}).get("maxLength")
    if limit is not None:
        rules.append({"rule": f"self.all(key, key.size() <= {limit})", "message": f"keys must have at most {limit} characters."})
    return rules


def _with_default(node: Schema, result: Schema) -> Schema:
    """An object's default is made of its fields': written out, since the API server checks rules on it as it stands. Empty ones go."""
    default = node.get("default")
    if default is not None and result.get("type") == "object":
        default = {name: field["default"] for name, field in result.get("properties", {}).items() if "default" in field}
    return result if default in (None, [], {}, "") else {**result, "default": default}


def _quote(text: str) -> str:
    """A CEL string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


class _Dumper(yaml.SafeDumper):
    """Without anchors: a CRD is read by people."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Go's parser takes a plain `n` or `y` for a boolean."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if text.lower() in ("y", "n") else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def _dump(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=140, allow_unicode=True)
