"""A scripted engine that speaks as much of vLLM's API as the gateway uses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import unused_port

Reply = Callable[[web.Request, dict[str, Any]], Any]


def chat_answer(text: str, finish_reason: str = "stop") -> dict[str, Any]:
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }  # fmt: skip


def chat_events(*texts: str, finish_reason: str = "stop") -> list[bytes]:
    def event(delta: dict[str, str], reason: str | None = None) -> bytes:
        chunk = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    contents = [event({"content": t}) for t in texts]
    return [event({"role": "assistant", "content": ""}), *contents, event({}, finish_reason), b"data: [DONE]\n\n"]


@dataclass
class FakeEngine:
    """Answers "echo: <last message>" unless told otherwise; remembers what it was asked."""

    key: str = "engine-secret"
    replies: list[Reply] = field(default_factory=list)
    """Used up first, one for each request."""
    reply: Reply | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    probes: list[dict[str, Any]] | None = None
    reference: list[str] | None = None
    """What its model was trained on."""
    version: str | None = "0.32.0"
    """None: its guard is of a release that did not pass the question on."""
    chat_template: str | None = "$TURNS<assistant>"
    """None: it has no /tokenize."""
    loaded: set[str] | None = None
    """The adapters that it has; None: it answers under any name. What it has not is 404, as vLLM's is."""
    load_errors: dict[str, str] = field(default_factory=dict)
    """Adapter -> why it does not load."""
    slow: asyncio.Event | None = None
    """Loading waits for it."""
    wanted: list[dict[str, Any]] = field(default_factory=list)
    """What gateways asked it to have."""
    cancelled: int = 0
    port: int = 0
    _runner: web.AppRunner | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> FakeEngine:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_get("/tuneloop/probes", self._probes)
        app.router.add_get("/tuneloop/reference", self._reference)
        app.router.add_put("/tuneloop/adapters", self._adapters)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/version", self._version)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        self.port = self.port or unused_port()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _probes(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        return web.Response(status=404) if self.probes is None else web.json_response(self.probes)

    async def _reference(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        return web.Response(status=404) if self.reference is None else web.json_response(self.reference)

    async def _version(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        return web.Response(status=404) if self.version is None else web.json_response({"version": self.version})

    async def _adapters(self, request: web.Request) -> web.StreamResponse:
        """As the guard does: what is missing is loaded, what is not named goes."""
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        self.wanted.append(await request.json())
        if self.slow is not None:
            await self.slow.wait()
        names = {adapter["name"] for adapter in self.wanted[-1]["adapters"]}
        self.loaded = names - self.load_errors.keys()
        return web.json_response(
            {"loaded": sorted(self.loaded), "errors": {n: self.load_errors[n] for n in names & self.load_errors.keys()}}
        )

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        """A token for each byte; a chat template is written around messages."""
        if request.headers.get("Authorization") != f"Bearer {self.key}" or self.chat_template is None:
            return web.Response(status=404)
        body = await request.json()
        turns = "".join(f"<{m['role']}>{m['content']}" for m in body.get("messages", []))
        rendered = self.chat_template.replace("$TURNS", turns) if turns else body["prompt"]
        return web.json_response({"count": len(rendered), "max_model_len": 4096, "tokens": list(rendered.encode())})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        body = await request.json()
        if self.loaded is not None and body["model"] not in self.loaded:
            return web.json_response({"error": {"message": f"The model `{body['model']}` does not exist."}}, status=404)
        if body.get("max_tokens") == 1 and said(body).endswith("Hello"):
            return web.json_response(chat_answer("Hi"))  # the warm-up is not what tests are about
        self.requests.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        reply = self.replies.pop(0) if self.replies else self.reply or echo
        try:
            response = await reply(request, body)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        assert isinstance(response, web.StreamResponse)
        return response


def said(body: dict[str, Any]) -> str:
    return str(body["messages"][-1].get("content")) if "messages" in body else str(body["prompt"])


async def echo(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    if body.get("stream"):
        events = chat_events("echo: ", said(body))
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"object": "chat.completion.chunk", "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
            events.insert(-1, b"data: " + json.dumps(usage).encode() + b"\n\n")
        return await stream_of(*events)(request, body)
    if "messages" not in body:
        choice = {"index": 0, "text": f"echo: {said(body)}", "finish_reason": "stop"}
        return web.json_response({"object": "text_completion", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
    return web.json_response(chat_answer(f"echo: {said(body)}"))


def status(code: int, body: Any = None) -> Reply:
    async def reply(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(body or {"error": {"message": "no"}}, status=code)

    return reply


def answer(body: dict[str, Any]) -> Reply:
    async def reply(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(body)

    return reply


def stream_of(*chunks: bytes, gate: asyncio.Event | None = None, first: int = 1, break_after: int | None = None) -> Reply:
    """Sends each chunk by itself; with a gate, waits for it before each after the `first`; may break off."""

    async def reply(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for number, chunk in enumerate(chunks):
            if break_after == number:
                assert request.transport is not None
                request.transport.abort()
                return response
            if gate is not None and number >= first:
                await gate.wait()
                gate.clear()
            await response.write(chunk)
            await asyncio.sleep(0)
        await response.write_eof()
        return response

    return reply
