"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

import json
from typing import Literal

from aiohttp import web

Type = Literal["invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"]


class Refused(Exception):
    """A request that ends here, with the sentence that its sender sees."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def type(self) -> Type:
        by_status: dict[int, Type] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return by_status.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


def invalid(message: str, param: str | None = None) -> Refused:
    """The sender must change the request."""
    return Refused(400, message, code="invalid_request", param=param)


def render_error(error: Refused, headers: dict[str, str] | None = None) -> web.Response:
    """The response for a refused request."""
    body = {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(status=error.status, body=json.dumps(body).encode(), content_type="application/json", headers=headers)
