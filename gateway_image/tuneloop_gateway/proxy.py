"""Sends a request to an engine and its answer back, byte for byte; tries again elsewhere while nothing was sent yet."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp
from aiohttp import web

from tuneloop_gateway.answers import Opening, StreamStart, is_abort, is_death, read_answer
from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.contract import REVISION_HEADER
from tuneloop_gateway.endpoints import DOWN_SECONDS, Endpoint
from tuneloop_gateway.errors import Refused
from tuneloop_gateway.inbound import Inbound
from tuneloop_gateway.metrics import Metrics
from tuneloop_gateway.routing import RETRY_AFTER_SECONDS, Router, Target
from tuneloop_gateway.usage import UsageFilter, with_usage

logger = logging.getLogger(__name__)
MAX_ATTEMPTS = 20
MAX_OVERLOADED = 3
"""A replica that sheds load is no reason to add to it."""
MAX_DEATHS = 2
"""Replicas that died of a request, or beside it: another one shall not be next."""
MAX_INSPECTED_BYTES = 2 << 20
MAX_KEPT_BYTES = 512 << 10
"""Of an answer, for capture."""
TAIL_BYTES = 4096
FAILURES = (aiohttp.ClientError, ConnectionError, TimeoutError)


class TryElsewhere(Exception):
    """This attempt gave nothing that the client has seen."""

    def __init__(self, cause: str, *, overloaded: bool = False, died: bool = False) -> None:
        super().__init__(cause)
        self.overloaded, self.died = overloaded, died


@dataclass
class Exchange:
    """One request and what became of it."""

    inbound: Inbound
    response_id: str
    subject: str
    headers: dict[str, str]
    """Ours, sent with the answer."""
    keep: bool
    """Keep the answer for capture."""
    engine_headers: Mapping[str, str] = field(default_factory=dict)
    """Sent to the engine beside the gateway's own."""
    started: float = field(default_factory=time.perf_counter)
    received_at: float = field(default_factory=time.time)
    size: int = 0
    """Bytes of the request's body."""
    session: str = ""
    """Its requests stay on one revision; "" where each request is for itself."""
    revision: str = ""
    version: int | None = None
    status: int = 0
    finish_reason: str = ""
    tokens: tuple[int, int] = (0, 0)
    first_at: float = 0.0
    """When a stream's first token came, and how many events it had from then on."""
    events: int = 0
    failed_on: set[str] = field(default_factory=set)
    """Revisions that a retry left."""
    hidden_usage: UsageFilter | None = None
    """Set where a stream's tokens must be known, and its client did not ask for them."""
    sent: web.StreamResponse | None = None
    """Set once something went to the client."""
    kept: list[bytes] = field(default_factory=list)
    kept_bytes: int = 0

    def note(self, chunk: bytes) -> None:
        """Remembers a piece of the answer, up to a limit. The end is always in reach: it says why the answer ended."""
        self.kept.append(chunk)
        self.kept_bytes += len(chunk)
        limit = MAX_KEPT_BYTES if self.keep else TAIL_BYTES
        while self.kept_bytes > limit and len(self.kept) > 2:
            self.kept_bytes -= len(self.kept.pop(0 if not self.keep else -2))

    @property
    def tail(self) -> bytes:
        """The last bytes of the answer, from a line's start."""
        tail = b""
        for chunk in reversed(self.kept):
            tail = chunk + tail
            if len(tail) >= TAIL_BYTES:
                break
        return tail


class Watcher(Protocol):
    """Is told what became of attempts and of requests."""

    def failed(self, exchange: Exchange) -> None: ...

    def ended(self, exchange: Exchange) -> None: ...


