"""Spans of requests by OpenTelemetry, named by its conventions for generative AI. Without what was said; sent by a thread of their own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tuneloop_gateway import contract
from tuneloop_gateway.inbound import CHAT_PATH, Inbound

if TYPE_CHECKING:
    from tuneloop_gateway.access_log import Entry

EXPORT_SECONDS = 3.0
QUEUE, BATCH = 2048, 512
"""Spans beyond that are dropped: nothing waits for a receiver."""
PASSED_ON = ("traceparent", "tracestate")


class Trace:
    """One request's span, and what tells the engine about it."""

    def __init__(self, span: Span, headers: dict[str, str]) -> None:
        self._span, self.headers = span, headers
        self.id = format_trace_id(span.get_span_context().trace_id)

    def end(self, entry: Entry, model_id: str) -> None:
        """Says what became of it."""
        span, exchange = self._span, entry.exchange
        if span.is_recording() and exchange is not None:
            span.set_attribute("http.response.status_code", entry.status)
            if exchange.revision:
                span.set_attributes({"gen_ai.response.model": model_id, "tuneloop.revision": exchange.revision})
            if exchange.tokens != (0, 0):
                prompt, completion = exchange.tokens
                span.set_attributes({"gen_ai.usage.input_tokens": prompt, "gen_ai.usage.output_tokens": completion})
            if exchange.first_at:
                span.set_attribute("gen_ai.response.time_to_first_chunk", exchange.first_at - exchange.started)
            if entry.status < 400 and exchange.finish_reason:
                span.set_attribute("gen_ai.response.finish_reasons", (exchange.finish_reason,))
            elif entry.status >= 400:
                span.set_attribute("error.type", entry.error or exchange.finish_reason or str(entry.status))
            if entry.status >= 500:
                span.set_status(StatusCode.ERROR)
        span.end()


class Spans:
    """Where they go. Nothing here is global."""

    def __init__(self, asked: contract.Tracing, namespace: str, deployment: str, instance: str) -> None:
        resource = {"service.name": deployment, "service.namespace": namespace, "service.instance.id": instance}
        exporter = OTLPSpanExporter(asked.endpoint.rstrip("/") + "/v1/traces", timeout=EXPORT_SECONDS, compression=Compression.Gzip)
        sampler = ParentBased(TraceIdRatioBased(asked.sample_rate))
        self._provider = TracerProvider(sampler, Resource.create(resource), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=QUEUE, max_export_batch_size=BATCH))
        self._tracer = self._provider.get_tracer("tuneloop_gateway")
        self._context = TraceContextTextMapPropagator()

    def begin(self, headers: Mapping[str, str], inbound: Inbound, entry: Entry, model: str) -> Trace:
        """A span below the sender's, where it names one."""
        operation = "chat" if inbound.path == CHAT_PATH else "text_completion"
        parent = self._context.extract({name: headers[name] for name in PASSED_ON if name in headers}, Context())
        about: dict[str, str | bool] = {
            "gen_ai.operation.name": operation, "gen_ai.provider.name": "vllm", "gen_ai.request.model": model,
            "gen_ai.request.stream": inbound.stream, "http.route": entry.route,
            "tuneloop.request.id": entry.request_id, "tuneloop.key": entry.key,
        }  # fmt: skip
        began = time.time_ns() - int((time.perf_counter() - entry.started) * 1e9)
        span = self._tracer.start_span(f"{operation} {model}", parent, SpanKind.CLIENT, about, start_time=began)
        told: dict[str, str] = {}
        self._context.inject(told, set_span_in_context(span, parent))
        return Trace(span, told)

    def close(self) -> None:
        """Sends what waits. Blocks."""
        self._provider.shutdown()
