"""The values schema is closed, and describes every value."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml
from tests.monitoring import CHART

from tuneloop_operator.settings import Settings, read_settings

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())


def described(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, value in schema.get("properties", {}).items():
        yield from described(value, f"{path}.{name}")


def test_every_value_is_described() -> None:
    for path, schema in described(SCHEMA):
        assert schema["description"].endswith("."), path


def test_every_object_with_named_values_is_closed() -> None:
    for path, schema in described(SCHEMA):
        if "properties" in schema:
            assert schema["additionalProperties"] is False, path


def test_schema_and_default_values_have_the_same_names() -> None:
    for path, schema in described(SCHEMA):
        value: Any = VALUES
        for part in filter(None, path.split(".")):
            value = value.get(part) if isinstance(value, dict) else None
        if "properties" in schema and path != ".global":
            assert set(schema["properties"]) - {"global"} == set(value), path


def test_every_setting_of_the_environment_is_one_that_the_operator_reads() -> None:
    text = (CHART / "templates" / "operator" / "_settings.tpl").read_text()
    names = {name.lower() for name in re.findall(r"TUNELOOP_([A-Z_]+)", text)}
    assert names <= set(Settings.model_fields)


def test_none_is_a_setting_for_platforms_that_choose_users_themselves() -> None:
    settings = read_settings({"TUNELOOP_POD_USER": "none", "TUNELOOP_FS_GROUP": "none"})
    assert (settings.pod_user, settings.fs_group) == (None, None)
    assert read_settings({"TUNELOOP_POD_USER": ""}).pod_user == 65532
