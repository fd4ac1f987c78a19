"""Whether objects are still as we wrote them, by who owns which field."""

from __future__ import annotations

from typing import Any

import pytest

from tuneloop_operator.cluster.differences import is_drifted, owned_status, without_empty

CONTAINER = {"name": "main", "image": "a", "command": ["run"], "resources": {"limits": {"memory": "1000Mi"}}}
MANIFEST: dict[str, Any] = {
    "metadata": {"name": "x", "labels": {"ours": "1"}, "ownerReferences": [{"uid": "u"}]},
    "spec": {"replicas": 2, "paused": False, "template": {"spec": {"containers": [CONTAINER], "volumes": []}}},
}


def observed(*foreign: tuple[str, dict[str, Any]], **metadata: Any) -> dict[str, Any]:
    """The manifest as the API server gives it back: with defaults, and values written its own way."""
    container = {**CONTAINER, "resources": {"limits": {"memory": "1000Mi"}}, "imagePullPolicy": "Always"}
    spec = {"replicas": 2, "template": {"spec": {"containers": [container], "dnsPolicy": "ClusterFirst"}}}
    entries = [{"manager": "tuneloop", "operation": "Update"}]
    entries += [{"manager": name, "operation": "Update", "fieldsV1": fields} for name, fields in foreign]
    return {"metadata": {**MANIFEST["metadata"], "managedFields": entries, **metadata}, "spec": spec}


def of_container(**fields: Any) -> dict[str, Any]:
    return {"f:spec": {"f:template": {"f:spec": {"f:containers": {'k:{"name":"main"}': {".": {}, **fields}}}}}}


def test_what_we_wrote_is_not_drifted_whatever_was_defaulted() -> None:
    assert not is_drifted(observed(), MANIFEST)


@pytest.mark.parametrize(
    ("fields", "drifted"),
    [
        ({"f:spec": {"f:replicas": {}}}, True),
        ({"f:metadata": {"f:labels": {".": {}, "f:ours": {}}}}, True),
        ({"f:metadata": {"f:labels": {".": {}, "f:theirs": {}}}}, False),
        ({"f:metadata": {"f:annotations": {".": {}, "f:deployment.kubernetes.io/revision": {}}}}, False),
        (of_container(**{"f:image": {}}), True),
        (of_container(**{"f:command": {}}), True),
        (of_container(**{"f:resources": {"f:limits": {"f:memory": {}}}}), True),
        (of_container(**{"f:tty": {}}), False),
        ({"f:spec": {"f:template": {"f:spec": {"f:containers": {'k:{"name":"sidecar"}': {"f:image": {}}}}}}}, False),
    ],
)
def test_a_field_of_ours_that_somebody_else_set_is_drift_and_a_field_of_theirs_is_not(fields: dict[str, Any], drifted: bool) -> None:
    assert is_drifted(observed(("kubectl-edit", fields)), MANIFEST) is drifted


def test_fields_set_through_a_subresource_are_no_drift() -> None:
    obj = observed(("kubectl-edit", {"f:spec": {"f:replicas": {}}}))
    obj["metadata"]["managedFields"][1]["subresource"] = "scale"
    assert not is_drifted(obj, MANIFEST)


def test_a_field_of_ours_that_is_gone_is_drift() -> None:
    obj = observed()
    del obj["spec"]["template"]["spec"]["containers"][0]["command"]
    assert is_drifted(obj, MANIFEST)
    assert is_drifted(observed(ownerReferences=[]), MANIFEST)
    assert is_drifted(observed(labels={}), MANIFEST)


def test_the_status_that_we_own_is_what_others_did_not_add() -> None:
    ours, theirs = {"type": "Ready", "status": "True"}, {"type": "Audited", "status": "True"}
    obj = {
        "metadata": {
            "managedFields": [
                {"manager": "auditor", "subresource": "status", "fieldsV1": {"f:status": {"f:conditions": {'k:{"type":"Audited"}': {}}}}},
                {
                    "manager": "tuneloop-status",
                    "subresource": "status",
                    "fieldsV1": {
                        "f:status": {
                            "f:step": {},
                            "f:data": {},
                            "f:progress": {"f:loss": {}},
                            "f:conditions": {'k:{"type":"Ready"}': {".": {}, "f:type": {}, "f:status": {}}},
                        }
                    },
                },
            ]
        },
        "status": {"step": 3, "data": {"atomic": [1]}, "progress": {"loss": "1.0", "theirs": 1}, "conditions": [theirs, ours], "theirs": 1},
    }
    assert owned_status(obj) == {"step": 3, "data": {"atomic": [1]}, "progress": {"loss": "1.0"}, "conditions": [ours]}


def test_a_status_that_we_never_wrote_is_empty() -> None:
    assert owned_status({"metadata": {}, "status": {"phase": "Running"}}) == {}


def test_null_members_and_empty_lists_are_left_out() -> None:
    assert without_empty({"a": None, "b": [{"c": None, "d": 0}], "e": {}, "f": [], "g": ()}) == {"b": [{"d": 0}], "e": {}}
