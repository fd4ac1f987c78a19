"""The chart's Grafana dashboards, described once: `python -m dev.dashboards` writes them as JSON."""
