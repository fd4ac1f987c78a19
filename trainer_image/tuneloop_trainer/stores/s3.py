"""A packaged model on S3, below its digest: `<prefix>/<sha256>/<file>`, the manifest last, so that what has one is complete."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tuneloop_trainer.contract import Manifest, Push, Reason
from tuneloop_trainer.errors import Invalid, Mismatch, Unavailable
from tuneloop_trainer.manifests import MANIFEST
from tuneloop_trainer.stores import buckets
from tuneloop_trainer.stores.buckets import ATTEMPTS, CHUNK, REQUEST_SECONDS, filesystem
from tuneloop_trainer.stores.oci import File, files_of

OWNER = "output.push"


def push_model(
    target: Push,
    folder: Path,
    manifest: Manifest,
    card: Path | None = None,
    request_seconds: float = REQUEST_SECONDS,
    attempts: int = ATTEMPTS,
) -> str:
    """Push, read every byte back, and return the manifest's digest. What has a manifest is not written again, but its card, where an
    evaluation found something else. Raises Invalid, Unavailable or Mismatch."""
    bucket = target.uri.removeprefix("s3://").rstrip("/")
    if not target.uri.startswith("s3://") or not bucket:
        raise Invalid(f"output.push {target.uri} is not s3://bucket/prefix.", Reason.STORE_UNAVAILABLE)
    root = f"{bucket}/{manifest.digest().removeprefix('sha256:')}"
    with _told(target):
        store = filesystem(target.credentials, OWNER, request_seconds, attempts)
        files = files_of(folder, manifest, card)
        is_there = _digest(store, f"{root}/{MANIFEST}", missing_is_none=True) == manifest.digest()
        for file in files:
            if is_there and (file.source != card or _digest(store, f"{root}/{file.path}", missing_is_none=True) == f"sha256:{file.sha256}"):
                continue
            with file.source.open("rb") as source, store.open_output_stream(f"{root}/{file.path}") as sink:
                shutil.copyfileobj(source, sink, CHUNK)
        verify(store, root, files)
    return manifest.digest()


def verify(store: Any, root: str, files: Sequence[File]) -> None:
    """Raises Mismatch."""
    for file in files:
        if _digest(store, f"{root}/{file.path}") != f"sha256:{file.sha256}":
            raise Mismatch(f"The store gives back another {file.path} than was written.")


def _digest(store: Any, path: str, missing_is_none: bool = False) -> str | None:
    hashed = hashlib.sha256()
    try:
        with store.open_input_stream(path) as source:
            while chunk := source.read(CHUNK):
                hashed.update(chunk)
    except FileNotFoundError:
        if missing_is_none:
            return None
        raise
    return f"sha256:{hashed.hexdigest()}"


def _told(target: Push) -> AbstractContextManager[None]:
    return buckets.told(
        denied=Invalid(f"Store {target.uri} denies access. Look at the Secret of output.push.", Reason.ACCESS_DENIED),
        missing=Invalid(f"Store {target.uri} does not exist. Create the bucket, or change output.push.", Reason.STORE_UNAVAILABLE),
        away=Unavailable(f"Store {target.uri} does not answer as it should.", Reason.STORE_UNAVAILABLE),
    )
