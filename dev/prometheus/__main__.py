"""Keeps the local cluster's Prometheus at what the cluster holds: monitors, rules, and the pods to scrape.

A loop of a few LISTs, so that a chart's monitors are tested against a real Prometheus without its operator. Standard library
only: it runs before any environment is made.
"""

import argparse
import functools
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import monitors, targets

Object = dict[str, Any]

MONITORS = {kind: f"/apis/monitoring.coreos.com/v1/{kind}" for kind in ("podmonitors", "servicemonitors", "prometheusrules")}
TARGETS = {"pods": "/api/v1/pods", "services": "/api/v1/services", "slices": "/apis/discovery.k8s.io/v1/endpointslices"}
SECONDS = 2  # from one look to the next
PATIENCE = 30  # of the first look: the API server answers 429 while it prepares for a new kind


def log(text: str) -> None:
    print(time.strftime("%FT%TZ", time.gmtime()), text, file=sys.stderr, flush=True)


complain = functools.cache(log)  # what stays wrong is said once


class Cluster:
    """Reads lists over one kept connection."""

    def __init__(self, server: str, pki: Path) -> None:
        context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self._connection = http.client.HTTPSConnection(urlsplit(server).netloc, timeout=10, context=context)

    def list(self, path: str) -> list[Object]:
        try:
            self._connection.request("GET", f"{path}?resourceVersion=0")  # from the API server's cache
            response = self._connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise
        if response.status != 200:
            raise OSError(f"GET {path}: HTTP {response.status}")
        items: list[Object] = json.loads(body)["items"]
        return sorted(items, key=lambda item: (item["metadata"]["namespace"], item["metadata"]["name"]))


class Configuration:
    """What Prometheus reads, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._refused: dict[str, str] = {}
        for part in ("rules", "targets", "candidate/rules"):
            (folder / part).mkdir(parents=True, exist_ok=True)

    def write_targets(self, name: str, groups: list[Object]) -> None:
        """Prometheus sees the change by itself."""
        text = json.dumps(groups, indent=1)
        path = self._folder / "targets" / f"{name}.json"
        if not path.exists() or path.read_text() != text:
            new = path.with_suffix(".new")
            new.write_text(text)
            new.replace(path)

    def write(self, wanted: dict[str, str]) -> bool:
        """True if Prometheus must read again. What promtool refuses stays out."""
        old = {str(path.relative_to(self._folder)): path.read_text() for path in self._files()}
        if wanted in (old, self._refused):
            return False
        candidate = self._folder / "candidate"
        for name, text in wanted.items():
            (candidate / name).write_text(text)
        check = ["promtool", "check", "config", str(candidate / "prometheus.yml")]
        checked = subprocess.run(check, capture_output=True, text=True, check=False)
        if checked.returncode:
            self._refused = wanted
            log(f"promtool refuses what the monitors say; the old configuration stays: {checked.stdout}{checked.stderr}")
            return False
        for name in wanted:
            (candidate / name).replace(self._folder / name)
        for name in old.keys() - wanted:
            (self._folder / name).unlink()
        return True

    def _files(self) -> list[Path]:
        return [*self._folder.glob("rules/*.yml"), *self._folder.glob("prometheus.yml")]


def update(cluster: Cluster, configuration: Configuration) -> bool:
    found = {name: cluster.list(path) for name, path in TARGETS.items()}
    configuration.write_targets("pods", targets.pods(found["pods"]))
    configuration.write_targets("services", targets.services(found["services"], found["slices"], found["pods"]))
    return configuration.write(monitors.files({kind: cluster.list(path) for kind, path in MONITORS.items()}, complain))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, help="URL of the API server")
    parser.add_argument("--pki", required=True, type=Path, help="folder with ca.crt, admin.crt, admin.key")
    parser.add_argument("--out", required=True, type=Path, help="folder for prometheus.yml, rules/ and targets/")
    parser.add_argument("--prometheus", type=Path, help="pid file of the process to reload; without it, one pass only")
    arguments = parser.parse_args()
    cluster, configuration = Cluster(arguments.server, arguments.pki), Configuration(arguments.out)
    end = time.monotonic() + PATIENCE
    while True:
        try:
            if update(cluster, configuration) and arguments.prometheus:
                os.kill(int(arguments.prometheus.read_text().split()[0]), signal.SIGHUP)
                log("Prometheus reads its configuration again")
            if arguments.prometheus is None:
                return
        except (OSError, http.client.HTTPException) as error:
            if arguments.prometheus is None and time.monotonic() > end:
                raise
            log(f"{type(error).__name__}: {error}")
        time.sleep(SECONDS)


if __name__ == "__main__":
    main()
