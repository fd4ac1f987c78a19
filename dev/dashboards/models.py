"""One model: what its users see, and what its engines do."""

from __future__ import annotations

from dev.dashboards.panels import Dashboard, Panel, Row
from dev.dashboards.queries import (
    ALWAYS,
    BETWEEN,
    FIRST_BYTE,
    OF_POD,
    OF_REVISION,
    ONE,
    POD,
    REQUEST,
    REVISION,
    chosen,
    failing,
    quantile,
    rate,
)

MODEL = Dashboard(
    "model",
    "one model",
    (
        Row(
            "What users see",
            (
                Panel(
                    "Requests",
                    "A second, by revision and status.",
                    ((rate("tuneloop_gateway_requests_total", f"{OF_REVISION}, code"), f"{REVISION} {{{{code}}}}"),),
                    "reqps",
                ),
                Panel("Failing share", "By revision.", ((failing(OF_REVISION), REVISION),), "percentunit"),
                Panel(
                    "How answers end",
                    "stop, length, tool_calls; abort, error and broken are failures.",
                    ((rate("tuneloop_gateway_requests_total", f"{ONE}, finish_reason"), "{{finish_reason}}"),),
                    "reqps",
                ),
                Panel(
                    "Time to first byte",
                    "From arrival at the gateway.",
                    (
                        (quantile(0.5, FIRST_BYTE, OF_REVISION), f"{REVISION} p50"),
                        (quantile(0.95, FIRST_BYTE, OF_REVISION), f"{REVISION} p95"),
                    ),
                    "s",
                ),
                Panel(
                    "Between two tokens",
                    "Of streams, on average over an answer.",
                    ((quantile(0.5, BETWEEN, OF_REVISION), f"{REVISION} p50"), (quantile(0.95, BETWEEN, OF_REVISION), f"{REVISION} p95")),
                    "s",
                ),
                Panel(
                    "Whole request",
                    "From arrival to the answer's end.",
                    ((quantile(0.5, REQUEST, OF_REVISION), f"{REVISION} p50"), (quantile(0.95, REQUEST, OF_REVISION), f"{REVISION} p95")),
                    "s",
                ),
                Panel(
                    "Tokens",
                    "A second, as the engines report them.",
                    ((rate("tuneloop_gateway_tokens_total", f"{OF_REVISION}, kind"), f"{REVISION} {{{{kind}}}}"),),
                ),
                Panel(
                    "In flight",
                    "Requests that the gateways are answering.",
                    ((f"sum by ({ONE}) ({chosen('tuneloop_gateway_in_flight_requests')})", "in flight"),),
                ),
                Panel(
                    "Retries",
                    "Attempts that were repeated on another replica before the first byte, a second.",
                    ((f"{rate('tuneloop_gateway_retries_total', ONE)} or {ALWAYS}", "retries"),),
                ),
            ),
        ),
        Row(
            "Engine",
            (
                Panel(
                    "Requests in the engine",
                    "Running and waiting, by pod.",
                    (
                        (f"sum by ({OF_POD}) ({chosen('vllm:num_requests_running')})", f"{POD} running"),
                        (f"sum by ({OF_POD}) ({chosen('vllm:num_requests_waiting')})", f"{POD} waiting"),
                    ),
                ),
                Panel(
                    "Time to first token, p95",
                    "As the engine measures it.",
                    ((quantile(0.95, "vllm:time_to_first_token_seconds", OF_POD), POD),),
                    "s",
                ),
                Panel(
                    "Between two tokens, p95",
                    "As the engine measures it.",
                    ((quantile(0.95, "vllm:inter_token_latency_seconds", OF_POD), POD),),
                    "s",
                ),
                Panel(
                    "Time in the queue, p95",
                    "Until the engine begins.",
                    ((quantile(0.95, "vllm:request_queue_time_seconds", OF_POD), POD),),
                    "s",
                ),
                Panel(
                    "KV cache",
                    "Share in use.",
                    ((f"max by ({OF_POD}) ({chosen('vllm:kv_cache_usage_perc')})", POD),),
                    "percentunit",
                    most=1,
                ),
                Panel(
                    "Preemptions",
                    "Requests that lost their cache to others, a second: they are computed again.",
                    ((rate("vllm:num_preemptions_total", OF_POD), POD),),
                ),
                Panel(
                    "Tokens",
                    "Read and written, a second.",
                    (
                        (rate("vllm:prompt_tokens_total", OF_POD), f"{POD} read"),
                        (rate("vllm:generation_tokens_total", OF_POD), f"{POD} written"),
                    ),
                ),
                Panel(
                    "How the engine ended requests",
                    "A second, by reason.",
                    ((rate("vllm:request_success_total", f"{ONE}, finished_reason"), "{{finished_reason}}"),),
                    "reqps",
                ),
                Panel(
                    "Steps",
                    "Iterations a second; none while requests wait is an engine that stands still.",
                    ((rate("vllm:iteration_tokens_total_count", OF_POD), POD),),
                ),
            ),
        ),
    ),
    one=True,
)
