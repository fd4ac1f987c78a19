"""PodMonitors, ServiceMonitors and PrometheusRules as configuration of Prometheus.

It knows the fields of FIELDS. A monitor with any other is left out, with a line in the log, so that a test cannot pass on
something that was silently ignored.
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

Object = dict[str, Any]  # JSON as the API server sent it

INTERVAL = "5s"  # of monitors that name none

# field of an endpoint -> setting of a scrape config
SETTINGS = {
    "path": "metrics_path",
    "interval": "scrape_interval",
    "scrapeTimeout": "scrape_timeout",
    "scheme": "scheme",
    "params": "params",
    "honorLabels": "honor_labels",
    "honorTimestamps": "honor_timestamps",
}
FIELDS = {
    "monitor": {"selector", "namespaceSelector", "podMetricsEndpoints", "endpoints", "podTargetLabels", "targetLabels", "jobLabel"},
    "endpoint": {*SETTINGS, "port", "portNumber", "relabelings", "metricRelabelings", "filterRunning"},
    "relabeling": {"sourceLabels", "separator", "targetLabel", "regex", "modulus", "replacement", "action"},
}


class NotUnderstood(Exception):
    """A monitor asks for something that is not translated here."""


def scrape_configs(pod_monitors: Iterable[Object], service_monitors: Iterable[Object], log: Callable[[str], None]) -> list[Object]:
    """One scrape config per endpoint of each monitor, on the targets of targets.py."""
    found: list[Object] = []
    for kind, monitors in (("podMonitor", pod_monitors), ("serviceMonitor", service_monitors)):
        for monitor in monitors:
            try:
                found += _of_monitor(kind, monitor)
            except NotUnderstood as error:
                log(f"{kind} {monitor['metadata']['namespace']}/{monitor['metadata']['name']} is left out: {error}")
    return found


def _of_monitor(kind: str, monitor: Object) -> list[Object]:
    spec, meta = monitor["spec"], monitor["metadata"]
    _only("monitor", spec)
    endpoints = spec["podMetricsEndpoints" if kind == "podMonitor" else "endpoints"]
    configs = []
    for number, endpoint in enumerate(endpoints):
        _only("endpoint", endpoint)
        config: Object = {"job_name": f"{kind}/{meta['namespace']}/{meta['name']}/{number}", "scrape_interval": INTERVAL}
        config |= {SETTINGS[field]: value for field, value in endpoint.items() if field in SETTINGS}
        config["file_sd_configs"] = [{"files": [f"targets/{'pods' if kind == 'podMonitor' else 'services'}.json"]}]
        rules = _pod_rules(spec, endpoint, meta) if kind == "podMonitor" else _service_rules(spec, endpoint)
        config["relabel_configs"] = _namespaces(spec, meta) + rules + [_relabeling(r) for r in endpoint.get("relabelings") or []]
        if endpoint.get("metricRelabelings"):
            config["metric_relabel_configs"] = [_relabeling(r) for r in endpoint["metricRelabelings"]]
        configs.append(config)
    return configs


def _namespaces(spec: Object, meta: Object) -> list[Object]:
    selector = spec.get("namespaceSelector") or {}
    if selector.get("any"):
        return []
    names = selector.get("matchNames") or [meta["namespace"]]
    return [_keep(["__meta_kubernetes_namespace"], "|".join(re.escape(name) for name in names))]


def _pod_rules(spec: Object, endpoint: Object, meta: Object) -> list[Object]:
    rules = _selected("__meta_kubernetes_pod", spec["selector"])
    if endpoint.get("filterRunning", True):
        rules.append({"action": "drop", "source_labels": ["__meta_kubernetes_pod_phase"], "regex": "(Failed|Succeeded)"})
    for field, label in (("port", "name"), ("portNumber", "number")):
        if field in endpoint:
            rules.append(_keep([f"__meta_kubernetes_pod_container_port_{label}"], re.escape(str(endpoint[field]))))
    port = endpoint.get("port", endpoint.get("portNumber", ""))
    rules += [_set("job", f"{meta['namespace']}/{meta['name']}"), _set("endpoint", str(port))]
    rules += [_copy(f"__meta_kubernetes_{source}", target) for source, target in POD_LABELS]
    rules += [_copy(f"__meta_kubernetes_pod_label_{_safe(name)}", _safe(name)) for name in spec.get("podTargetLabels") or []]
    if spec.get("jobLabel"):
        rules.append(_copy(f"__meta_kubernetes_pod_label_{_safe(spec['jobLabel'])}", "job"))
    return rules


POD_LABELS = (("namespace", "namespace"), ("pod_container_name", "container"), ("pod_name", "pod"))
SERVICE_LABELS = (*POD_LABELS, ("service_name", "service"), ("service_name", "job"))


def _service_rules(spec: Object, endpoint: Object) -> list[Object]:
    if "portNumber" in endpoint or "port" not in endpoint:
        raise NotUnderstood("an endpoint of a ServiceMonitor needs the name of a port")
    rules = _selected("__meta_kubernetes_service", spec["selector"])
    rules.append(_keep(["__meta_kubernetes_endpointslice_port_name"], re.escape(endpoint["port"])))
    rules += [_copy(f"__meta_kubernetes_{source}", target) for source, target in SERVICE_LABELS]
    rules.append(_set("endpoint", endpoint["port"]))
    for field, owner in (("targetLabels", "service"), ("podTargetLabels", "pod")):
        rules += [_copy(f"__meta_kubernetes_{owner}_label_{_safe(name)}", _safe(name)) for name in spec.get(field) or []]
    if spec.get("jobLabel"):
        rules.append(_copy(f"__meta_kubernetes_service_label_{_safe(spec['jobLabel'])}", "job"))
    return rules


def _selected(owner: str, selector: Object) -> list[Object]:
    """A label selector as rules on the labels that discovery found on `owner`."""
    rules = []
    for name, value in (selector.get("matchLabels") or {}).items():
        rules.append(_keep(_label(owner, name), f"{re.escape(value)};true"))
    for expression in selector.get("matchExpressions") or []:
        labels = _label(owner, expression["key"])
        values = "|".join(re.escape(value) for value in expression.get("values") or [])
        match expression["operator"]:
            case "In":
                rules.append(_keep(labels, f"({values});true"))
            case "NotIn":
                rules.append(_keep(labels, f"({values});true") | {"action": "drop"})
            case "Exists":
                rules.append(_keep(labels[1:], "true"))
            case "DoesNotExist":
                rules.append(_keep(labels[1:], "true") | {"action": "drop"})
            case other:
                raise NotUnderstood(f"operator {other} in a selector")
    return rules


def _label(owner: str, name: str) -> list[str]:
    return [f"{owner}_label_{_safe(name)}", f"{owner}_labelpresent_{_safe(name)}"]


def _safe(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)


def _keep(labels: list[str], regex: str) -> Object:
    return {"action": "keep", "source_labels": labels, "regex": regex}


def _copy(source: str, target: str) -> Object:
    return {"source_labels": [source], "regex": "(.+)", "target_label": target, "replacement": "${1}"}


def _set(target: str, value: str) -> Object:
    return {"target_label": target, "replacement": value}


def _relabeling(rule: Object) -> Object:
    _only("relabeling", rule)
    snake = {re.sub("[A-Z]", lambda m: "_" + m[0].lower(), field): value for field, value in rule.items()}
    return snake | ({"action": snake["action"].lower()} if "action" in snake else {})


def _only(what: str, fields: Object) -> None:
    if unknown := sorted(set(fields) - FIELDS[what]):
        raise NotUnderstood(f"{what} with {', '.join(unknown)}, of which dev/prometheus/monitors.py knows nothing")


def files(objects: dict[str, list[Object]], log: Callable[[str], None]) -> dict[str, str]:
    """Name -> content of what Prometheus reads, from the objects of the three kinds by plural. JSON, which is YAML too."""
    rules = {}
    for rule in objects["prometheusrules"]:
        name = f"rules/{rule['metadata']['namespace']}_{rule['metadata']['name']}.yml"
        rules[name] = json.dumps({"groups": rule["spec"].get("groups") or []}, indent=1)
    main = {
        "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": sorted(rules),
        "scrape_configs": [
            {"job_name": "prometheus", "static_configs": [{"targets": ["127.0.0.1:9090"]}]},
            *scrape_configs(objects["podmonitors"], objects["servicemonitors"], log),
        ],
    }
    return rules | {"prometheus.yml": json.dumps(main, indent=1)}
