"""A packaged model on S3, below its digest: `<prefix>/<sha256>/<file>`, the manifest last, so that what has one is complete.

By pyarrow's client, which the trainer has anyway: multipart uploads, bounded times and attempts. Its errors are told apart by their text,
which is all that it gives.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuneloop_trainer.contract import Manifest, Push, Reason
from tuneloop_trainer.errors import Invalid, Mismatch, StageError, Unavailable
from tuneloop_trainer.manifests import MANIFEST
from tuneloop_trainer.stores.credentials import read_key
from tuneloop_trainer.stores.oci import files_of

CHUNK = 8 << 20
CONNECT_SECONDS = 10.0
REQUEST_SECONDS = 60.0
ATTEMPTS = 3
DENIED = (
    "ACCESS_DENIED",
    "HTTP status 401",
    "HTTP status 403",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_CLIENT_TOKEN_ID",
)
MISSING = ("NO_SUCH_BUCKET", "HTTP status 404", "RESOURCE_NOT_FOUND")


def push_model(target: Push, folder: Path, manifest: Manifest, request_seconds: float = REQUEST_SECONDS, attempts: int = ATTEMPTS) -> str:
    """Push, read every byte back, and return the manifest's digest. Raises Invalid, Unavailable or Mismatch."""
    bucket = target.uri.removeprefix("s3://").rstrip("/")
    if not target.uri.startswith("s3://") or not bucket:
        raise Invalid(f"output.push {target.uri} is not s3://bucket/prefix.", Reason.STORE_UNAVAILABLE)
    root = f"{bucket}/{manifest.digest().removeprefix('sha256:')}"
    with _told(target):
        store = _filesystem(target, request_seconds, attempts)
        if _digest(store, f"{root}/{MANIFEST}", missing_is_none=True) == manifest.digest():
            verify(store, root, folder, manifest)
            return manifest.digest()
        for path, _, _ in files_of(folder, manifest):
            with (folder / path).open("rb") as source, store.open_output_stream(f"{root}/{path}") as sink:
                shutil.copyfileobj(source, sink, CHUNK)
        verify(store, root, folder, manifest)
    return manifest.digest()


def verify(store: Any, root: str, folder: Path, manifest: Manifest) -> None:
    """Raises Mismatch."""
    for path, _, sha256 in files_of(folder, manifest):
        if _digest(store, f"{root}/{path}") != f"sha256:{sha256}":
            raise Mismatch(f"The store gives back another {path} than was written.")


def _filesystem(target: Push, request_seconds: float, attempts: int) -> Any:  # Any: pyarrow has no types
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    def key(*names: str) -> str | None:
        return read_key(target.credentials, *names)

    access, secret = key("AWS_ACCESS_KEY_ID", "accessKeyId"), key("AWS_SECRET_ACCESS_KEY", "secretAccessKey")
    if access is None or secret is None:
        raise Invalid("The Secret of output.push needs the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.", Reason.ACCESS_DENIED)
    endpoint = key("AWS_ENDPOINT_URL", "endpoint")
    scheme, _, host = endpoint.rstrip("/").rpartition("://") if endpoint else ("https", "", None)
    return S3FileSystem(
        access_key=access,
        secret_key=secret,
        session_token=key("AWS_SESSION_TOKEN"),
        region=key("AWS_REGION", "region") or "us-east-1",
        endpoint_override=host,
        scheme=scheme or "https",
        connect_timeout=CONNECT_SECONDS,
        request_timeout=request_seconds,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=attempts),
    )


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


@contextmanager
def _told(target: Push) -> Iterator[None]:
    """pyarrow's errors as ours. What the server said is not quoted: it may hold what was sent."""
    try:
        yield
    except StageError:
        raise
    except OSError as error:
        text = str(error)
        if any(word in text for word in DENIED):
            raise Invalid(f"Store {target.uri} denies access. Look at the Secret of output.push.", Reason.ACCESS_DENIED) from error
        if isinstance(error, FileNotFoundError) or any(word in text for word in MISSING):
            raise Invalid(
                f"Store {target.uri} does not exist. Create the bucket, or change output.push.", Reason.STORE_UNAVAILABLE
            ) from error
        raise Unavailable(f"Store {target.uri} does not answer as it should.", Reason.STORE_UNAVAILABLE) from error
