"""Every expression of the dashboard and of the rules has an answer from the real Prometheus."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request

from dev.demo.story import PROMETHEUS, Story


def test_no_expression_of_the_dashboard_or_the_rules_is_empty(closed: Story) -> None:
    from tests.unit.chart.expressions import expressions

    empty = []
    for where, expression in expressions(namespace=closed.space.name):
        url = f"{PROMETHEUS}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            if not json.load(answer)["data"]["result"]:
                empty.append((where, expression))
    assert not empty
