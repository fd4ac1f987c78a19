"""Pieces that every pod of ours is made of: security context, volumes, environment, probes, resources, and what a user may override."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tuneloop_operator.api.types import EnvVar, PodOverrides, Resources, Toleration
from tuneloop_operator.render import names
from tuneloop_operator.settings import Settings

Json = dict[str, Any]
"""A part of a manifest."""
HOME = "/home/tuneloop"
"""An emptyDir: the root is read-only, and the user may have no home."""
RESERVED_LABELS = ("app.kubernetes.io/", "tuneloop.dev/")
"""Prefixes of labels that policies and selectors rest on: not the users' to set."""


# --- security ----------------------------------------------------------------


def pod_security(settings: Settings, user: int | None) -> Json:
    """PodSecurity `restricted`. Without a user in the settings the platform chooses one (OpenShift)."""
    context: Json = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if user is not None:
        context["runAsUser"] = user
    if settings.fs_group is not None:
        # Group ownership decides who may read what another stage wrote; by root mismatch only, since a store may hold terabytes.
        context |= {"runAsGroup": settings.fs_group, "fsGroup": settings.fs_group, "fsGroupChangePolicy": "OnRootMismatch"}
    return context


def container_security() -> Json:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    }


def pod_defaults(settings: Settings, user: int | None) -> Json:
    """Fields of a pod's spec that are the same for all: no API token, no Service variables, the restricted context."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(settings, user),
    }


# --- volumes -----------------------------------------------------------------


def claim_volume_name(claim: str) -> str:
    """A claim's name may hold dots and 253 characters; a volume's may not."""
    return f"claim-{names.short_hash(claim)}"


def claim_volume(claim: str) -> Json:
    """Never read-only here: CSI would skip fsGroup. `claim_mount` says who may write."""
    return {"name": claim_volume_name(claim), "persistentVolumeClaim": {"claimName": claim}}


def claim_mount(claim: str, *, read_only: bool) -> Json:
    mount: Json = {"name": claim_volume_name(claim), "mountPath": names.claim_mount(claim)}
    return mount | {"readOnly": True} if read_only else mount


def claim_mounts(written: Iterable[str], read: Iterable[str]) -> tuple[list[Json], list[Json]]:
    """(volumes, mounts) of some claims, in the order of their names; a claim that is written is mounted once, for writing."""
    writable = set(written)
    claims = sorted(writable | set(read))
    return [claim_volume(claim) for claim in claims], [claim_mount(claim, read_only=claim not in writable) for claim in claims]


def config_volume(name: str, config_map: str) -> Json:
    return {"name": name, "configMap": {"name": config_map}}


def secret_volume(name: str, secret: str, keys: Iterable[str] = (), *, optional: bool = False) -> Json:
    """All keys of a Secret as files, or only those named. 0440: readable through fsGroup, by nobody else."""
    source: Json = {"secretName": secret, "defaultMode": 0o440}
    if items := [{"key": key, "path": key} for key in keys]:
        source["items"] = items
    return {"name": name, "secret": source | {"optional": True} if optional else source}


def read_only_mount(name: str, path: str) -> Json:
    return {"name": name, "mountPath": path, "readOnly": True}


def scratch_volumes() -> list[Json]:
    """/tmp, the home with all caches, and shared memory for tensors that cross processes."""
    return [
        {"name": "tmp", "emptyDir": {}},
        {"name": "home", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]


def scratch_mounts() -> list[Json]:
    return [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "home", "mountPath": HOME},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]


# --- environment -------------------------------------------------------------


def scratch_environment(compiled: str = HOME) -> list[Json]:
    """Every cache that ML libraries keep, on the emptyDir, what they compile in the folder `compiled`; a name for the user, who need
    not be in /etc/passwd."""
    caches = {
        "HF_HOME": "huggingface",
        "XDG_CACHE_HOME": "cache",
        "XDG_CONFIG_HOME": "config",
        "NUMBA_CACHE_DIR": "numba",
    }
    compiles = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "VLLM_CACHE_ROOT": "vllm"}
    return [
        value("HOME", HOME),
        value("USER", "tuneloop"),
        value("LOGNAME", "tuneloop"),
        *(value(name, f"{HOME}/{folder}") for name, folder in caches.items()),
        *(value(name, f"{compiled}/{folder}") for name, folder in compiles.items()),
    ]


def value(name: str, text: str) -> Json:
    return {"name": name, "value": text}


def from_field(name: str, path: str) -> Json:
    """A variable from the pod itself, for example `metadata.uid`."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def from_secret(name: str, secret: str, key: str) -> Json:
    """Not optional: a pod whose Secret is missing waits, and says so."""
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": False}}}


