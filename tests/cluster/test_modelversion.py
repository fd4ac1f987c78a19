"""ModelVersions on a real API server: what the operator says of them, and what it never touches."""

from __future__ import annotations

from typing import Any

from tests.cluster.harness import Api, Object, OperatorProcess, wait_for

DIGEST = "sha256:" + "a" * 64


def make_version(namespace: str, number: int, **changes: Any) -> Object:
    artifact = {"uri": "pvc://models/x", "manifestDigest": DIGEST, "format": "Adapter", "sizeBytes": 1}
    return {
        "apiVersion": "tuneloop.dev/v1alpha1",
        "kind": "ModelVersion",
        "metadata": {"name": f"sentiment-v{number}", "namespace": namespace},
        "spec": {"model": "sentiment", "version": number, "artifact": artifact} | changes,
    }


def test_a_version_is_verified_by_the_digest_that_was_evaluated(api: Api, namespace: str, operator: OperatorProcess) -> None:
    api.create(make_version(namespace, 1))
    api.create(make_version(namespace, 2, evaluation={"verdict": "Pass", "artifactDigest": DIGEST}))
    api.wait_for_condition("ModelVersion", namespace, "sentiment-v1", "Verified", "False", "NotEvaluated")
    api.wait_for_condition("ModelVersion", namespace, "sentiment-v2", "Verified", "True", "EvaluatedByDigest")
    api.wait_for_condition("ModelVersion", namespace, "sentiment-v2", "InUse", "False", "NotServed")


def test_a_persons_approval_stays_and_the_operator_owns_nothing_of_the_spec(api: Api, namespace: str, operator: OperatorProcess) -> None:
    api.create(make_version(namespace, 1, evaluation={"verdict": "Inconclusive", "artifactDigest": DIGEST}))
    api.wait_for_condition("ModelVersion", namespace, "sentiment-v1", "Verified")
    api.patch("ModelVersion", namespace, "sentiment-v1", {"spec": {"approval": "Approved"}})

    def looked_at_again() -> Object:
        found = api.get("ModelVersion", namespace, "sentiment-v1")
        assert found is not None
        assert found["status"]["observedGeneration"] == found["metadata"]["generation"] == 2
        return found

    version = wait_for(looked_at_again)
    assert version["spec"]["approval"] == "Approved"
    owners = {entry["manager"]: entry for entry in version["metadata"]["managedFields"]}
    assert owners["tuneloop-status"]["subresource"] == "status"
    assert "tuneloop" not in owners
