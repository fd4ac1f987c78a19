"""Every query of the chart's dashboards and alerts, for the tests that ask whether their metrics exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[1] / "charts" / "tuneloop"
VARIABLES = {"$namespace": ".*", "$deployment": ".*", "$__rate_interval": "5m"}
COMPARISON = re.compile(r"(==|!=|>=|<=|>|<)")
METRIC = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
# Words of PromQL that look like metrics.
WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless", "offset", "bool"}
WORDS |= {"sum", "min", "max", "avg", "count", "rate", "increase", "delta", "vector", "absent", "histogram_quantile"}


@dataclass(frozen=True)
class Query:
    """One expression that must have a result while the loop runs, and where it stands."""

    place: str
    expression: str


def dashboard_queries() -> Iterator[Query]:
    """Each target of each panel of each dashboard, with the variables filled in."""
    for dashboard in dashboards():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"]
                for name, value in VARIABLES.items():
                    expression = expression.replace(name, value)
                yield Query(f"{dashboard['uid']}, panel {panel['title']}", expression)


def dashboards() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((CHART / "dashboards").glob("*.json"))]


def alerts() -> list[dict[str, object]]:
    rules = yaml.safe_load((CHART / "rules" / "loop.yaml").read_text())
    return [rule for group in rules["groups"] for rule in group["rules"]]


def alert_queries() -> Iterator[Query]:
    """What the alerts compare, without the comparison: an alert that does not fire has no result, its operands have."""
    for rule in alerts():
        for operand in operands(str(rule["expr"])):
            yield Query(f"alert {rule['alert']}", operand)


def queries() -> list[Query]:
    """All of them: none may be empty or unknown to the Prometheus that watched the loop."""
    return [*dashboard_queries(), *alert_queries()]


def operands(expression: str) -> list[str]:
    """The sides of the top-level `and`s and comparisons that are no plain numbers."""
    parts = [side for part in _split(expression, re.compile(r"\band\b")) for side in _split(part, COMPARISON)]
    return [part for part in parts if not re.fullmatch(r"[0-9.]+", part)]


def _split(expression: str, separator: re.Pattern[str]) -> list[str]:
    """Parts between separators that stand outside of parentheses, braces and quotes."""
    parts, depth, begin, place = [], 0, 0, 0
    while place < len(expression):
        character = expression[place]
        found = separator.match(expression, place) if depth == 0 else None
        if found:
            parts.append(expression[begin:place].strip())
            place = begin = found.end()
            continue
        if character == '"':
            place = expression.index('"', place + 1)
        depth += (character in "({[") - (character in ")}]")
        place += 1
    return [part for part in [*parts, expression[begin:].strip()] if part]


def metrics_of(expression: str) -> set[str]:
    """Names of metrics in an expression: names that are no words of the language, no labels and no functions."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}", "", bare)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    return {name for name in METRIC.findall(bare) if name not in WORDS}
