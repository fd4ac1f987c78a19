"""From a short description of a dashboard to Grafana's JSON; panels are laid out from left to right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, HEIGHT = 24, 8


@dataclass(frozen=True)
class Panel:
    """Queries as pairs of an expression and a legend."""

    title: str
    description: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    width: int = 8
    kind: Literal["timeseries", "stat"] = "timeseries"
    most: float | None = None
    """Upper end of the axis."""


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    name: str
    title: str
    rows: tuple[Row, ...]
    one: bool = False
    """Of one deployment; else of all that are chosen."""


def render(dashboard: Dashboard) -> Json:
    panels: list[Json] = []
    y = 0
    for row in dashboard.rows:
        panels.append({"id": len(panels) + 1, "type": "row", "title": row.title, "gridPos": _place(0, y, COLUMNS, 1), "panels": []})
        x, y = 0, y + 1
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y = 0, y + HEIGHT
            panels.append(_panel(panel, len(panels) + 1, _place(x, y, panel.width, HEIGHT)))
            x += panel.width
        y += HEIGHT
    return {
        "uid": f"tuneloop-{dashboard.name}", "title": f"Tuneloop: {dashboard.title}", "tags": ["tuneloop"], "schemaVersion": 39,
        "version": 1, "editable": True, "timezone": "", "refresh": "30s", "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": _variables(dashboard.one)}, "annotations": {"list": []}, "links": [_LINKS], "panels": panels,
    }  # fmt: skip


_LINKS: Json = {"type": "dashboards", "title": "Tuneloop", "tags": ["tuneloop"], "asDropdown": True, "includeVars": True, "keepTime": True}


def _place(x: int, y: int, w: int, h: int) -> Json:
    return {"x": x, "y": y, "w": w, "h": h}


def _panel(panel: Panel, number: int, place: Json) -> Json:
    defaults: Json = {"unit": panel.unit}
    if panel.kind == "timeseries":
        defaults |= {"min": 0} if panel.most is None else {"min": 0, "max": panel.most}
        defaults["custom"] = {"fillOpacity": 5, "lineWidth": 2, "showPoints": "never"}
    targets = [
        {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
        for place, (expression, legend) in enumerate(panel.queries)
    ]
    options: Json = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    if panel.kind == "stat":
        last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        options = {"reduceOptions": last, "colorMode": "value", "textMode": "value_and_name"}
    return {
        "id": number, "type": panel.kind, "title": panel.title, "description": panel.description, "datasource": SOURCE, "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []}, "targets": targets, "options": options,
    }  # fmt: skip


def _variables(one: bool) -> list[Json]:
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}}
    namespaces = "label_values(tuneloop_operator_modeldeployments, namespace)"
    deployments = 'label_values(tuneloop_gateway_config_generation{namespace=~"$namespace"}, deployment)'
    return [source, _variable("namespace", "Namespace", namespaces, one), _variable("deployment", "Deployment", deployments, one)]


def _variable(name: str, label: str, query: str, one: bool) -> Json:
    every: Json = {} if one else {"includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    about = {"name": name, "label": label, "type": "query", "datasource": SOURCE, "definition": query, "refresh": 2, "sort": 1}
    return {**about, "query": {"query": query, "refId": name}, **every}
