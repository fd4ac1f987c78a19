"""Whether a status or a child is still as we wrote it. By field ownership rather than by value: the API server may write a value
differently ("1000m" as "1"), but who set a field last is on record."""

from __future__ import annotations

import json
from typing import Any

from tuneloop_operator.cluster.cache import Object
from tuneloop_operator.render.names import MANAGER, STATUS_MANAGER

Fields = dict[str, Any]
"""A fieldsV1 tree: f:name, k:{keys}, v:value, "." for the node itself."""


def without_empty(value: Any) -> Any:
    """A JSON value without members that are null or an empty list: nobody would own those, so they would be missed after each write."""
    if isinstance(value, dict):
        return {name: without_empty(member) for name, member in value.items() if member is not None and member not in ([], ())}
    if isinstance(value, (list, tuple)):
        return [without_empty(member) for member in value]
    return value


def owned_status(obj: Object) -> dict[str, Any]:
    """The part of the status that our status manager owns: others may keep conditions of their own beside ours."""
    entries = obj["metadata"].get("managedFields") or ()
    fields = next((e.get("fieldsV1") or {} for e in entries if e.get("manager") == STATUS_MANAGER and e.get("subresource") == "status"), {})
    if "f:status" not in fields:
        return {}
    owned = _projected(obj.get("status") or {}, fields["f:status"])
    return dict(owned)


def _projected(value: Any, fields: Fields) -> Any:
    """The part of a value that a field tree names. A node without children is owned whole."""
    members = {name: tree for name, tree in fields.items() if name != "."}
    if not members:
        return value
    if isinstance(value, dict):
        return {name[2:]: _projected(value[name[2:]], tree) for name, tree in members.items() if name[2:] in value}
    if isinstance(value, list):
        found = ((_element(value, name), tree) for name, tree in members.items())
        kept = {id(element): _projected(element, tree) for element, tree in found if element is not None}
        return [kept[id(element)] for element in value if id(element) in kept]
    return value


def _element(items: list[Any], name: str) -> Any:
    """The element of a list that `k:{…}` names, or None."""
    if not name.startswith("k:"):
        return None
    keys = json.loads(name[2:])
    return next((item for item in items if isinstance(item, dict) and all(item.get(key) == wanted for key, wanted in keys.items())), None)


def is_drifted(observed: Object, manifest: Object) -> bool:
    """Whether somebody else set a field that the manifest sets, or removed one."""
    entries = observed["metadata"].get("managedFields") or ()
    foreign = (e["fieldsV1"] for e in entries if e.get("manager") != MANAGER and not e.get("subresource") and e.get("fieldsV1"))
    return any(_meets(manifest, fields) for fields in foreign) or _lacks(observed, manifest)


def _meets(value: Any, fields: Fields) -> bool:
    """Whether a leaf of the field tree is set in the value."""
    for name, tree in fields.items():
        if name == ".":
            continue
        if name.startswith("f:") and isinstance(value, dict):
            member = value.get(name[2:])
        elif name.startswith("k:") and isinstance(value, list):
            member = _element(value, name)
        else:
            continue
        if member is None:
            continue
        if not tree or _meets(member, tree):
            return True
    return False


def _lacks(observed: Any, wanted: Any) -> bool:
    """Whether a member that is wanted is absent. Empty values may be; elements of lists are met by name, or by their place."""
    if isinstance(wanted, dict):
        if not isinstance(observed, dict):
            return True
        return any(_lacks(observed.get(name), member) for name, member in wanted.items() if not _is_empty(member))
    if isinstance(wanted, (list, tuple)):
        if not isinstance(observed, list) or len(observed) < len(wanted):
            return True
        return any(_lacks(_counterpart(observed, item, place), item) for place, item in enumerate(wanted))
    return observed is None


def _counterpart(items: list[Any], wanted: Any, place: int) -> Any:
    if isinstance(wanted, dict) and "name" in wanted:
        return next((item for item in items if isinstance(item, dict) and item.get("name") == wanted["name"]), None)
    return items[place]


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in (0, "", [], {}, ())