# --- probes and resources ----------------------------------------------------


def http_probe(path: str, port: int, *, period: int = 10, timeout: int = 2, failures: int = 3) -> Json:
    return {"httpGet": {"path": path, "port": port}, "periodSeconds": period, "timeoutSeconds": timeout, "failureThreshold": failures}


def resources(requests: Mapping[str, str], overrides: Resources | None, devices: tuple[str, int] | None = None) -> Json:
    """Our requests, the user's over them, and devices as limits (Kubernetes takes the request from there).

    No limits of ours on CPU or memory: a throttled trainer is slow for no reason, and only the user knows the model's size.
    """
    asked = dict(requests)
    limits: dict[str, str] = {}
    if overrides is not None:
        asked |= overrides.requests
        limits |= overrides.limits
        # A request above the user's limit would be refused by the API server.
        asked |= {name: limit for name, limit in overrides.limits.items() if name in requests and name not in overrides.requests}
    if devices is not None and devices[1] > 0:
        limits[devices[0]] = str(devices[1])
        asked.pop(devices[0], None)
    return {"requests": dict(sorted(asked.items()))} | ({"limits": dict(sorted(limits.items()))} if limits else {})


# --- overrides ---------------------------------------------------------------


def with_overrides(template: Json, overrides: PodOverrides) -> Json:
    """A pod template with the user's overrides merged in: maps by key, lists appended, what is ours wins.

    `resources` is not merged here: not every container of every pod is the user's to size (see `resources`).
    """
    metadata, spec = template.get("metadata", {}), template["spec"]
    labels = {key: text for key, text in overrides.labels.items() if not key.startswith(RESERVED_LABELS)}
    annotations = overrides.annotations | metadata.get("annotations", {})
    merged = metadata | {"labels": labels | metadata.get("labels", {})}
    if annotations:
        merged["annotations"] = annotations
    containers = _with_env(spec["containers"], overrides.env)
    return template | {"metadata": merged, "spec": spec | _placement(spec, overrides) | {"containers": containers}}


def _placement(spec: Json, overrides: PodOverrides) -> Json:
    """Where the pod may run, and with which class; only what is set."""
    fields: Json = {
        "nodeSelector": overrides.node_selector | spec.get("nodeSelector", {}),
        "tolerations": [*spec.get("tolerations", []), *map(_toleration, overrides.tolerations)],
        "imagePullSecrets": [*spec.get("imagePullSecrets", []), *({"name": secret.name} for secret in overrides.image_pull_secrets)],
        "priorityClassName": overrides.priority_class_name,
        "runtimeClassName": overrides.runtime_class_name,
        "schedulerName": overrides.scheduler_name,
    }
    return {name: field for name, field in fields.items() if field}


def _toleration(toleration: Toleration) -> Json:
    return toleration.model_dump(by_alias=True, exclude_none=True)


def _with_env(containers: list[Json], env: tuple[EnvVar, ...]) -> list[Json]:
    """The user's variables go into the first container, after ours; a name of ours is left as it is."""
    if not env:
        return containers
    first, *others = containers
    ours = first.get("env", [])
    taken = {variable["name"] for variable in ours}
    added = {variable.name: value(variable.name, variable.value) for variable in env if variable.name not in taken}
    return [first | {"env": [*ours, *added.values()]}, *others]
