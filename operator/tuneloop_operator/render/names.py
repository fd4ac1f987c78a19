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
INPUT_LABEL = "tuneloop.dev/input"
"""Hash of what a stage's Job was asked to do; a Job of another hash says nothing about this one."""
RETRY_HASH_LABEL = "tuneloop.dev/retry-hash"
"""Hash of the retry annotation that a Job was made under."""
FROM_STEP_LABEL = "tuneloop.dev/from-step"
"""Step that training had reached when an attempt was made: an attempt that was interrupted has advanced if its successor's is higher."""
ENGINE_LABEL = "tuneloop.dev/engine"
EPISODE_LABEL = "tuneloop.dev/episode"
RETRY_ANNOTATION = "tuneloop.dev/retry"
IGNORE_ESTIMATE_ANNOTATION = "tuneloop.dev/ignore-estimate"
"""`true`: train although the estimate says that it does not fit."""
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


def job_config(job: str, content_hash: str) -> str:
    """One ConfigMap per content: a pod must never start with the file of another attempt."""
    return f"{job}-config-{content_hash}"


def job_policy(job: str) -> str:
    """The NetworkPolicy of a job's pods."""
    return f"{job}-progress"


def job_peers(job: str) -> str:
    """The headless Service of pods that train together."""
    return f"{job}-peers"


LONGEST_LABEL = 63
"""Characters of a label's value, and so of a Job's name, which its pods carry as a label."""


INDEX_LENGTH = 3
"""Characters that the number of a pod adds to the name of its host: `-0` to `-63`."""


IN_SET_LENGTH = 16
"""The same in a JobSet, whose pods it names too: `-node-0-63-abcde`."""


def stage_job(job: str, stage: str, number: int, spare: int = 0) -> str:
    """`<name>-train-<n>`, `<name>-prepare-<n>`, …; a long job's name is cut where the number has grown long too. `spare`
    characters are left for what is appended to it."""
    suffix = f"-{stage}-{number}"
    longest = LONGEST_LABEL - spare
    if len(job) + len(suffix) <= longest:
        return job + suffix
    kept = job[: longest - len(suffix) - 9]
    return f"{kept}-{short_hash(job, 8)}{suffix}"


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


def gateway_data(deployment: str) -> str:
    """The claim of the SQLite database; kept where the deployment goes, and taken up again by one of the same name."""
    return f"{deployment}-data"


def gateway_url(deployment: str, namespace: str) -> str:
    """The stable URL: the public Service is called like the deployment."""
    return f"http://{deployment}.{namespace}.svc"


def retraining_job(deployment: str, uid: str, episode: int) -> str:
    """One name for each episode of one deployment, at most 52 characters."""
    return f"{deployment[:32].rstrip('-')}-retrain-{short_hash([uid, episode])}"


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


def pvc_uri(path: str | None) -> str | None:
    """`/volumes/claim/a/b` -> `pvc://claim/a/b`; None for what lies on no claim."""
    if path is None or not path.startswith(claim_mount("")) or ".." in path:
        return None
    return "pvc://" + path.removeprefix(claim_mount(""))
