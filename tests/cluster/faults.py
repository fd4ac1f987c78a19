"""A proxy between an operator and the API server that counts its writes and does what networks and API servers do on bad days."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import yaml
from aiohttp import web

from tuneloop_operator.cluster.credentials import load_credentials

HOP_BY_HOP = {"transfer-encoding", "connection", "content-length", "host", "content-encoding", "accept-encoding"}


@dataclass(frozen=True)
class Write:
    """A request that changes something; Leases and events apart."""

    number: int
    method: str
    path: str
    name: str = ""
    """Of the object that a POST makes."""

    @property
    def target(self) -> str:
        """What is written: the path within the namespace, and behind it the name of what a POST makes."""
        return "/".join(part for part in (self.path.partition("/namespaces/")[2].partition("/")[2], self.name) if part)


@dataclass
class Faults:
    """What the proxy does. Set by the test's thread, read by the proxy's."""

    refuse: bool = False
    """Close every connection without an answer, the watches that run too."""
    answer: Callable[[str, str], tuple[int, dict[str, str]] | None] = lambda method, path: None
    """Answers by itself with this status and these headers instead of forwarding; None = forward."""
    before_write: Callable[[Write], None] = lambda write: None
    """Called before a write is forwarded; may block."""
    after_write: Callable[[Write], bool] = lambda write: True
    """Called after a write was carried out with success, before its answer is sent; False = the answer is lost."""
    hang_watches: bool = False
    """Those that run bring nothing and do not end, and new ones get no answer."""
    drop_events: bool = False
    """Keep connections of watches open, and swallow what they bring."""
    writes: list[Write] = field(default_factory=list)
    statuses: list[tuple[Write, int]] = field(default_factory=list)
    created: list[tuple[str, str]] = field(default_factory=list)
    """Plural and name of what was made, events apart."""


class FaultProxy:
    """Runs in a thread of its own; `kubeconfig` leads an operator through it."""

    def __init__(self, kubeconfig: str, folder: Path) -> None:
        self.faults = Faults()
        self.kubeconfig = str(folder / "proxy.kubeconfig")
        self._credentials = load_credentials({"KUBECONFIG": kubeconfig})
        self._loop = asyncio.new_event_loop()
        self._is_up = threading.Event()
        self._watches: dict[web.StreamResponse, web.Request] = {}
        self._port = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        assert self._is_up.wait(10)
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "proxy",
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}],
            "clusters": [{"name": "proxy", "cluster": {"server": f"http://127.0.0.1:{self._port}"}}],
            "users": [{"name": "proxy", "user": {}}],
        }  # fmt: skip
        Path(self.kubeconfig).write_text(yaml.safe_dump(config))
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def send_to_watches(self, line: dict[str, object]) -> None:
        """Puts a line into every watch, as if the API server had sent it."""
        asyncio.run_coroutine_threadsafe(self._send(json.dumps(line).encode() + b"\n"), self._loop).result(10)

    def refuse(self, refuse: bool) -> None:
        """Turns the API server off, or on."""
        self.faults.refuse = refuse
        if refuse:
            asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(10)

    # --- in the thread ---

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_default_executor(ThreadPoolExecutor(32))
        self._loop.run_until_complete(self._start())
        self._is_up.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _start(self) -> None:
        self._session = self._credentials.session()
        app = web.Application(client_max_size=16 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _end(self) -> None:
        await self._runner.cleanup()
        await self._session.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _send(self, line: bytes) -> None:
        for watch in list(self._watches):
            with suppress(ConnectionError):  # its client has left; the API server has not heard of it yet
                await watch.write(line)

    async def _cut(self) -> None:
        for request in list(self._watches.values()):
            if request.transport is not None:
                request.transport.abort()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        faults = self.faults
        own = None if faults.refuse else faults.answer(request.method, request.path)
        if faults.refuse:
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=502)
        if own is not None:
            status, headers = own
            body = {"kind": "Status", "status": "Failure", "code": status, "reason": "Injected", "message": "a fault of the test"}
            return web.json_response(body, status=status, headers=headers)
        body = await request.read()
        if faults.hang_watches and "watch" in request.query:
            await asyncio.Event().wait()  # for ever: the end of the proxy cancels it
        write = self._as_write(request, body)
        if write is not None:
            await asyncio.to_thread(faults.before_write, write)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        headers |= await self._credentials.headers()
        url = self._credentials.server + request.path_qs
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with self._session.request(request.method, url, data=body or None, headers=headers, timeout=timeout) as answer:
            if "watch" in request.query:
                return await self._watch(request, answer)
            content = await answer.read()
        if write is not None:
            faults.statuses.append((write, answer.status))
            if answer.status == 201:
                faults.created.append((request.path.rpartition("/")[2], json.loads(content)["metadata"]["name"]))
            if answer.status < 300 and not await asyncio.to_thread(faults.after_write, write):
                assert request.transport is not None
                request.transport.abort()
        headers = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
        return web.Response(status=answer.status, body=content, headers=headers)

    def _as_write(self, request: web.Request, body: bytes) -> Write | None:
        if request.method == "GET" or request.path.split("/")[-1] in ("events", "leases") or "/leases/" in request.path:
            return None
        name = json.loads(body)["metadata"].get("name", "") if request.method == "POST" else ""
        write = Write(len(self.faults.writes) + 1, request.method, request.path, name)
        self.faults.writes.append(write)
        return write

    async def _watch(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": "application/json"})
        try:
            await response.prepare(request)
        except ConnectionError:
            return response  # it asked, and died
        self._watches[response] = request
        try:
            async for line in answer.content:
                if not self.faults.drop_events and not self.faults.hang_watches:
                    await response.write(line)
            if self.faults.hang_watches:
                await asyncio.Event().wait()
        except (aiohttp.ClientError, ConnectionError):
            pass
        finally:
            self._watches.pop(response, None)
        return response
