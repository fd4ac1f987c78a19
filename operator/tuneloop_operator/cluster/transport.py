"""Requests to the API server: authenticated, bounded in time, counted; 401 and 429 are answered here."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from tuneloop_operator.cluster.credentials import Credentials
from tuneloop_operator.cluster.errors import ApiError, Throttled, Unauthorized, Unreachable, error_of

TIMEOUT = aiohttp.ClientTimeout(total=30, sock_connect=5)
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
RETRIES = 4
LONGEST_PAUSE = 30.0

Observer = Callable[[str, int, float], None]
"""Called with verb, status (0 = no answer) and seconds after each request."""


class Transport:
    """One session to the API server. Connections are opened on the first request."""

    def __init__(self, credentials: Credentials, observed: Observer = lambda verb, code, seconds: None) -> None:
        self.credentials = credentials
        self._observed = observed
        self._session: aiohttp.ClientSession | None = None
        self._paused_until = 0.0

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def request(
        self,
        verb: str,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        limits: aiohttp.ClientTimeout = TIMEOUT,
    ) -> dict[str, Any]:
        """The answer's JSON. Raises an ApiError's subclass, or Unreachable.

        A 429 was not carried out, so it is safe to send again; it is, after as long as the server asks, by every request alike.
        """
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        is_refused = False
        for attempt in range(RETRIES + 1):
            await self._wait_while_paused()
            headers = {"Content-Type": content_type, "Accept": accept, **await self.credentials.headers(is_refused=is_refused)}
            try:
                return await self._send(verb, method, path, query, data, headers, limits)
            except Throttled as error:
                if attempt == RETRIES:
                    raise
                self._pause(error, attempt)
            except Unauthorized:
                if is_refused:
                    raise
                is_refused = True
        raise AssertionError("the last attempt returns or raises")

    async def _send(
        self,
        verb: str,
        method: str,
        path: str,
        query: dict[str, str] | None,
        data: bytes | None,
        headers: dict[str, str],
        limits: aiohttp.ClientTimeout,
    ) -> dict[str, Any]:
        if self._session is None:
            self._session = self.credentials.session()
        started, code = time.monotonic(), 0
        url = self.credentials.server + path
        try:
            async with self._session.request(
                method, url, params=query, data=data, headers=headers, timeout=limits, allow_redirects=False
            ) as answer:
                code = answer.status
                content = _parsed(await answer.read())
                if code < 300:
                    return content
                error = error_of(code, content, verb)
                if isinstance(error, Throttled):
                    error.details.setdefault("retryAfterSeconds", answer.headers.get("Retry-After"))
                raise error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            code = 0
            raise Unreachable(f"{method} {path}: {type(error).__name__}") from error
        finally:
            self._observed(verb, code, time.monotonic() - started)

    def _pause(self, error: ApiError, attempt: int) -> None:
        try:
            seconds = float(error.details.get("retryAfterSeconds") or 2**attempt)
        except (TypeError, ValueError):
            seconds = float(2**attempt)
        self._paused_until = max(self._paused_until, time.monotonic() + min(seconds, LONGEST_PAUSE))

    async def _wait_while_paused(self) -> None:
        seconds = self._paused_until - time.monotonic()
        if seconds > 0:
            await asyncio.sleep(seconds)


def _parsed(content: bytes) -> dict[str, Any]:
    """JSON of the API server; errors of what stands before it may be plain text."""
    try:
        value = json.loads(content) if content else {}
    except ValueError:
        return {"message": content[:200].decode(errors="replace")}
    return value if isinstance(value, dict) else {"value": value}
