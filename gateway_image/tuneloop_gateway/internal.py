"""The internal port: state and metrics for the operator and Prometheus, rows for the trainer and the reviewers."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Iterable
from datetime import date
from typing import Literal

from aiohttp import web
from pydantic import BaseModel, ValidationError

from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.contract import TOKEN_HEADER, ForgetReceipt, ForgetRequest, LabelRow, UsageRow
from tuneloop_gateway.curation import Curation
from tuneloop_gateway.database import Unavailable
from tuneloop_gateway.drift.monitor import Monitor
from tuneloop_gateway.errors import Refused, invalid, render_error
from tuneloop_gateway.inbound import read_body
from tuneloop_gateway.keys import bearer
from tuneloop_gateway.metrics import Metrics
from tuneloop_gateway.opinions import Opinions, Rows
from tuneloop_gateway.state import State

MAX_LABEL_ROWS = 10_000
MAX_LABEL_BYTES = 32 << 20
MAX_SAMPLE = 10_000
MAX_FORGET_BYTES = 4096
OPINIONS: dict[str, Rows] = {"Ratings": "Ratings", "Preferences": "Preferences"}
NDJSON = "application/x-ndjson"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Internal:
    """Handlers of the internal port."""

    def __init__(
        self, configuration: Configuration, state: State, curation: Curation, opinions: Opinions, monitor: Monitor,
        metrics: Metrics, token: str, forget: Callable[[ForgetRequest], Awaitable[ForgetReceipt]],
        usage: Callable[[str, str], Awaitable[list[UsageRow]]],
    ) -> None:  # fmt: skip
        self._configuration, self._state, self._forget, self._usage = configuration, state, forget, usage
        self._curation, self._opinions = curation, opinions
        self._monitor, self._metrics, self._token = monitor, metrics, token.encode()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_LABEL_BYTES)
        app.router.add_get("/internal/state", self.state)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/internal/export", self._guarded(self.export))
        app.router.add_get("/internal/labels", self._guarded(self.sample))
        app.router.add_post("/internal/labels", self._guarded(self.label))
        app.router.add_get("/internal/usage", self._guarded(self.usage))
        app.router.add_post("/internal/forget", self._guarded(self.forget))
        return app

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                given = request.headers.get(TOKEN_HEADER) or bearer(request.headers.get("Authorization")) or ""
                if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._token):
                    raise Refused(401, "The internal token is missing or wrong.", code="invalid_token")
                return await handler(request)
            except Refused as refused:
                return render_error(refused)
            except Unavailable:
                return render_error(Refused(503, "The database is away.", code="store_unavailable", retry_after=10))

        return guarded

    async def state(self, _: web.Request) -> web.StreamResponse:
        await self._state.refresh()
        return web.Response(body=self._state.build().model_dump_json(by_alias=True).encode(), content_type="application/json")

    async def metrics(self, _: web.Request) -> web.StreamResponse:
        await self._state.refresh()
        body = self._metrics.render(self._configuration.current, self._state.build())
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=1.0.0; charset=utf-8; escaping=underscores"})

    async def export(self, request: web.Request) -> web.StreamResponse:
        split = request.query.get("split", "train")
        if split not in ("train", "gate"):
            raise invalid("'split' must be train or gate.", "split")
        chosen: Literal["train", "gate"] = "train" if split == "train" else "gate"
        asked = request.query.get("epoch")
        epoch = None if asked == "all" else asked or self._monitor.epoch
        rows, max_share = request.query.get("rows", "Labels"), self._configuration.current.max_share_of_one_subject
        if rows == "Labels":
            return _ndjson(await self._curation.export(chosen, epoch, max_share))
        if rows not in OPINIONS:
            raise invalid("'rows' must be Labels, Ratings or Preferences.", "rows")
        return _ndjson(await self._opinions.export(OPINIONS[rows], chosen, epoch, max_share))

    async def sample(self, request: web.Request) -> web.StreamResponse:
        limit = _number(request, "limit", 500, MAX_SAMPLE)
        uniform = _number(request, "uniform", 1, 1) == 1
        alarmed = self._monitor.alarmed_since
        since_alarm = _number(request, "since_alarm", int(alarmed is not None), 1) == 1
        if since_alarm and alarmed is None:
            return _ndjson([])
        return _ndjson(await self._curation.sample(limit, alarmed or 0.0 if since_alarm else 0.0, uniform=uniform))

    async def label(self, request: web.Request) -> web.StreamResponse:
        raw = await read_body(request, MAX_LABEL_BYTES)
        lines = [line for line in raw.split(b"\n") if line.strip()]
        if len(lines) > MAX_LABEL_ROWS:
            raise Refused(413, f"At most {MAX_LABEL_ROWS} rows a request.", code="request_too_large")
        rows = [_parse_label(number, line) for number, line in enumerate(lines, 1)]
        receipt = await self._curation.add_labels(rows, self._monitor.epoch)
        return web.Response(body=receipt.model_dump_json(by_alias=True).encode(), content_type="application/json")

    async def usage(self, request: web.Request) -> web.StreamResponse:
        since, until = (_day(request, name) for name in ("since", "until"))
        return _ndjson(await self._usage(since, until))

    async def forget(self, request: web.Request) -> web.StreamResponse:
        try:
            whose = ForgetRequest.model_validate_json(await read_body(request, MAX_FORGET_BYTES))
        except ValidationError as error:
            raise invalid(f"{error.errors(include_input=False, include_url=False)[0]['msg']}.") from None
        if (whose.key is None) == (whose.subject is None):
            raise invalid("Name either the 'key' or the 'subject' whose rows shall be deleted.")
        receipt = await self._forget(whose)
        return web.Response(body=receipt.model_dump_json(by_alias=True).encode(), content_type="application/json")


def _parse_label(number: int, line: bytes) -> LabelRow:
    """All rows or none: a batch with a bad row is refused as a whole."""
    try:
        row = LabelRow.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise invalid(f"Row {number} is no label: {first['msg']}{f' ({where})' if where else ''}.") from None
    if not row.label.strip():
        raise invalid(f"Row {number} has an empty label.")
    return row


def _number(request: web.Request, name: str, default: int, most: int) -> int:
    raw = request.query.get(name)
    if raw is None:
        return default
    if not raw.isascii() or not raw.isdigit() or len(raw) > 9 or int(raw) > most:
        raise invalid(f"'{name}' must be a whole number up to {most}.", name)
    return int(raw)


def _ndjson(rows: Iterable[BaseModel]) -> web.Response:
    lines = [json.dumps(row.model_dump(mode="json", by_alias=True, exclude_none=True), ensure_ascii=False) + "\n" for row in rows]
    return web.Response(body="".join(lines).encode("utf-8", "replace"), headers={"Content-Type": NDJSON})


def _day(request: web.Request, name: str) -> str:
    """Raises Refused 400."""
    given = request.query.get(name, "")
    try:
        if date.fromisoformat(given).isoformat() == given:
            return given
    except ValueError:
        pass
    raise invalid(f"'{name}' must be a day, as in 2026-01-31.", name)