class Proxy:
    """The hot path. `ended` is told about every exchange that was answered, after its last byte."""

    def __init__(
        self, configuration: Configuration, router: Router, metrics: Metrics, engine_key: str, ended: Callable[[Exchange], None],
        outcomes: Watcher,
    ) -> None:  # fmt: skip
        self._configuration, self._router, self._metrics, self._ended = configuration, router, metrics, ended
        self._outcomes = outcomes
        self._engine_headers = {"Authorization": f"Bearer {engine_key}", "Content-Type": "application/json", "Accept-Encoding": "identity"}
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """Made in the running loop, at first use."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=20, ttl_dns_cache=10)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=None, connect=5), auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(), skip_auto_headers=("User-Agent", "Accept"), trust_env=False,
            )  # fmt: skip
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def answer(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """Answers one request. Raises Refused where no engine could."""
        seconds = self._configuration.current.limits.upstream_timeout_seconds
        try:
            with self._router.request():
                target = await self._router.wait(exchange.session, exchange.size)
                async with asyncio.timeout(seconds):
                    return await self._attempts(request, exchange, target)
        except TimeoutError:
            if exchange.sent is not None:
                return exchange.sent
            exchange.status = 504
            raise Refused(504, f"The model did not answer within {seconds:g} seconds.", code="upstream_timeout") from None
        except asyncio.CancelledError:
            exchange.status, exchange.finish_reason = 499, "cancelled"
            raise
        finally:
            self._count(exchange)

    def _count(self, exchange: Exchange) -> None:
        if exchange.revision:
            count = self._router.count(exchange.revision)
            count.requests += 1
            count.errors += exchange.status >= 500
            self._metrics.request(exchange.revision, f"{exchange.status // 100}xx", exchange.finish_reason)
            end = time.perf_counter()
            self._metrics.ended(exchange.revision, end - exchange.started)
            if exchange.events > 1 and exchange.status < 400:
                self._metrics.between_tokens(exchange.revision, (end - exchange.first_at) / (exchange.events - 1))
            self._outcomes.ended(exchange)
            if exchange.tokens != (0, 0):
                self._metrics.tokens(exchange.revision, *exchange.tokens)

    async def _attempts(self, request: web.BaseRequest, exchange: Exchange, first: Target) -> web.StreamResponse:
        target: Target | None = first
        tried: set[Endpoint] = set()
        dead: set[Endpoint] = set()
        attempts = overloaded = 0
        give_up_at: float | None = None
        while target is not None:
            try:
                return await self._attempt(request, exchange, target)
            except TryElsewhere as failure:
                attempts, overloaded = attempts + 1, overloaded + failure.overloaded
                tried.add(target.endpoint)
                self._outcomes.failed(exchange)
                now = time.monotonic()
                if failure.died:
                    dead.add(target.endpoint)
                    target.endpoint.down_until = now + DOWN_SECONDS
                give_up_at = give_up_at or now + self._router.wait_seconds
                if attempts >= MAX_ATTEMPTS or overloaded >= MAX_OVERLOADED or len(dead) >= MAX_DEATHS or now > give_up_at:
                    break
                self._metrics.retried(target.revision.name)
                target = await self._router.again(tried, exchange.session) or await self._router.wait(exchange.session, exchange.size)
        exchange.status = 503
        raise Refused(503, "The model's replicas could not answer now.", code="upstream_unavailable", retry_after=RETRY_AFTER_SECONDS)

    async def _attempt(self, request: web.BaseRequest, exchange: Exchange, target: Target) -> web.StreamResponse:
        """One replica's try. Raises TryElsewhere only while nothing has been sent to the client."""
        revision, endpoint = target.revision, target.endpoint
        exchange.revision, exchange.version, exchange.status = revision.name, revision.version, 500
        try:
            fields = self._configuration.prompts[revision.name].apply(exchange.inbound)
        except Refused as refused:
            if refused.status < 500:
                exchange.revision = ""  # the client's fault is no revision's
            raise
        if exchange.hidden_usage is not None:
            fields, exchange.hidden_usage = with_usage(fields), UsageFilter()
        body = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        count = self._router.count(revision.name)
        count.in_flight += 1
        endpoint.in_flight += 1
        try:
            response = await self._post(endpoint, exchange, body.encode())
            try:
                if response.status == 404 and revision.adapter is not None:  # it started anew, and nobody noticed
                    endpoint.adapters -= {revision.model_id}
                    raise TryElsewhere("the replica does not have the adapter")
                return await self._relay(request, exchange, response)
            finally:
                if not response.content.is_eof():
                    response.close()  # an engine stops what nobody reads
        except TryElsewhere:
            exchange.kept, exchange.kept_bytes = [], 0
            raise
        finally:
            count.in_flight -= 1
            endpoint.in_flight -= 1

    async def _post(self, endpoint: Endpoint, exchange: Exchange, body: bytes) -> aiohttp.ClientResponse:
        headers = {**self._engine_headers, "X-Request-Id": exchange.headers["x-request-id"], **exchange.engine_headers}
        url = f"http://{endpoint.address}{exchange.inbound.path}"
        try:
            return await self.session.post(url, data=body, headers=headers, allow_redirects=False)
        except FAILURES as error:
            endpoint.down_until = time.monotonic() + DOWN_SECONDS
            raise TryElsewhere(type(error).__name__) from error

    async def _relay(self, request: web.BaseRequest, exchange: Exchange, response: aiohttp.ClientResponse) -> web.StreamResponse:
        if response.status == 503:
            raise TryElsewhere("the replica sheds load", overloaded=True)
        if response.status in (401, 403, 404, 405):
            # The client's key and model were checked here: this is between the gateway and the engine.
            logger.error("The engine answered %d to the gateway (revision %s).", response.status, exchange.revision)
            exchange.status = 502
            raise Refused(502, "The gateway and the model's engine do not agree; see the gateway's log.", code="upstream_refused")
        if response.headers.get("Content-Type", "").startswith("text/event-stream"):
            return await self._relay_stream(request, exchange, response)
        return await self._relay_whole(request, exchange, response)

    def _headers(self, exchange: Exchange, response: aiohttp.ClientResponse) -> dict[str, str]:
        own = {**exchange.headers, REVISION_HEADER: exchange.revision}
        content_type = response.headers.get("Content-Type")
        if content_type:
            own["Content-Type"] = content_type
        return own

    async def _relay_whole(self, request: web.BaseRequest, exchange: Exchange, response: aiohttp.ClientResponse) -> web.StreamResponse:
        """An answer that is not streamed is read before it is sent: only its end says whether the engine gave up."""
        length = response.content_length
        if length is not None and length > MAX_INSPECTED_BYTES:
            return await self._pour(request, exchange, response, b"")
        try:
            raw = await response.content.read(MAX_INSPECTED_BYTES) if length is None else await response.read()
            while length is None and len(raw) < MAX_INSPECTED_BYTES and (more := await response.content.readany()):
                raw += more
        except FAILURES as error:
            raise TryElsewhere(type(error).__name__) from error
        if length is None and not response.content.at_eof():
            return await self._pour(request, exchange, response, raw)
        if is_abort(raw):
            raise TryElsewhere("the engine aborted")
        if response.status >= 500 and is_death(raw):
            raise TryElsewhere("the engine died", died=True)
        exchange.note(raw)
        self._metrics.first_byte(exchange.revision, time.perf_counter() - exchange.started)
        answer = web.Response(status=response.status, body=raw, headers=self._headers(exchange, response))
        exchange.sent = answer
        await answer.prepare(request)
        await answer.write_eof()
        self._finish(exchange, response.status)
        return answer

    async def _relay_stream(self, request: web.BaseRequest, exchange: Exchange, response: aiohttp.ClientResponse) -> web.StreamResponse:
        start = StreamStart()
        try:
            while (chunk := await response.content.readany()) or not response.content.at_eof():
                opening = start.feed(chunk)
                if opening is Opening.ABORTED:
                    raise TryElsewhere("the engine aborted")
                if opening is Opening.DIED:
                    raise TryElsewhere("the engine died", died=True)
                if opening is Opening.ANSWERING:
                    break
        except FAILURES as error:
            raise TryElsewhere(type(error).__name__) from error
        return await self._pour(request, exchange, response, bytes(start.held))

    async def _pour(
        self, request: web.BaseRequest, exchange: Exchange, response: aiohttp.ClientResponse, first: bytes
    ) -> web.StreamResponse:
        """Writes what arrives as it arrives. A client never takes a cut answer for a whole one: its connection breaks too."""
        answer = web.StreamResponse(status=response.status, headers=self._headers(exchange, response))
        self._metrics.first_byte(exchange.revision, time.perf_counter() - exchange.started)
        exchange.sent, shown, exchange.first_at = answer, exchange.hidden_usage, time.perf_counter()
        try:
            await answer.prepare(request)
            chunk, content = first, response.content
            while chunk or not content.at_eof():
                if chunk:
                    exchange.note(chunk)
                    exchange.events += chunk.count(b"data:")
                    if shown is not None:
                        chunk = shown.feed(chunk)
                    if chunk:
                        await answer.write(chunk)
                chunk = await content.readany()
            await answer.write_eof(shown.end() if shown is not None else b"")
        except (*FAILURES, asyncio.CancelledError) as error:
            gone = request.transport is None or request.transport.is_closing()
            exchange.status, exchange.finish_reason = (499, "cancelled") if gone else (500, "broken")
            if request.transport is not None:
                request.transport.abort()
            if isinstance(error, asyncio.CancelledError):
                raise
            logger.warning("A stream of revision %s broke: %s.", exchange.revision, type(error).__name__)
            return answer
        self._finish(exchange, response.status)
        return answer

    def _finish(self, exchange: Exchange, status: int) -> None:
        exchange.status = status
        streamed = exchange.inbound.stream
        answer = read_answer(exchange.tail if streamed else exchange.kept[0] if exchange.kept else b"", stream=streamed)
        exchange.finish_reason = answer.finish_reason if status < 400 else "error"
        if streamed and status < 400 and not answer.finish_reason and b"[DONE]" not in exchange.tail:
            exchange.finish_reason = "broken"  # a stream that says nothing of its end was cut
        exchange.tokens = (answer.prompt_tokens, answer.completion_tokens)
        self._ended(exchange)
