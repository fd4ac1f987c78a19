"""Writes charts/tuneloop/dashboards/*.json. loop.json, which follows one demo from end to end, is written by hand."""

from __future__ import annotations

import json
from pathlib import Path

from dev.dashboards.fleets import FLEET, WATCHING
from dev.dashboards.models import MODEL
from dev.dashboards.panels import Dashboard, render
from dev.dashboards.versions import ADAPTERS, CANARY

FOLDER = Path(__file__).parents[2] / "charts" / "tuneloop" / "dashboards"
DASHBOARDS = (FLEET, MODEL, CANARY, ADAPTERS, WATCHING)


def written(dashboard: Dashboard) -> str:
    return json.dumps(render(dashboard), indent=1) + "\n"


if __name__ == "__main__":
    for described in DASHBOARDS:
        (FOLDER / f"{described.name}.json").write_text(written(described))
