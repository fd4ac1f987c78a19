"""Whether a revision's vLLM is below the security floor: by what its engine says of itself, else by the tag of vLLM's own image."""

from __future__ import annotations

import re

from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot
from tuneloop_operator.render.engine import COMPONENT
from tuneloop_operator.render.revisions import Revision
from tuneloop_operator.settings import Settings

_VERSION = re.compile(r"v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(\.?(?:a|b|rc|dev)\d*)?")
_OWN_IMAGE = re.compile(r"(?:^|/)vllm-(?:openai|cpu)[a-z0-9-]*:(v?\d[\w.+-]*)")
"""Of other images a tag counts their own builds, not vLLM's releases."""


def told_version(snapshot: Snapshot, revision: Revision) -> str:
    """vLLM's version as an engine of this revision told it, now or before it took traffic; "" where none did."""
    told = sorted({report.engine_version for report in snapshot.reports(revision.name) if report.engine_version}, key=_order)
    recorded = revision.verdict.engine if revision.verdict is not None else ""
    return told[0] if told else recorded


def vulnerability(snapshot: Snapshot, revision: Revision, settings: Settings) -> str:
    """A sentence with the remedy where its vLLM is below the floor; "" where it is not, or where nobody knows."""
    image = _image(revision)
    tagged = _OWN_IMAGE.search(image)
    version = told_version(snapshot, revision) or (tagged[1] if tagged else "")
    if not version or _order(version) >= _order(settings.engine_version_floor):
        return ""
    return (
        f"The engine of version {revision.pinned.version} is vLLM {version.removeprefix('v')}, below {settings.engine_version_floor}:"
        f" flaws that are known and mended since let requests past its key, or stop it. Set spec.engine.image to a newer one than {image}"
        " (or the operator's images.engine, and take spec.engine.image out)."
    )


def _image(revision: Revision) -> str:
    containers = revision.pinned.template["spec"]["containers"]
    return str(next(container["image"] for container in containers if container["name"] == COMPONENT))


def _order(version: str) -> tuple[int, int, int, bool]:
    """Sorts releases; what comes before a release is below it. What is no version is above all: nothing is known of it."""
    found = _VERSION.match(version)
    if found is None:
        return (1 << 31, 0, 0, True)
    major, minor, patch, before = found.groups()
    return (int(major), int(minor), int(patch or 0), before is None)
