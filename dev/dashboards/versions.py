"""A canary beside the stable revision, check by check; versions and adapters beside each other."""

from __future__ import annotations

from dev.dashboards.panels import Dashboard, Panel, Row
from dev.dashboards.queries import (
    BETWEEN,
    FIRST_BYTE,
    HERE,
    NAMED,
    OF_REVISION,
    ONE,
    REVISION,
    REVISIONS,
    VERSION,
    VERSIONS,
    chosen,
    failing,
    of_versions,
    outcome,
    quantile,
)

PROBES = Panel(
    "Probe items",
    "Answered as the evaluator did, before traffic.",
    ((f"min by ({OF_REVISION}) ({chosen('tuneloop_gateway_probe_agreement_ratio')}) or {REVISIONS}", REVISION),),
    "percentunit",
    most=1,
)
CANARY = Dashboard(
    "canary",
    "canary and stable",
    (
        Row(
            "The step",
            (
                Panel(
                    "Share of the traffic",
                    "By revision.",
                    (
                        (
                            f"max by ({OF_REVISION}, version) ({chosen('tuneloop_gateway_revision_weight_percent')})",
                            f"{REVISION} v{{{{version}}}}",
                        ),
                    ),
                    "percent",
                    most=100,
                ),
                Panel(
                    "Requests of the step",
                    "What the checks have counted since the step began; 0 where none runs.",
                    (
                        (
                            f"sum by ({OF_REVISION}) ({chosen('tuneloop_gateway_canary_outcomes', outcome='requests')}) or {REVISIONS}",
                            REVISION,
                        ),
                    ),
                ),
                PROBES,
            ),
        ),
        Row(
            "The checks: canary beside stable",
            (
                Panel(
                    "Errors",
                    "5xx, abort, error, broken streams; also those that another replica answered then.",
                    ((outcome("errors", "requests"), REVISION),),
                    "percentunit",
                ),
                Panel(
                    "Time to first byte, p95", "From arrival at the gateway.", ((quantile(0.95, FIRST_BYTE, OF_REVISION), REVISION),), "s"
                ),
                Panel(
                    "Between two tokens, p95",
                    "Of streams, on average over an answer.",
                    ((quantile(0.95, BETWEEN, OF_REVISION), REVISION),),
                    "s",
                ),
                Panel("Refusals", "Answers that begin as refusals do.", ((outcome("refused", "answers"), REVISION),), "percentunit"),
                Panel("Empty answers", "Nothing but white space.", ((outcome("empty", "answers"), REVISION),), "percentunit"),
                Panel("Repetition", "Answers that repeat themselves.", ((outcome("repetitive", "answers"), REVISION),), "percentunit"),
                Panel("Cut short", "Ended by the limit on tokens.", ((outcome("cut_short", "answers"), REVISION),), "percentunit"),
                Panel("Thumbs down", "Of the step's answers, one of each key.", ((outcome("down", "answers"), REVISION),), "percentunit"),
                Panel(
                    "Failing share",
                    "By the metrics of all requests, not of the step alone.",
                    ((failing(OF_REVISION), REVISION),),
                    "percentunit",
                ),
            ),
        ),
    ),
    one=True,
)

ADAPTERS = Dashboard(
    "adapters",
    "versions and adapters",
    (
        Row(
            "By version: an adapter is a version of its model",
            (
                Panel(
                    "Versions",
                    "By approval.",
                    (
                        (
                            f"sum by (model, approval) (max by (namespace, model, approval) (tuneloop_operator_modelversions{HERE}))",
                            "{{model}} {{approval}}",
                        ),
                    ),
                    kind="stat",
                ),
                Panel(
                    "Serving version",
                    "The version that takes the traffic.",
                    ((f"max by (namespace, name) (tuneloop_operator_modeldeployment_version{NAMED})", "{{namespace}}/{{name}}"),),
                    kind="stat",
                ),
                Panel(
                    "Share of the traffic",
                    "By version.",
                    ((f"max by ({ONE}, version) ({chosen('tuneloop_gateway_revision_weight_percent')})", VERSION),),
                    "percent",
                    most=100,
                ),
                Panel("Requests", "A second.", ((of_versions("tuneloop_gateway_requests_total", f"{ONE}, version"), VERSION),), "reqps"),
                Panel(
                    "Failing requests",
                    "5xx, a second.",
                    (
                        (
                            f"{of_versions('tuneloop_gateway_requests_total', f'{ONE}, version', code='5xx')} or {VERSIONS}",
                            VERSION,
                        ),
                    ),
                    "reqps",
                ),
                Panel(
                    "Tokens",
                    "A second, as the engines report them.",
                    ((of_versions("tuneloop_gateway_tokens_total", f"{ONE}, version, kind"), f"{VERSION} {{{{kind}}}}"),),
                ),
                Panel(
                    "Time to first byte, p95",
                    "From arrival at the gateway.",
                    ((f"histogram_quantile(0.95, {of_versions(f'{FIRST_BYTE}_bucket', f'{ONE}, version, le')})", VERSION),),
                    "s",
                ),
                Panel(
                    "Between two tokens, p95",
                    "Of streams.",
                    ((f"histogram_quantile(0.95, {of_versions(f'{BETWEEN}_bucket', f'{ONE}, version, le')})", VERSION),),
                    "s",
                ),
                PROBES,
            ),
        ),
    ),
)
