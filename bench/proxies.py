"""The servers between a client and an engine that `bench.gateway` compares: ours, LiteLLM's proxy, and vLLM production-stack's router.

Each runs as its documents start it for one engine, with one process, without access logs or a database of its own; ours captures and
looks for drift meanwhile, the others only pass on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.environments import Source, environment

LITELLM, PRODUCTION_STACK = "litellm", "production_stack"
PEERS = (LITELLM, PRODUCTION_STACK)
ROUTER = Source(
    "production-stack", "https://github.com/vllm-project/production-stack", "a6c01db05f65f556235413ba8dbcfb0c01132fff", "src/vllm_router"
)
"""At this commit it is newer than any package of it."""


@dataclass(frozen=True)
class Proxy:
    """How a server is started, and where it says that it is ready."""

    name: str
    port: int
    command: Sequence[str]
    environment: dict[str, str]
    ready: str


def peer(name: str, folder: Path, engine: str, model: str, key: str, port: int) -> Proxy:
    """Raises CalledProcessError, TimeoutExpired or OSError where it cannot be installed."""
    return (_litellm if name == LITELLM else _production_stack)(folder, engine, model, key, port)


def available(
    wanted: Sequence[str], folder: Path, engine: str, model: str, key: str, ports: Sequence[int]
) -> tuple[list[Proxy], dict[str, str]]:
    """Those that can be run, and why the others cannot."""
    found, missing = list[Proxy](), dict[str, str]()
    for name, port in zip(wanted, ports, strict=True):
        try:
            found.append(peer(name, folder, engine, model, key, port))
        except (subprocess.SubprocessError, OSError) as error:
            missing[name] = f"cannot be installed: {error}"[:200]
            print(f"{name}: {missing[name]}", file=sys.stderr)
    return found, missing


def _litellm(folder: Path, engine: str, model: str, key: str, port: int) -> Proxy:
    python = environment("litellm")
    config = folder / "litellm.yaml"  # YAML reads JSON
    parameters = {"model": f"openai/{model}", "api_base": f"{engine}/v1", "api_key": key}
    config.write_text(json.dumps({"model_list": [{"model_name": model, "litellm_params": parameters}]}))
    command = (str(python.parent / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1")
    settings = {"LITELLM_MASTER_KEY": key, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR"}
    return Proxy(LITELLM, port, command, _clean(settings), f"http://127.0.0.1:{port}/health/liveliness")


def _production_stack(folder: Path, engine: str, model: str, key: str, port: int) -> Proxy:
    python = environment("production-stack")
    ROUTER.fetch()
    options = {
        "host": "127.0.0.1", "port": str(port), "service-discovery": "static", "static-backends": engine, "static-models": model,
        "routing-logic": "roundrobin", "log-level": "warning", "file-storage-path": str(folder / "files"),
    }  # fmt: skip
    command = (str(python), "-m", "vllm_router.app", *(part for name, value in options.items() for part in (f"--{name}", value)))
    return Proxy(PRODUCTION_STACK, port, command, _clean({"PYTHONPATH": str(ROUTER.folder.parent)}), f"http://127.0.0.1:{port}/health")


def _clean(settings: dict[str, str]) -> dict[str, str]:
    """The environment without what is set for our own packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | settings
