"""Configures the local cluster's Prometheus from the PodMonitors, ServiceMonitors and PrometheusRules that are in it.

On clusters in production the Prometheus operator does this; here a loop of three LISTs does, so that a chart's monitors are
tested against a real Prometheus. It reads the fields of FIELDS; a monitor with any other is left out, with a line in the log,
so that a test cannot pass on something that was silently ignored. Standard library only: it runs before any environment is made.
"""

import argparse
import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Object = dict[str, Any]  # JSON as the API server sent it

KINDS = ("podmonitors", "servicemonitors", "prometheusrules")
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


def scrape_configs(pod_monitors: Iterable[Object], service_monitors: Iterable[Object]) -> list[Object]:
    """One scrape config per endpoint of each monitor, without the part that says where the API server is."""
    found = []
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
        config["kubernetes_sd_configs"] = [_discovery(kind, spec.get("namespaceSelector") or {}, meta["namespace"])]
        rules = _pod_rules(spec, endpoint, meta) if kind == "podMonitor" else _service_rules(spec, endpoint)
        config["relabel_configs"] = rules + [_relabeling(r) for r in endpoint.get("relabelings") or []]
        if endpoint.get("metricRelabelings"):
            config["metric_relabel_configs"] = [_relabeling(r) for r in endpoint["metricRelabelings"]]
        configs.append(config)
    return configs


def _discovery(kind: str, selector: Object, own: str) -> Object:
    discovery: Object = {"role": "pod" if kind == "podMonitor" else "endpointslice"}
    if not selector.get("any"):
        discovery["namespaces"] = {"names": selector.get("matchNames") or [own]}
    return discovery


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


def files(objects: dict[str, list[Object]], server: Object) -> dict[str, str]:
    """Name -> content of what Prometheus reads. JSON, which is YAML too. `server`: where discovery finds the API server."""
    configs = scrape_configs(objects["podmonitors"], objects["servicemonitors"])
    for config in configs:
        for discovery in config["kubernetes_sd_configs"]:
            discovery |= server
    rules = {}
    for rule in objects["prometheusrules"]:
        name = f"rules/{rule['metadata']['namespace']}_{rule['metadata']['name']}.yml"
        rules[name] = json.dumps({"groups": rule["spec"].get("groups") or []}, indent=1)
    main = {
        "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": sorted(rules),
        "scrape_configs": [{"job_name": "prometheus", "static_configs": [{"targets": ["127.0.0.1:9090"]}]}, *configs],
    }
    return rules | {"prometheus.yml": json.dumps(main, indent=1)}


def log(text: str) -> None:
    print(time.strftime("%FT%TZ", time.gmtime()), text, file=sys.stderr, flush=True)


class Cluster:
    """Reads the monitors over one kept connection."""

    def __init__(self, server: str, pki: Path) -> None:
        context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self._connection = http.client.HTTPSConnection(urlsplit(server).netloc, timeout=10, context=context)

    def list(self, kind: str) -> list[Object]:
        try:
            self._connection.request("GET", f"/apis/monitoring.coreos.com/v1/{kind}")
            response = self._connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise
        if response.status != 200:
            raise OSError(f"LIST of {kind}: HTTP {response.status}")
        items: list[Object] = json.loads(body)["items"]
        return sorted(items, key=lambda item: (item["metadata"]["namespace"], item["metadata"]["name"]))


def replace(out: Path, wanted: dict[str, str]) -> bool:
    """Writes what differs and takes away old rules; true if Prometheus must read again. What promtool refuses stays out."""
    old = {str(path.relative_to(out)): path.read_text() for path in [*out.glob("rules/*.yml"), *out.glob("prometheus.yml")]}
    if wanted == old:
        return False
    candidate = out / "candidate"
    for name, text in wanted.items():
        path = candidate / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    checked = subprocess.run(["promtool", "check", "config", candidate / "prometheus.yml"], capture_output=True, text=True, check=False)
    if checked.returncode:
        log(f"promtool refuses what the monitors say; the old configuration stays: {checked.stdout}{checked.stderr}")
        return False
    (out / "rules").mkdir(exist_ok=True)
    for name in wanted:
        (candidate / name).replace(out / name)
    for name in set(old) - set(wanted):
        (out / name).unlink()
    return True


def reload(pid_file: Path) -> None:
    os.kill(int(pid_file.read_text().split()[0]), signal.SIGHUP)
    log("Prometheus reads its configuration again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, help="URL of the API server")
    parser.add_argument("--pki", required=True, type=Path, help="folder with ca.crt, admin.crt, admin.key")
    parser.add_argument("--kubeconfig", required=True, help="what Prometheus uses to discover pods")
    parser.add_argument("--out", required=True, type=Path, help="folder for prometheus.yml and rules/")
    parser.add_argument("--prometheus", type=Path, help="pid file of the process to reload")
    parser.add_argument("--once", action="store_true", help="write the configuration and end")
    arguments = parser.parse_args()
    cluster = Cluster(arguments.server, arguments.pki)
    while True:
        try:
            objects = {kind: cluster.list(kind) for kind in KINDS}
            if replace(arguments.out, files(objects, {"kubeconfig_file": arguments.kubeconfig})) and arguments.prometheus:
                reload(arguments.prometheus)
        except OSError as error:
            if arguments.once:
                raise
            log(f"{type(error).__name__}: {error}")
        if arguments.once:
            return
        time.sleep(2)


if __name__ == "__main__":
    main()
