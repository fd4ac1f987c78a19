"""The generated CRDs: as committed, structural, and described to the last field."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from tuneloop_operator.api import crds, docs
from tuneloop_operator.api.crds import DEFINITIONS, render_crd, structural
from tuneloop_operator.api.types import Model

ROOT = Path(__file__).parents[3]
KINDS = [definition.kind for definition in DEFINITIONS]


def schema_of(kind: str) -> dict[str, Any]:
    definition = next(definition for definition in DEFINITIONS if definition.kind == kind)
    return dict(render_crd(definition)["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from nodes(field, f"{path}.{name}")
    for part in ("items", "additionalProperties"):
        if part in schema:
            yield from nodes(schema[part], f"{path}[]")


@pytest.mark.parametrize(
    ("folder", "files"),
    [("crds", crds.render_files()), ("charts/tuneloop/templates/crds", crds.render_chart_templates())],
    ids=["crds", "chart"],
)
def test_the_committed_crds_are_the_generated_ones(folder: str, files: dict[str, str]) -> None:
    committed = {path.name: path.read_text() for path in (ROOT / folder).iterdir()}
    assert committed == files, "run `make generate`, and commit what it wrote"


def test_the_committed_reference_is_the_generated_one() -> None:
    assert (ROOT / "docs/reference/api.md").read_text() == docs.render_reference(), "run `make generate`, and commit what it wrote"


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_names_every_field(kind: str) -> None:
    page = docs.render_reference()
    for part in ("spec", "status"):
        for path, node in nodes(schema_of(kind)["properties"][part]):
            if path and not path.endswith("[]"):
                assert f"`{path.lstrip('.')}`" in page
                assert node["description"].replace("|", "\\|") in page


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_described_in_a_sentence_or_a_phrase(kind: str) -> None:
    for path, node in nodes(schema_of(kind)):
        if not path.endswith("[]") and path != ".metadata":
            assert len(node.get("description", "")) >= 4, path
            assert node["description"].endswith((".", "…", "?", ")")), path


@pytest.mark.parametrize("kind", KINDS)
def test_schemas_are_structural(kind: str) -> None:
    allowed = {*crds.KEPT, "exclusiveMinimum", "exclusiveMaximum", "default", "properties", "required", "items", "additionalProperties"}
    for path, node in nodes(schema_of(kind)):
        assert "type" in node, path
        assert {key for key in node if not key.startswith("x-kubernetes-")} <= allowed, path
        assert not ({"properties", "additionalProperties"} <= node.keys()), path


@pytest.mark.parametrize("kind", KINDS)
def test_every_string_list_and_map_of_a_spec_is_bounded(kind: str) -> None:
    for path, node in nodes(schema_of(kind)["properties"]["spec"]):
        if node["type"] == "string":
            assert "maxLength" in node or "enum" in node, path
        if node["type"] == "array":
            assert "maxItems" in node, path
        if "additionalProperties" in node:
            assert "maxProperties" in node, path


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_a_spec_has_a_lower_bound(kind: str) -> None:
    spec = schema_of(kind)["properties"]["spec"]  # the verdict in a ModelVersion is copied from a status
    numbers = [(path, node) for path, node in nodes(spec) if node["type"] == "integer" and ".evaluation." not in path]
    for path, node in numbers:
        assert "minimum" in node or "enum" in node, path


@pytest.mark.parametrize("kind", KINDS)
def test_a_status_has_no_defaults(kind: str) -> None:
    """What the API server added would differ from what the operator wrote, and be written again for ever."""
    assert [path for path, node in nodes(schema_of(kind)["properties"]["status"]) if "default" in node] == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_release_may_change_has_no_default(kind: str) -> None:
    for path, node in nodes(schema_of(kind)):
        if path.endswith((".image", ".options", ".learningRate", ".probeSha256")):
            assert "default" not in node, path


def test_conditions_are_maps_by_type_and_suites_by_name() -> None:
    for kind in KINDS:
        conditions = schema_of(kind)["properties"]["status"]["properties"]["conditions"]
        assert (conditions["x-kubernetes-list-type"], conditions["x-kubernetes-list-map-keys"]) == ("map", ["type"])
    suites = schema_of("FineTuneJob")["properties"]["spec"]["properties"]["evaluation"]["properties"]["suites"]
    assert (suites["x-kubernetes-list-type"], suites["x-kubernetes-list-map-keys"]) == ("map", ["name"])


def test_keys_of_list_maps_are_required_in_their_items() -> None:
    for kind in KINDS:
        for path, node in nodes(schema_of(kind)):
            for key in node.get("x-kubernetes-list-map-keys", ()):
                assert key in node["items"]["required"], path


def test_every_rule_has_a_sentence() -> None:
    for kind in KINDS:
        for path, node in nodes(schema_of(kind)):
            for rule in node.get("x-kubernetes-validations", ()):
                assert rule["message"].endswith("."), path


def test_kinds_are_of_the_category_tuneloop_alone_and_kept_by_the_chart() -> None:
    files = crds.render_files()
    for name, text in crds.render_chart_templates().items():
        body = text.partition("{{- if .Values.crds.install }}\n")[2].rpartition("{{- end }}")[0].replace('{{ "{{" }}', "{{")
        crd = yaml.load(body, yaml.CSafeLoader)
        assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
        assert crd["spec"]["names"]["categories"] == ["tuneloop"]
        del crd["metadata"]["annotations"]
        assert crd == yaml.load(files[name], yaml.CSafeLoader)


class Sample(Model):
    """A sample."""

    bounded: float = Field(gt=0, le=1, description="Above zero.")
    choice: int | None = Field(default=None, description="Perhaps.")


def test_exclusive_bounds_become_boolean_and_null_becomes_optional() -> None:
    source = Sample.model_json_schema()
    assert structural(source, {}) == {
        "type": "object",
        "description": "A sample.",
        "properties": {
            "bounded": {"type": "number", "description": "Above zero.", "minimum": 0, "exclusiveMinimum": True, "maximum": 1},
            "choice": {"type": "integer", "description": "Perhaps."},
        },
        "required": ["bounded"],
    }


def test_a_union_is_refused_rather_than_weakened() -> None:
    with pytest.raises(ValueError, match="no unions"):
        structural({"anyOf": [{"type": "string"}, {"type": "integer"}]}, {})


def test_one_letter_names_that_yaml_takes_for_booleans_are_quoted() -> None:
    text = crds.render_files()["finetunejobs.yaml"]
    assert "'n':" in text
    assert not [line for line in text.splitlines() if line.strip() in ("- n", "n:", "- y", "y:")]
