"""The public port: OpenAI's paths, feedback, health."""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from tuneloop_gateway.access_log import AccessLog, Entry
from tuneloop_gateway.allowances import Allowances, is_limited
from tuneloop_gateway.capture import Capture
from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.contract import FEEDBACK_HEADER, SESSION_HEADER
from tuneloop_gateway.drift.monitor import Monitor
from tuneloop_gateway.errors import Refused, render_error
from tuneloop_gateway.feedback import Feedback
from tuneloop_gateway.inbound import CHAT_PATH, COMPLETION_PATH, parse_inbound, read_body, session_of
from tuneloop_gateway.keys import Caller, KeyRing
from tuneloop_gateway.ledger import Ledger
from tuneloop_gateway.metrics import Metrics
from tuneloop_gateway.openapi import document
from tuneloop_gateway.proxy import Exchange, Proxy
from tuneloop_gateway.tokens import FeedbackToken, sign
from tuneloop_gateway.tracing import Tracing
from tuneloop_gateway.usage import UsageFilter, asks_for_usage

logger = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Work = Callable[[web.Request, Entry], Awaitable[web.StreamResponse]]
POSTED = (CHAT_PATH, COMPLETION_PATH, "/v1/feedback")
READ = ("/v1/models", "/openapi.json", "/healthz", "/readyz")
REQUEST_ID_HEADER = "x-request-id"
_OWN_ID = web.RequestKey("request_id", str)
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Public:
    """Handlers of the public port."""

    def __init__(
        self, configuration: Configuration, keys: KeyRing, proxy: Proxy, capture: Capture, feedback: Feedback,
        monitor: Monitor, metrics: Metrics, feedback_key: bytes, allowances: Allowances, ledger: Ledger, access_log: AccessLog,
        tracing: Tracing,
    ) -> None:  # fmt: skip
        self._configuration, self._keys, self._proxy, self._capture = configuration, keys, proxy, capture
        self._feedback, self._monitor, self._metrics, self._feedback_key = feedback, monitor, metrics, feedback_key
        self._allowances, self._ledger, self._access_log, self._tracing = allowances, ledger, access_log, tracing
        self._started = int(time.time())
        self.in_flight = 0
        self.stopping = False

    def application(self) -> web.Application:
        # The configured limit may change while we run, so it is not aiohttp's but ours (`read_body`) that holds.
        app = web.Application(client_max_size=1 << 30)
        for path in (CHAT_PATH, COMPLETION_PATH):
            app.router.add_post(path, self._noted(path, self.complete))
        app.router.add_get("/v1/models", self._noted("/v1/models", self.models))
        app.router.add_get("/v1/models/{model}", self._noted("/v1/models/{model}", self.model))
        app.router.add_post("/v1/feedback", self._noted("/v1/feedback", self.feedback))
        app.router.add_get("/openapi.json", self.openapi)
        app.router.add_get("/healthz", self.health)
        app.router.add_get("/readyz", self.ready)
        app.router.add_route("*", "/{path:.*}", self.unknown)
        app.on_response_prepare.append(self._complete_headers)
        return app

    async def _complete_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """No versions for those who look for holes; and clients with open connections shall look for another replica at the end."""
        response.headers["Server"] = "tuneloop"
        response.headers.setdefault(REQUEST_ID_HEADER, _request_id(request))
        if self.stopping:
            response.force_close()
            response.headers["Connection"] = "close"

    def _noted(self, route: str, work: Work) -> Handler:
        """A handler whose requests have their line in the log, and whose refusals and bugs are answered in OpenAI's form."""

        async def handle(request: web.Request) -> web.StreamResponse:
            entry = Entry(_request_id(request), route)
            try:
                response = await work(request, entry)
                entry.status = entry.exchange.status if entry.exchange is not None else response.status
                return response
            except Refused as refused:
                entry.status, entry.error = refused.status, refused.code
                return render_error(refused)
            except Exception:
                # A bug answers like everything else, and its client learns the request's id.
                logger.exception("Request %s failed.", entry.request_id)
                entry.status, entry.error = 500, "internal_error"
                return render_error(Refused(500, "The gateway failed.", code="internal_error"))
            finally:
                if entry.exchange is not None:
                    self._count(entry, entry.exchange)
                if entry.trace is not None:
                    entry.trace.end(entry, self._model_id(entry))
                self._access_log.add(entry)

        return handle

    async def _caller(self, request: web.BaseRequest, entry: Entry) -> Caller:
        """Who asks, with one request of its allowance taken. Raises Refused 401 and 429."""
        config = self._configuration.current
        caller = self._keys.find(request.headers.get("Authorization"))
        if caller is None:
            if config.require_key:
                raise Refused(401, "Send a valid API key as 'Authorization: Bearer <key>'.", code="invalid_api_key")
            caller = self._keys.anonymous
        entry.key = caller.name
        limits = config.limits
        if is_limited(limits):
            wait = await self._allowances.take(caller.subject, limits)
            if wait is not None:
                allowed = limits.tokens_per_minute if wait.what == "tokens" else limits.requests_per_minute
                message = f"This key has used its {allowed} {wait.what} a minute; wait {math.ceil(wait.seconds)} seconds."
                raise Refused(429, message, code="rate_limit_exceeded", retry_after=max(1, math.ceil(wait.seconds)))
        return caller

    def _count(self, entry: Entry, exchange: Exchange) -> None:
        """What one request used, for the key's account and its minute. Failures are free."""
        if entry.status >= 500:
            self._ledger.add(exchange.subject, failed=1)
            self._metrics.failed(entry.key)
        elif exchange.revision and exchange.sent is not None:
            prompt, completion = _tokens_of(exchange)
            self._allowances.charge(exchange.subject, prompt + completion, self._configuration.current.limits)
            if entry.status < 400 or entry.status == 499:
                self._ledger.add(exchange.subject, requests=1, prompt_tokens=prompt, completion_tokens=completion)
                self._metrics.used(entry.key, prompt, completion)

    async def complete(self, request: web.Request, entry: Entry) -> web.StreamResponse:
        """Chat and text completions."""
        self.in_flight += 1
        try:
            return await self._complete(request, entry)
        except Refused as refused:
            if refused.code not in ("upstream_timeout", "upstream_refused", "upstream_unavailable"):  # counted with their revision
                self._metrics.request("", f"{refused.status // 100}xx", "refused")
            raise
        finally:
            self.in_flight -= 1

    async def _complete(self, request: web.Request, entry: Entry) -> web.StreamResponse:
        limits = self._configuration.current.limits
        if self.in_flight > limits.max_in_flight:
            raise Refused(503, "The gateway is at its limit of running requests.", code="overloaded", retry_after=1)
        caller = await self._caller(request, entry)
        raw = await read_body(request, limits.max_body_bytes)
        inbound = parse_inbound(raw, request.path, self._configuration.current.model)
        response_id = "r" + secrets.token_hex(12)
        token = FeedbackToken(response_id, caller.subject, int(time.time()))
        headers = {REQUEST_ID_HEADER: entry.request_id, FEEDBACK_HEADER: sign(token, self._feedback_key)}
        exchange = Exchange(
            inbound, response_id, caller.subject, headers, keep=self._capture.wants_answer(), started=entry.started, size=len(raw)
        )
        entry.exchange = exchange
        if self._tracing.spans is not None:
            entry.trace = self._tracing.spans.begin(request.headers, inbound, entry, self._configuration.current.model)
            exchange.engine_headers = entry.trace.headers
        if self._configuration.current.window and self._configuration.current.affinity == "Session":
            exchange.session = session_of(inbound, caller.subject, request.headers.get(SESSION_HEADER, ""))
        if inbound.stream and not asks_for_usage(inbound.body):
            exchange.hidden_usage = UsageFilter()
        return await self._proxy.answer(request, exchange)

    def _model_id(self, entry: Entry) -> str:
        """What the engine calls the model that answered."""
        used = entry.exchange.revision if entry.exchange is not None else ""
        return next((revision.model_id for revision in self._configuration.current.revisions if revision.name == used), "")

    def _model(self) -> dict[str, str | int]:
        return {"id": self._configuration.current.model, "object": "model", "created": self._started, "owned_by": "tuneloop"}

    async def models(self, request: web.Request, entry: Entry) -> web.StreamResponse:
        await self._caller(request, entry)
        return web.json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: web.Request, entry: Entry) -> web.StreamResponse:
        await self._caller(request, entry)
        if request.match_info["model"] != self._configuration.current.model:
            raise Refused(404, "There is no such model here.", code="model_not_found", param="model")
        return web.json_response(self._model())

    async def feedback(self, request: web.Request, entry: Entry) -> web.StreamResponse:
        return await self._feedback.take(request, await self._caller(request, entry), self._monitor.epoch)

    async def openapi(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(document())

    async def unknown(self, request: web.Request) -> web.StreamResponse:
        allowed = "POST" if request.path in POSTED else "GET" if request.path in READ or request.path.startswith("/v1/models/") else None
        refused = Refused(405 if allowed else 404, f"There is no {request.method} {request.path[:100]} here.", code="unknown_path")
        return render_error(refused, {"Allow": allowed} if allowed else None)

    async def health(self, _: web.Request) -> web.StreamResponse:
        """The process answers: no more. A model or database that is away is no reason to restart the gateway."""
        return web.Response(text="ok")

    async def ready(self, _: web.Request) -> web.StreamResponse:
        """Ready without engines too: requests are held until one is there."""
        return web.Response(status=503, text="stopping") if self.stopping else web.Response(text="ok")


def _request_id(request: web.BaseRequest) -> str:
    """The client's own where it is one; else a new one, the same for as long as the request lasts."""
    if _OWN_ID not in request:
        given = request.headers.get(REQUEST_ID_HEADER, "")
        request[_OWN_ID] = given if _REQUEST_ID.fullmatch(given) else "q" + secrets.token_hex(12)
    return request[_OWN_ID]


def _tokens_of(exchange: Exchange) -> tuple[int, int]:
    """Of an answer that was cut off nobody told them: its events and its question's bytes are counted instead."""
    if exchange.tokens != (0, 0) or exchange.status == 200:
        return exchange.tokens
    events = exchange.hidden_usage.events if exchange.hidden_usage is not None else exchange.events
    return len(exchange.inbound.text) // 4, events
