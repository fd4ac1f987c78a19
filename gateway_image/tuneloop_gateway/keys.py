"""Who asks: API keys, their tiers and subjects, and the gateway's own secrets."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)
MAX_KEY_BYTES = 4096
REVIEWER_PREFIX = "reviewer."
ANONYMOUS = "anonymous"


@dataclass(frozen=True)
class Caller:
    """A subject is a keyed hash: no table holds the name of a key."""

    subject: str
    reviewer: bool = False
    known: bool = False
    name: str = ANONYMOUS


@dataclass(frozen=True)
class OwnSecrets:
    """What the operator made once for this deployment."""

    engine_key: str
    internal_token: str
    feedback_key: bytes


def read_secrets(folder: Path) -> OwnSecrets:
    """Raises OSError where a file is missing and ValueError where one is empty: the gateway does not start half protected."""

    def read(name: str) -> str:
        value = (folder / name).read_text().strip()
        if not value:
            raise ValueError(f"Secret file {name} is empty.")
        return value

    return OwnSecrets(read("engine-key"), read("internal-token"), read("feedback-key").encode())


def subject_of(name: str, feedback_key: bytes) -> str:
    """Pseudonym of a key's name: the same in every replica, not to be reversed without the secret."""
    return hmac.new(feedback_key, b"subject:" + name.encode(), hashlib.sha256).hexdigest()[:24]


class KeyRing:
    """The keys of a mounted folder. Looked up by a salted digest, so that time tells nothing about a key."""

    def __init__(self, folder: Path, feedback_key: bytes) -> None:
        self._folder, self._feedback_key = folder, feedback_key
        self._salt = secrets.token_bytes(32)
        self._callers: dict[bytes, Caller] = {}
        self.anonymous = Caller(subject_of(ANONYMOUS, feedback_key))

    def reload(self) -> None:
        """Reads the folder again; a folder that cannot be read leaves the keys as they are."""
        callers: dict[bytes, Caller] = {}
        try:
            for path in sorted(self._folder.iterdir()):
                if path.name.startswith(".") or not path.is_file():
                    continue
                with path.open("rb") as file:
                    key = file.read(MAX_KEY_BYTES).strip()
                if key:
                    reviewer = path.name.startswith(REVIEWER_PREFIX)
                    callers[self._digest(key)] = Caller(subject_of(path.name, self._feedback_key), reviewer, known=True, name=path.name)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("Cannot read the API keys: %s.", error.strerror)
            return
        self._callers = callers

    def name_of(self, subject: str) -> str | None:
        """Whose pseudonym it is; None where there is no such key any more."""
        if subject == self.anonymous.subject:
            return ANONYMOUS
        return next((caller.name for caller in self._callers.values() if caller.subject == subject), None)

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._salt, key, "sha256")

    def find(self, authorization: str | None) -> Caller | None:
        """The caller of an `Authorization: Bearer` header; None where there is no such key."""
        token = bearer(authorization)
        return self._callers.get(self._digest(token.encode("utf-8", "surrogateescape"))) if token else None


def bearer(authorization: str | None) -> str | None:
    """The token of an Authorization header."""
    if not authorization:
        return None
    scheme, _, token = authorization.partition(" ")
    return token.strip()[:MAX_KEY_BYTES] if scheme.lower() == "bearer" else None
