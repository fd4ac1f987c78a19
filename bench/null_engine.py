"""An engine that does nothing, at once: the other end of `bench.gateway` and `bench.load`. `python -m bench.null_engine <port>`.

At its end it does as vLLM with `--shutdown-timeout`: after SIGTERM a new request is answered with the finish reason `abort`, streams
that run are ended first. Connections that are idle for five seconds are closed, as uvicorn does.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time

import uvloop

STREAM_EVENTS = 5
EVENT_SECONDS = 0.02
KEEP_ALIVE_SECONDS = 5.0


def _whole(reason: str) -> bytes:
    message = {"role": "assistant", "content": "positive " * 60}
    body = json.dumps(
        {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "model": "bench",
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": {"prompt_tokens": 200, "completion_tokens": 60, "total_tokens": 260},
        }
    ).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def _event(delta: dict[str, str], reason: str | None = None) -> bytes:
    event = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    data = b"data: " + json.dumps(event).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


WHOLE, ABORTED = _whole("stop"), _whole("abort")
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FIRST = STREAM_HEAD + _event({"role": "assistant", "content": "posi"})
NEXT = _event({"content": "tive "})
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
LAST, ABORTED_STREAM = _event({}, "stop") + END, STREAM_HEAD + _event({}, "abort") + END
NOTHING = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


class Engine(asyncio.Protocol):
    """Requests one after another on a connection, each with a Content-Length if it has a body."""

    stopping = False
    open: set[Engine] = set()  # noqa: RUF012 - all of the process

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # a TCP transport
        self.buffer = b""
        self.streaming, self.used_at = False, time.monotonic()
        Engine.open.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        Engine.open.discard(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        while end >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
            self._answer(head, body)
            end = self.buffer.find(b"\r\n\r\n")

    def _answer(self, head: bytes, body: bytes) -> None:
        self.used_at = time.monotonic()
        streamed = b'"stream":true' in body or b'"stream": true' in body
        if head.startswith(b"get"):
            self.transport.write(NOTHING if b"/health" in head[:30] else MISSING)
        elif Engine.stopping:
            self.transport.write(ABORTED_STREAM if streamed else ABORTED)
        elif streamed:
            self.streaming = True
            self.transport.write(FIRST)
            asyncio.get_running_loop().call_later(EVENT_SECONDS, self._go_on, STREAM_EVENTS)
        else:
            self.transport.write(WHOLE)

    def _go_on(self, left: int) -> None:
        if left:
            self.transport.write(NEXT)
            asyncio.get_running_loop().call_later(EVENT_SECONDS, self._go_on, left - 1)
        else:
            self.streaming, self.used_at = False, time.monotonic()
            self.transport.write(LAST)


async def _close_idle() -> None:
    while True:
        await asyncio.sleep(1)
        for connection in list(Engine.open):
            if not connection.streaming and time.monotonic() - connection.used_at > KEEP_ALIVE_SECONDS:
                connection.transport.close()


async def serve(port: int) -> None:
    """Until SIGTERM, and until the last stream has ended after it."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    server = await loop.create_server(Engine, "127.0.0.1", port, backlog=1024)
    sweeping = asyncio.create_task(_close_idle())
    await stopped.wait()
    Engine.stopping = True
    while any(connection.streaming for connection in Engine.open):  # noqa: ASYNC110 - an event would cost each stream something
        await asyncio.sleep(0.01)
    sweeping.cancel()
    server.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(int(sys.argv[1])))
