"""Names and labels of everything that the operator makes, in one place."""

from __future__ import annotations

import hashlib
import json
from typing import Any

MANAGER = "tuneloop"
"""Field manager of children, and the value of `app.kubernetes.io/managed-by`."""
STATUS_MANAGER = "tuneloop-status"
HASH_LABEL = "tuneloop.dev/spec-hash"
"""Hash of the manifest that the child was made from."""
JOB_LABEL = "tuneloop.dev/finetunejob"
DEPLOYMENT_LABEL = "tuneloop.dev/modeldeployment"
MODEL_LABEL = "tuneloop.dev/model"
STAGE_LABEL = "tuneloop.dev/stage"
ATTEMPT_LABEL = "tuneloop.dev/attempt"
REVISION_LABEL = "tuneloop.dev/revision"
ENGINE_LABEL = "tuneloop.dev/engine"
EPISODE_LABEL = "tuneloop.dev/episode"
RETRY_ANNOTATION = "tuneloop.dev/retry"
REARM_ANNOTATION = "tuneloop.dev/rearm"


def short_hash(value: Any, length: int = 10) -> str:
    """Hex digest of a JSON value, the same for the same value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def labels(component: str, instance: str, **more: str) -> dict[str, str]:
    """The recommended labels; `more` gives further labels by full name with dots and slashes (pass as `**{...}`)."""
    return {
        "app.kubernetes.io/name": "tuneloop",
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/instance": instance,
        "app.kubernetes.io/managed-by": MANAGER,
        **more,
    }


def job_config(job: str) -> str:
    return f"{job}-config"


def stage_job(job: str, stage: str, number: int) -> str:
    """`<name>-train-<n>`, `<name>-prepare-<n>`, …"""
    return f"{job}-{stage}-{number}"


def model_version(model: str, version: int) -> str:
    return f"{model}-v{version}"


def engine(deployment: str, engine_hash: str) -> str:
    return f"{deployment}-{engine_hash}"


def gateway(deployment: str) -> str:
    """Deployment, Service, ServiceAccount, Role and ConfigMap of the gateway."""
    return f"{deployment}-gateway"


def gateway_secret(deployment: str) -> str:
    """Holds engine-key, internal-token and feedback-key; made once."""
    return f"{deployment}-keys"


def claim_mount(claim: str) -> str:
    """Where a claim is mounted in every pod of ours."""
    return f"/volumes/{claim}"


def parse_pvc(uri: str) -> tuple[str, str]:
    """`pvc://claim/a/b` -> (claim, "a/b")."""
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    return claim, path.strip("/")


def pvc_path(uri: str) -> str:
    """`pvc://claim/a/b` -> `/volumes/claim/a/b`."""
    claim, path = parse_pvc(uri)
    return f"{claim_mount(claim)}/{path}".rstrip("/")
