"""One line of JSON on standard output for each request: who, what became of it, how long it took. Never what was said."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tuneloop_gateway.proxy import Exchange
from tuneloop_gateway.threads import in_daemon_thread

if TYPE_CHECKING:
    from tuneloop_gateway.spans import Trace

logger = logging.getLogger(__name__)
STANDARD_OUTPUT = 1
WRITE_SECONDS = 0.5
MAX_LINES = 20_000
"""Lines that wait to be written; where nobody reads them, more are dropped and counted."""


@dataclass
class Entry:
    """A request on its way. `exchange` is there from when it was found to be one for an engine."""

    request_id: str
    route: str
    """A path of ours, with `{}` where the client's own part is."""
    key: str = ""
    """Name of the API key."""
    status: int = 499
    """What it is where the client went away before anything was said."""
    error: str = ""
    exchange: Exchange | None = None
    trace: Trace | None = None
    started: float = field(default_factory=time.perf_counter)

    def line(self) -> str:
        exchange = self.exchange
        said: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "requestId": self.request_id, "route": self.route, "key": self.key,
            "status": self.status, "seconds": round(time.perf_counter() - self.started, 4),
        }  # fmt: skip
        if self.error:
            said["error"] = self.error
        if exchange is not None:
            said |= {"stream": exchange.inbound.stream, "revision": exchange.revision, "version": exchange.version}
            said |= {"finishReason": exchange.finish_reason, "promptTokens": exchange.tokens[0], "completionTokens": exchange.tokens[1]}
            if exchange.first_at:
                said["firstByteSeconds"] = round(exchange.first_at - exchange.started, 4)
        if self.trace is not None:
            said["traceId"] = self.trace.id
        return json.dumps(said, separators=(",", ":"))


class AccessLog:
    """Lines are gathered and written by another thread: a reader that is slow holds no request up."""

    def __init__(self) -> None:
        self._lines, self._dropped = list[str](), 0
        self._turn = asyncio.Lock()

    def add(self, entry: Entry) -> None:
        if len(self._lines) < MAX_LINES:
            self._lines.append(entry.line())
        else:
            self._dropped += 1

    async def run(self) -> None:
        """Runs for ever."""
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            await self.write()

    async def write(self) -> None:
        """All that wait. Lines of a stream that is broken are lost, and counted in the next that is written."""
        async with self._turn:
            lines, self._lines = self._lines, []
            if self._dropped:
                lines.append(json.dumps({"droppedLines": self._dropped}))
            if not lines:
                return
            told, self._dropped = self._dropped, 0
            try:
                data = ("\n".join(lines) + "\n").encode()
                await in_daemon_thread(lambda: _put(data))
            except OSError as error:
                self._dropped += told + len(lines) - bool(told)
                logger.warning("Lines of the access log could not be written: %s.", type(error).__name__)

    async def close(self, seconds: float) -> None:
        """The last write."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.write(), seconds)


def _put(data: bytes) -> None:
    """Not by `sys.stdout`, whose lock a thread that is held up would keep beyond the process's end."""
    while data:
        data = data[os.write(STANDARD_OUTPUT, data) :]
