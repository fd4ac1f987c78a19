"""What a mounted Secret says: one file for each key. Nothing of it is ever part of a message, an argument or the environment."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from pathlib import Path

from tuneloop_trainer.contract import Reason
from tuneloop_trainer.errors import Invalid

MAX_BYTES = 64 << 10
DOCKER_CONFIG = ".dockerconfigjson"
"""The key of Secrets of type kubernetes.io/dockerconfigjson."""


@dataclass(frozen=True)
class Login:
    """User and password; never shown."""

    user: str = field(repr=False)
    password: str = field(repr=False)


def read_key(folder: str | None, *names: str, owner: str = "output.push") -> str | None:
    """The content of the first of these files that is there. Raises Invalid for one that cannot be read; `owner` names the Secret."""
    if folder is None:
        return None
    for name in names:
        path = Path(folder) / name
        try:
            if path.is_file():
                with path.open("rb") as file:
                    return file.read(MAX_BYTES).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Invalid(f"The key {name} of the Secret of {owner} cannot be read.", Reason.ACCESS_DENIED) from error
    return None


def registry_login(folder: str | None, registry: str) -> Login | None:
    """From `username` and `password`, or from what `docker login` writes. Raises Invalid for a Secret that holds neither."""
    user, password = read_key(folder, "username"), read_key(folder, "password")
    if user is not None and password is not None:
        return Login(user, password)
    text = read_key(folder, DOCKER_CONFIG, "config.json")
    if text is None:
        if folder is not None:
            raise Invalid(f"The Secret for {registry} has neither username and password nor {DOCKER_CONFIG}.", Reason.ACCESS_DENIED)
        return None
    try:
        found = json.loads(text)["auths"]
        entry = found.get(registry) or found.get(f"https://{registry}")
        if entry is None:
            raise Invalid(f"The Secret's {DOCKER_CONFIG} has no login for {registry}.", Reason.ACCESS_DENIED)
        if "auth" in entry:
            user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
            return Login(user, password)
        return Login(str(entry["username"]), str(entry["password"]))
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise Invalid(f"The Secret's {DOCKER_CONFIG} is not what docker login writes.", Reason.ACCESS_DENIED) from error
