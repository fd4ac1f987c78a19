"""An engine that does nothing, at once: the other end of `bench.gateway`. `python -m bench.null_engine <port>`."""

from __future__ import annotations

import asyncio
import json
import sys

import uvloop

STREAM_EVENTS = 5
EVENT_SECONDS = 0.02


def _whole() -> bytes:
    message = {"role": "assistant", "content": "positive " * 60}
    body = json.dumps(
        {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "model": "bench",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 200, "completion_tokens": 60, "total_tokens": 260},
        }
    ).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def _event(delta: dict[str, str], reason: str | None = None) -> bytes:
    event = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    data = b"data: " + json.dumps(event).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


WHOLE = _whole()
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FIRST = STREAM_HEAD + _event({"role": "assistant", "content": "posi"})
NEXT = _event({"content": "tive "})
LAST = _event({}, "stop") + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
NOTHING = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


class Engine(asyncio.Protocol):
    """Requests one after another on a connection, each with a Content-Length if it has a body."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # a TCP transport
        self.buffer = b""

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
        if head.startswith(b"get"):
            self.transport.write(NOTHING if b"/health" in head[:30] else MISSING)
        elif b'"stream":true' in body or b'"stream": true' in body:
            self.transport.write(FIRST)
            asyncio.get_running_loop().call_later(EVENT_SECONDS, self._go_on, STREAM_EVENTS)
        else:
            self.transport.write(WHOLE)

    def _go_on(self, left: int) -> None:
        if left:
            self.transport.write(NEXT)
            asyncio.get_running_loop().call_later(EVENT_SECONDS, self._go_on, left - 1)
        else:
            self.transport.write(LAST)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(int(sys.argv[1])))
