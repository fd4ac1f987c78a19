"""The client of S3: pyarrow's, which the trainer has anyway. Bounded times and attempts, with its own backoff between them.

Its errors are told apart by their text, which is all that it gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

from tuneloop_trainer.contract import Reason
from tuneloop_trainer.errors import Invalid, StageError
from tuneloop_trainer.stores.credentials import read_key

CHUNK = 8 << 20
CONNECT_SECONDS = 10.0
REQUEST_SECONDS = 60.0
ATTEMPTS = 3
ACCESS, ENDPOINT = ("AWS_ACCESS_KEY_ID", "accessKeyId"), ("AWS_ENDPOINT_URL", "endpoint")
"""Names that a Secret may give these keys."""
DENIED = (
    "ACCESS_DENIED",
    "HTTP status 401",
    "HTTP status 403",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_CLIENT_TOKEN_ID",
)
MISSING = ("NO_SUCH_BUCKET", "NO_SUCH_KEY", "HTTP status 404", "RESOURCE_NOT_FOUND")


class Trouble(Enum):
    """What a failed request says."""

    DENIED = auto()
    MISSING = auto()
    AWAY = auto()


def trouble(error: OSError) -> Trouble:
    text = str(error)
    if any(word in text for word in DENIED):
        return Trouble.DENIED
    if isinstance(error, FileNotFoundError) or any(word in text for word in MISSING):
        return Trouble.MISSING
    return Trouble.AWAY


@contextmanager
def told(denied: StageError, missing: StageError, away: StageError) -> Iterator[None]:
    """pyarrow's errors as ours. What the server said is not quoted: it may hold what was sent."""
    try:
        yield
    except StageError:
        raise
    except OSError as error:
        if error.errno is not None and not isinstance(error, FileNotFoundError):
            raise  # the disk's, not the bucket's
        raise {Trouble.DENIED: denied, Trouble.MISSING: missing, Trouble.AWAY: away}[trouble(error)] from error


def filesystem(credentials: str | None, owner: str, request_seconds: float, attempts: int) -> Any:  # Any: pyarrow has no types
    """The client with the keys of a mounted Secret. `owner` is what names the Secret in the spec. Raises Invalid."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    def key(*names: str) -> str | None:
        return read_key(credentials, *names, owner=owner)

    access, secret = key(*ACCESS), key("AWS_SECRET_ACCESS_KEY", "secretAccessKey")
    if access is None or secret is None:
        raise Invalid(f"The Secret of {owner} needs the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.", Reason.ACCESS_DENIED)
    endpoint = key(*ENDPOINT)
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
