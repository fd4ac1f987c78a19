"""Every expression of the dashboard and of the alerts has data in the real Prometheus that watched the run."""

from __future__ import annotations

import json
import time
import urllib.parse
import urllib.request

from dev.demo.story import PROMETHEUS, Story
from tests.monitoring import queries


def test_no_expression_of_the_dashboard_or_the_alerts_is_empty_over_the_run(closed: Story) -> None:
    empty = [f"{query.place}: {query.expression}" for query in queries() if not _has_data(query.expression, since=closed.started)]
    assert not empty


def _has_data(expression: str, since: float) -> bool:
    fields = {"query": expression, "start": since, "end": time.time(), "step": 15}
    with urllib.request.urlopen(f"{PROMETHEUS}/api/v1/query_range?{urllib.parse.urlencode(fields)}", timeout=20) as answer:
        return bool(json.load(answer)["data"]["result"])
