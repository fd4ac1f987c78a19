"""Fixtures of the tests on a real API server, which has no node, so that they play the kubelet's part undisturbed.

`make test` runs them beside tests on real pods: KUBECONFIG is another one for the time of each test here. With CLUSTER=current it
stays what it is. Each test gets a namespace of its own, and `operator` runs the operator on it alone.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster.faults import FaultProxy
from tests.cluster.harness import ROOT, Api, OperatorProcess, Play, wait_for

Start = Callable[..., OperatorProcess]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


def cluster(*arguments: str) -> str:
    return subprocess.run([ROOT / "dev" / "cluster" / "cluster", *arguments], check=True, capture_output=True, text=True).stdout.strip()


@functools.cache
def environment() -> dict[str, str]:
    """Starts the control plane where it is not running."""
    cluster("up", "--control-plane-only")
    return {"KUBECONFIG": cluster("kubeconfig", "--control-plane-only"), "PATH": f"{cluster('bin')}:{os.environ['PATH']}"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Around fixtures of every scope too. pytest calls this for the tests of all folders."""
    with pytest.MonkeyPatch.context() as patch:
        if Path(__file__).parent in item.path.parents and os.environ.get("CLUSTER") != "current":
            for name, value in environment().items():
                patch.setenv(name, value)
        return (yield)


@pytest.fixture(scope="session")
def cluster_kubeconfig() -> str:
    return os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")


@pytest.fixture(scope="session")
def api(cluster_kubeconfig: str) -> Api:
    """The API server, with the CRDs installed."""
    api = Api(cluster_kubeconfig)
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        install(api, yaml.safe_load(path.read_text()))
    return api


def install(api: Api, crd: dict[str, Any]) -> None:
    """Applies a CRD and waits until it is served."""
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}"
    api.call("PATCH", f"{path}?fieldManager=test-user&force=true", crd, "application/apply-patch+yaml")
    spec = crd["spec"]
    collection = f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}"
    wait_for(lambda: _is_served(api, path, collection), 30, f"{spec['names']['kind']} to be served")


def _is_served(api: Api, path: str, collection: str) -> bool:
    conditions = (api.call("GET", path).get("status") or {}).get("conditions") or []  # null at first, as Go writes an empty list
    if not any(c["type"] == "Established" and c["status"] == "True" for c in conditions):
        return False
    try:
        api.call("GET", collection + "?limit=1")
    except Exception as error:
        raise AssertionError(str(error)) from error
    return True


@contextmanager
def fresh_namespace(api: Api, about: str) -> Iterator[str]:
    """A namespace that is deleted afterwards."""
    name = f"test-{hashlib.sha256(f'{about} {os.getpid()}'.encode()).hexdigest()[:10]}"
    api.call("POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    api.call("DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture
def namespace(api: Api, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh namespace, deleted afterwards."""
    with fresh_namespace(api, request.node.nodeid) as name:
        yield name


@pytest.fixture(scope="module")
def shared_operator(api: Api, cluster_kubeconfig: str, request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Start]:
    """Starts one operator for all tests of a module, on all namespaces: `shared_operator(module=...)`."""
    with fresh_namespace(api, request.node.nodeid) as name:
        process = OperatorProcess(cluster_kubeconfig, name, tmp_path_factory.mktemp("operator") / "shared.log", "shared")
        process.environment["TUNELOOP_WATCH_NAMESPACES"] = ""

        def start(module: str = "tuneloop_operator", **more: str) -> OperatorProcess:
            process.module = module
            process.environment |= more
            return process.start()

        yield start
        process.stop()


@pytest.fixture(scope="session")
def widgets(api: Api) -> None:
    """The kind of `toy`. An operator of theirs watches all namespaces: tests that use it share the xdist group `widgets`."""
    from tests.cluster.toy import CRD

    install(api, CRD)


@pytest.fixture
def proxy(cluster_kubeconfig: str, tmp_path: Path) -> Iterator[FaultProxy]:
    """Leads an operator to the API server, and can do it harm: `start_operator(kubeconfig=proxy.kubeconfig)`."""
    with FaultProxy(cluster_kubeconfig, tmp_path) as proxy:
        yield proxy


@pytest.fixture
def play(api: Api, namespace: str) -> Play:
    """Plays scheduler and kubelet in the namespace."""
    return Play(api, namespace)


@pytest.fixture
def start_operator(cluster_kubeconfig: str, namespace: str, tmp_path: Path) -> Iterator[Start]:
    """Starts operators on the namespace: `start_operator(identity="operator-b", TUNELOOP_WORKERS="2")`. All are stopped at the end."""
    started: list[OperatorProcess] = []

    def start(identity: str = "operator-a", wait: bool = True, kubeconfig: str = cluster_kubeconfig, **more: str) -> OperatorProcess:
        process = OperatorProcess(kubeconfig, namespace, tmp_path / f"{identity}.log", identity, **more)
        started.append(process)
        return process.start(wait)

    yield start
    for process in started:
        process.stop()
        print(f"--- {process.log.name}\n{process.log.read_text()[-6000:]}")  # pytest shows it where the test failed


@pytest.fixture
def operator(start_operator: Start) -> OperatorProcess:
    """The operator, running on the namespace."""
    return start_operator()
