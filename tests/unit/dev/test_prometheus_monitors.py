"""The local cluster's Prometheus scrapes what monitors describe, and nothing that they do not."""

import json
import re
from typing import Any

import pytest
from dev.prometheus import monitors, targets

Object = dict[str, Any]


PORTS = [{"name": "http", "containerPort": 8080}, {"name": "metrics", "containerPort": 9090}]


def make_pod(name: str = "gateway-1", namespace: str = "team", ip: str = "10.244.0.7", **labels: str) -> Object:
    return {
        "metadata": {"name": name, "namespace": namespace, "uid": f"uid-{name}", "labels": {"app": "gateway"} | labels},
        "spec": {"containers": [{"name": "main", "ports": PORTS}]},
        "status": {"phase": "Running", "podIP": ip},
    }


def make_monitor(endpoint: Object | None = None, **spec: Any) -> Object:
    wanted = {"selector": {"matchLabels": {"app": "gateway"}}, "podMetricsEndpoints": [endpoint or {"port": "metrics"}]} | spec
    return {"metadata": {"name": "m", "namespace": "team"}, "spec": wanted}


def scraped(monitor: Object, pods: list[Object]) -> list[dict[str, str]]:
    """The labels of every target that stays after relabelling, as Prometheus computes them."""
    (config,) = monitors.scrape_configs([monitor], [], pytest.fail)
    found = (relabel(config["relabel_configs"], group["labels"] | {"__address__": group["targets"][0]}) for group in targets.pods(pods))
    return [labels for labels in found if labels is not None]


def relabel(rules: list[Object], labels: dict[str, str]) -> dict[str, str] | None:
    labels = dict(labels)
    for rule in rules:
        value = ";".join(labels.get(name, "") for name in rule.get("source_labels", []))
        match = re.fullmatch(rule.get("regex", "(.*)"), value)
        action = rule.get("action", "replace")
        if (action == "keep" and not match) or (action == "drop" and match):
            return None
        if action == "replace" and match:
            labels[rule["target_label"]] = match.expand(rule.get("replacement", "$1").replace("${1}", r"\1").replace("$1", r"\1"))
    return {name: value for name, value in labels.items() if not name.startswith("__meta")}


def test_a_pod_monitor_scrapes_the_named_port_of_the_pods_it_selects() -> None:
    (labels,) = scraped(make_monitor(), [make_pod(), make_pod("other", ip="10.244.0.8", app="trainer")])
    assert labels == {
        "__address__": "10.244.0.7:9090",
        "namespace": "team",
        "pod": "gateway-1",
        "container": "main",
        "endpoint": "metrics",
        "job": "team/m",
    }


@pytest.mark.parametrize(
    ("selector", "namespaces"),
    [(None, ["team"]), ({"matchNames": ["team", "prod"]}, ["team", "prod"]), ({"any": True}, ["team", "prod", "dev"])],
)
def test_a_monitor_reaches_the_namespaces_it_names_and_its_own_by_default(selector: Object | None, namespaces: list[str]) -> None:
    monitor = make_monitor() if selector is None else make_monitor(namespaceSelector=selector)
    found = scraped(monitor, [make_pod(namespace=namespace) for namespace in ("team", "prod", "dev")])
    assert [labels["namespace"] for labels in found] == namespaces


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ({"key": "tier", "operator": "In", "values": ["a", "b"]}, ["one"]),
        ({"key": "tier", "operator": "NotIn", "values": ["a"]}, ["two", "three"]),
        ({"key": "tier", "operator": "Exists"}, ["one", "two"]),
        ({"key": "tier", "operator": "DoesNotExist"}, ["three"]),
    ],
)
def test_label_expressions_select_as_kubernetes_does(expression: Object, names: list[str]) -> None:
    pods = [make_pod("one", tier="a"), make_pod("two", tier="c"), make_pod("three")]
    found = scraped(make_monitor(selector={"matchExpressions": [expression]}), pods)
    assert [labels["pod"] for labels in found] == names


def test_a_finished_pod_is_not_scraped() -> None:
    pod = make_pod()
    pod["status"]["phase"] = "Succeeded"
    assert scraped(make_monitor(), [pod]) == []


def test_a_monitor_with_an_unknown_field_is_left_out_and_named() -> None:
    said: list[str] = []
    assert monitors.scrape_configs([make_monitor({"port": "metrics", "tlsConfig": {}})], [], said.append) == []
    assert "team/m" in said[0]
    assert "tlsConfig" in said[0]


def test_settings_and_relabelings_of_an_endpoint_are_taken_over() -> None:
    relabeling = {"sourceLabels": ["__meta_kubernetes_pod_label_v"], "targetLabel": "version", "action": "Replace"}
    endpoint = {"port": "metrics", "path": "/m", "interval": "1s", "honorLabels": True, "relabelings": [relabeling]}
    (config,) = monitors.scrape_configs([make_monitor(endpoint)], [], pytest.fail)
    assert (config["metrics_path"], config["scrape_interval"], config["honor_labels"]) == ("/m", "1s", True)
    (labels,) = scraped(make_monitor(endpoint), [make_pod(v="3")])
    assert labels["version"] == "3"


def test_a_service_monitor_scrapes_the_endpoints_behind_a_service() -> None:
    service = {"metadata": {"name": "op", "namespace": "team", "labels": {"app": "op"}}}
    piece = {
        "metadata": {"name": "op-x", "namespace": "team", "labels": {"kubernetes.io/service-name": "op"}},
        "ports": [{"name": "metrics", "port": 9090}],
        "endpoints": [{"addresses": ["10.244.0.7"], "targetRef": {"kind": "Pod", "name": "gateway-1"}}],
    }
    spec = {"selector": {"matchLabels": {"app": "op"}}, "endpoints": [{"port": "metrics"}]}
    monitor = {"metadata": {"name": "m", "namespace": "team"}, "spec": spec}
    (config,) = monitors.scrape_configs([], [monitor], pytest.fail)
    (group,) = targets.services([service], [piece], [make_pod()])
    labels = relabel(config["relabel_configs"], group["labels"] | {"__address__": group["targets"][0]})
    assert labels == {
        "__address__": "10.244.0.7:9090",
        "namespace": "team",
        "service": "op",
        "job": "op",
        "pod": "gateway-1",
        "container": "main",
        "endpoint": "metrics",
    }


def test_rules_become_files_that_the_configuration_names() -> None:
    rule = {"metadata": {"name": "r", "namespace": "team"}, "spec": {"groups": [{"name": "g", "rules": []}]}}
    written = monitors.files({"podmonitors": [], "servicemonitors": [], "prometheusrules": [rule]}, pytest.fail)
    assert json.loads(written["prometheus.yml"])["rule_files"] == ["rules/team_r.yml"]
    assert json.loads(written["rules/team_r.yml"]) == {"groups": [{"name": "g", "rules": []}]}
