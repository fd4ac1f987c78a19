"""PromQL of the chosen deployments, in the forms that panels need. None is empty for want of trouble."""

from __future__ import annotations

CHOSEN = '{namespace=~"$namespace",deployment=~"$deployment"}'
NAMED = '{namespace=~"$namespace",name=~"$deployment"}'
HERE = '{namespace=~"$namespace"}'
RATE = "[$__rate_interval]"
ALWAYS = f"0 * sum by (namespace, deployment) (tuneloop_gateway_config_generation{CHOSEN})"
"""A zero for each deployment: what has not happened yet is no missing data."""
REVISIONS = f"0 * sum by (namespace, deployment, revision) (tuneloop_gateway_revision_weight_percent{CHOSEN})"


def chosen(metric: str, **labels: str) -> str:
    """A metric of the chosen deployments."""
    return metric + CHOSEN[:-1] + "".join(f',{name}="{value}"' for name, value in labels.items()) + "}"


def rate(metric: str, by: str, **labels: str) -> str:
    return f"sum by ({by}) (rate({chosen(metric, **labels)}{RATE}))"


def quantile(share: float, metric: str, by: str) -> str:
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', f'{by}, le')})"


def failing(by: str) -> str:
    """Share of the requests that ended with a 5xx."""
    every = rate("tuneloop_gateway_requests_total", by)
    return f"({rate('tuneloop_gateway_requests_total', by, code='5xx')} or 0 * {every}) / {every}"


BY_VERSION = (
    f" * on (namespace, deployment, revision) group_left (version) (0 * max by (namespace, deployment, revision, version)"
    f" (tuneloop_gateway_revision_weight_percent{CHOSEN}) + 1)"
)


def of_versions(metric: str, by: str, **labels: str) -> str:
    """A rate by the ModelVersion's number instead of the revision's name: two adapters of one engine are two versions."""
    return f"sum by ({by}) (rate({chosen(metric, **labels)}{RATE}){BY_VERSION})"


def outcome(name: str, of: str) -> str:
    """Share of a window's requests by revision, while a canary runs."""
    by = "namespace, deployment, revision"
    counted, every = (f"sum by ({by}) ({chosen('tuneloop_gateway_canary_outcomes', outcome=o)})" for o in (name, of))
    return f"{counted} / {every} or {REVISIONS}"


VERSIONS = f"0 * max by (namespace, deployment, version) (tuneloop_gateway_revision_weight_percent{CHOSEN})"
WHICH, REVISION, POD, VERSION = "{{namespace}}/{{deployment}}", "{{revision}}", "{{pod}}", "{{deployment}} v{{version}}"
ONE, OF_REVISION, OF_POD = "namespace, deployment", "namespace, deployment, revision", "namespace, deployment, pod"
FIRST_BYTE, REQUEST, BETWEEN = (f"tuneloop_gateway_{name}_seconds" for name in ("time_to_first_byte", "request", "inter_token"))
THUMBS_DOWN = f"{rate('tuneloop_feedback_total', ONE, kind='rating', value='down')} / {rate('tuneloop_feedback_total', ONE, kind='rating')}"
