"""What can go wrong between the operator and the API server, as classes: each has a label, and a way to be answered."""

from __future__ import annotations

from typing import Any

from tuneloop_operator.domain.decision import Key


class ApiError(Exception):
    """An answer that is no success. `label` is its class in the metrics."""

    label = "server"

    def __init__(self, status: int, reason: str, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.details = details or {}


class NotFound(ApiError):
    label = "not_found"


class AlreadyExists(ApiError):
    """409 on a create: the name is taken."""

    label = "conflict"


class Conflict(ApiError):
    """409 on anything else: the object is not the one that was observed."""

    label = "conflict"
    key: Key | None = None
    """Whose precondition failed."""


class Forbidden(ApiError):
    """403: the operator may not, a quota is used up, or the namespace is being deleted."""

    label = "forbidden"

    @property
    def is_namespace_ending(self) -> bool:
        return any(cause.get("reason") == "NamespaceTerminating" for cause in self.details.get("causes") or ())

    @property
    def is_of_admission(self) -> bool:
        """A quota or an admission policy says no to this object; else the operator has no right to ask."""
        return bool(self.message) and '" cannot ' not in self.message and not self.is_namespace_ending


class Refused(ApiError):
    """400 or 422: the object is not as the API server wants it."""

    label = "refused"


class Unauthorized(ApiError):
    label = "unauthorized"


class Throttled(ApiError):
    """429, also after having waited as long as was asked."""

    label = "throttled"


class ServerError(ApiError):
    label = "server"


class Unreachable(Exception):
    """No answer: refused, reset, too slow, or larger than allowed."""

    label = "unreachable"


class NotLeader(Exception):
    """The Lease is lost or about to be: nothing may be written."""

    label = "not_leader"


class NameConflict(Exception):
    """A child's name is taken by an object that is not ours; the next pass sees it in `Cluster.conflicts`."""

    label = "name_conflict"

    def __init__(self, key: Key) -> None:
        super().__init__(f"{key.kind} {key.name} exists and belongs to somebody else")
        self.key = key


class ChildRefused(Exception):
    """A child is not taken as it was rendered; the next pass sees it in `Cluster.refusals`."""

    def __init__(self, key: Key, cause: Refused | Forbidden) -> None:
        super().__init__(f"{key.kind} {key.name} was refused: {cause}")
        self.key = key
        self.label = cause.label


def error_of(status: int, body: dict[str, Any], verb: str) -> ApiError:
    """The API server's Status as an exception."""
    kinds: dict[int, type[ApiError]] = {400: Refused, 401: Unauthorized, 403: Forbidden, 404: NotFound, 422: Refused, 429: Throttled}
    reason = str(body.get("reason") or status)
    kind = kinds.get(status, ServerError if status >= 500 else ApiError)
    if status == 409:
        kind = AlreadyExists if verb == "create" and reason == "AlreadyExists" else Conflict
    return kind(status, reason, str(body.get("message") or "")[:2000], body.get("details"))
