"""What `bench.load` runs: an API server that is played, and gateways and engines as processes, ended as the kubelet ends their pods."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from bench.gateway import free_port, gateway_environment

READY_SECONDS = 60
NAMESPACE, DEPLOYMENT = "bench", "bench"


@dataclass
class ApiServer:
    """LIST and WATCH of the ConfigMap and the EndpointSlices, for gateways."""

    port: int = 0
    _objects: dict[str, dict[str, dict[str, Any]]] = field(default_factory=lambda: {"configmaps": {}, "endpointslices": {}})
    _watches: list[tuple[str, asyncio.Queue[bytes]]] = field(default_factory=list)
    _runner: web.AppRunner | None = None

    async def __aenter__(self) -> ApiServer:
        app = web.Application()
        app.router.add_get("/{group:api|apis/discovery.k8s.io}/v1/namespaces/bench/{kind}", self._get)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        self.port = free_port()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _get(self, request: web.Request) -> web.StreamResponse:
        kind = request.match_info["kind"]
        if "watch" not in request.query:
            return web.json_response({"metadata": {"resourceVersion": "1"}, "items": list(self._objects[kind].values())})
        response = web.StreamResponse()
        await response.prepare(request)
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        for item in self._objects[kind].values():  # what changed since the LIST
            queue.put_nowait(_event(item))
        self._watches.append((kind, queue))
        try:
            while request.transport is not None and not request.transport.is_closing():
                await response.write(await queue.get())
        except ConnectionError:
            pass  # its gateway ended
        finally:
            self._watches.remove((kind, queue))
        return response

    def put(self, kind: str, item: dict[str, Any]) -> None:
        self._objects[kind][item["metadata"]["name"]] = item
        for watched, queue in self._watches:
            if watched == kind:
                queue.put_nowait(_event(item))


def _event(item: dict[str, Any]) -> bytes:
    return json.dumps({"type": "MODIFIED", "object": item}).encode() + b"\n"


@dataclass(eq=False)
class Pod:
    """One process, and the port that it answers on."""

    command: tuple[str, ...]
    ready_url: str
    port: int
    environment: dict[str, str]
    log: Path
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Returns when it is ready."""
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(*self.command, env=self.environment, stdout=log, stderr=log)
        async with asyncio.timeout(READY_SECONDS):
            while not await asyncio.to_thread(_answers, self.ready_url):
                if self.process.returncode is not None:
                    raise RuntimeError(f"{self.command[-1]} did not start: {self.log.read_text()[-2000:]}")
                await asyncio.sleep(0.1)

    async def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Sends the signal and waits for the end; by SIGKILL after the grace period of any pod of ours."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        try:
            await asyncio.wait_for(self.process.wait(), 80)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@dataclass
class Fleet:
    """Gateways on one database, engines by Service; `configure` and `route` are what the operator and Kubernetes write."""

    api: ApiServer
    folder: Path
    database_url: str
    drain_delay: float
    gateways: list[Pod] = field(default_factory=list)
    engines: dict[str, list[Pod]] = field(default_factory=dict)
    _made: list[Pod] = field(default_factory=list)
    _generation: int = 0
    _config: str = ""

    def configure(self, revisions: Sequence[dict[str, Any]], **more: Any) -> None:
        """A new configuration, in the ConfigMap and in the files that new gateways mount."""
        self._generation += 1
        config = {"generation": self._generation, "namespace": NAMESPACE, "deployment": DEPLOYMENT, "model": "bench", **more}
        self._config = json.dumps({**config, "revisions": list(revisions)})
        self.api.put("configmaps", {"metadata": {"name": "bench-gateway"}, "data": {"config.json": self._config}})
        for gateway in self.gateways:
            (gateway.log.parent / "config.json").write_text(self._config)

    def route(self, service: str, pods: Sequence[Pod]) -> None:
        """The ready endpoints of an engine's Service. Each has its own port here, hence its own slice."""
        known = {pod.port for pod in self._made if pod.log.name.startswith(service)}
        ready = {pod.port for pod in pods}
        for port in known | ready:
            metadata = {"name": f"{service}-{port}", "labels": {"kubernetes.io/service-name": service}}
            endpoint = {"addresses": ["127.0.0.1"], "conditions": {"ready": port in ready}}
            self.api.put("endpointslices", {"metadata": metadata, "ports": [{"port": port}], "endpoints": [endpoint]})

    def engine(self, service: str) -> Pod:
        port = free_port()
        command = (sys.executable, "-m", "bench.null_engine", str(port))
        return self._keep(Pod(command, f"http://127.0.0.1:{port}/health", port, dict(os.environ), self.folder / f"{service}-{port}.log"))

    def gateway(self) -> Pod:
        folder = self.folder / f"gateway-{len(self._made)}"
        folder.mkdir()
        port = free_port()
        environment = gateway_environment(folder, 0, port, free_port())
        (folder / "url").write_text(self.database_url)
        (folder / "token").write_text("bench")
        (folder / "config.json").write_text(self._config)
        del environment["TUNELOOP_GATEWAY_ENDPOINTS"]
        environment |= {
            "TUNELOOP_GATEWAY_API_SERVER": f"http://127.0.0.1:{self.api.port}", "TUNELOOP_GATEWAY_TOKEN_PATH": str(folder),
            "TUNELOOP_GATEWAY_DRAIN_DELAY_SECONDS": str(self.drain_delay), "NAMESPACE": NAMESPACE, "CONFIG_MAP": "bench-gateway",
        }  # fmt: skip
        command = (sys.executable, "-m", "tuneloop_gateway")
        return self._keep(Pod(command, f"http://127.0.0.1:{port}/readyz", port, environment, folder / "gateway.log"))

    def _keep(self, pod: Pod) -> Pod:
        self._made.append(pod)
        return pod

    async def close(self) -> None:
        for pod in self._made:
            if pod.process is not None and pod.process.returncode is None:
                pod.process.kill()
                await pod.process.wait()
