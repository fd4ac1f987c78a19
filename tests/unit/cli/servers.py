"""Servers that tests of commands play, on a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web


@contextmanager
def serving(*routes: web.RouteDef, port: int) -> Iterator[None]:
    """Answers on this port of 127.0.0.1 until the block ends."""
    started, over = threading.Event(), threading.Event()

    async def serve() -> None:
        app = web.Application()
        app.add_routes(routes)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        started.set()
        await asyncio.to_thread(over.wait)
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(10)
    try:
        yield
    finally:
        over.set()
        thread.join(10)
