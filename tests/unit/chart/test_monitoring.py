"""Dashboard and alerts query nothing that nobody exposes."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from dev.dashboards.__main__ import DASHBOARDS, written
from tests.monitoring import CHART, Query, alerts, dashboards, metrics_of, operands, queries

from tuneloop_gateway.contract import Metric
from tuneloop_operator.cluster.cache import Cache
from tuneloop_operator.runtime import metrics as operator_metrics
from tuneloop_operator.runtime import operator as runtime_operator
from tuneloop_trainer import metrics as trainer_metrics

ROOT = Path(__file__).parents[3]

# Of vLLM 0.22 to 0.32 (vllm/v1/metrics/loggers.py), as far as they are queried.
ENGINE = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:iteration_tokens_total_count",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
}
# What earlier releases had, and dashboards of others still ask for.
REMOVED = {
    "vllm:gpu_cache_usage_perc",
    "vllm:cpu_cache_usage_perc",
    "vllm:gpu_prefix_cache_queries_total",
    "vllm:gpu_prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_hit_rate",
    "vllm:cpu_prefix_cache_hit_rate",
    "vllm:num_requests_swapped",
    "vllm:time_per_output_token_seconds_bucket",
    "vllm:num_preemptions",
}


def gateway_names() -> set[str]:
    """A name of the contract with every ending that its type may give it; what it is exposed as is tested in the gateway's tests."""
    names = {value for name, value in vars(Metric).items() if not name.startswith("_") and isinstance(value, str)}
    return {name + ending for name in names for ending in ("", "_total", "_bucket", "_sum", "_count")}


def operator_names() -> set[str]:
    """Samples of everything that the operator registers."""
    metrics = operator_metrics.Metrics()
    for name in re.findall(r'watch_number\(\s*"(\w+)"', Path(runtime_operator.__file__).read_text()):
        metrics.watch_number(name, "A number.", lambda: 0.0)
    objects = operator_metrics.Objects(Cache(), dict)
    families = [*metrics.registry.collect(), *objects.collect()]
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {family.name + ending for family in families for ending in endings[family.type]}


KNOWN = ENGINE | gateway_names() | operator_names() | set(trainer_metrics.GAUGES) | {trainer_metrics.INFO, trainer_metrics.PHASES}


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.place)
def test_every_queried_metric_is_exposed_by_someone(query: Query) -> None:
    names = metrics_of(query.expression)
    assert names
    assert not names & REMOVED
    assert names <= KNOWN


def test_no_removed_name_is_among_the_known() -> None:
    assert not ENGINE & REMOVED


def test_there_are_queries_of_every_component() -> None:
    names = set().union(*(metrics_of(query.expression) for query in queries()))
    for prefix in ("tuneloop_operator_", "tuneloop_trainer_", "tuneloop_gateway_", "tuneloop_drift_", "tuneloop_feedback_", "vllm:"):
        assert any(name.startswith(prefix) for name in names), prefix


def test_an_unknown_metric_would_be_found() -> None:
    assert metrics_of('sum by (le) (rate(no_such_metric_total{a="b"}[5m])) or vector(0)') == {"no_such_metric_total"}
    assert "no_such_metric_total" not in KNOWN
    assert "tuneloop_operator_no_such" not in KNOWN


def test_operands_of_an_alert_lack_the_comparison() -> None:
    assert operands('(a{x=">"} or 0 * b) > 0 and sum by (p) (rate(c[5m])) == 0') == ['(a{x=">"} or 0 * b)', "sum by (p) (rate(c[5m]))"]


def test_every_alert_says_what_happened_how_bad_it_is_and_what_to_do() -> None:
    runbooks = (ROOT / "docs" / "runbooks.md").read_text().lower()
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")  # type: ignore[index]
        assert str(rule["annotations"]["summary"]).endswith(".")  # type: ignore[index]
        page, _, anchor = str(rule["annotations"]["runbook"]).partition("#")  # type: ignore[index]
        assert page == "docs/runbooks.md"
        assert f"\n## {anchor}\n" in runbooks


@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda dashboard: dashboard["uid"])
def test_panels_have_a_description_an_id_and_a_place_of_their_own(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] == "row" or (panel["description"] and panel["targets"])
        place = panel["gridPos"]
        cells = set(product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])))
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_there_is_a_dashboard_for_each_purpose_and_none_is_written_otherwise_than_described() -> None:
    found = {path.stem: path.read_text() for path in (CHART / "dashboards").glob("*.json")}
    assert set(found) == {"loop", "fleet", "model", "canary", "adapters", "feedback"}
    assert {dashboard.name: written(dashboard) for dashboard in DASHBOARDS} == {n: t for n, t in found.items() if n != "loop"}
    uids = [dashboard["uid"] for dashboard in dashboards()]
    assert len(set(uids)) == len(uids)
