"""A gateway's internal port, played: it takes up the configuration of the cluster and answers for it as a test wishes."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.cluster.harness import Api

from tuneloop_gateway.contract import INTERNAL_PORT, GatewayConfig, Revision
from tuneloop_gateway.prompts import PromptInvalid, compile_prompt


def prompt_error(revision: Revision) -> str:
    """What a real gateway finds wrong with the revision's prompt."""
    try:
        compile_prompt(revision)
    except PromptInvalid as error:
        return str(error)[:300]
    return ""


@dataclass
class FakeGateway:
    """Listens on an address of 127.88/16, where a pod's status says that it is."""

    api: Api
    namespace: str
    deployment: str
    address: str
    pod_uid: str = ""
    probe: dict[str, object] = field(default_factory=lambda: {"status": "Done", "asked": 50, "agreed": 50})
    warm: bool = True
    drift: dict[str, object] = field(default_factory=dict)
    feedback: dict[str, int] = field(default_factory=dict)
    in_flight: int = 0
    held: int = 0
    idle: float = 0.0
    skew: dict[str, object] | None = None
    prompt_digest: str = ""
    """Of the prompt that engines read, where the operator wants it told."""
    engine_version: str = ""
    """vLLM's, where engines are to tell it."""
    unloaded: dict[int, str] = field(default_factory=dict)
    """Version -> why no replica has loaded its adapter; "" where that only takes its time."""
    outcomes: dict[int, dict[str, object]] = field(default_factory=dict)
    """Version -> what became of its requests in each window."""
    asked: int = 0
    """How often its state was asked for."""
    frozen: GatewayConfig | None = None
    """Set: this configuration stays in force, whatever the cluster says."""

    def __enter__(self) -> FakeGateway:
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(gateway.state()).encode() if self.path == "/internal/state" else b"{}"
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer((self.address, INTERNAL_PORT), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def config(self) -> GatewayConfig | None:
        found = self.api.get("ConfigMap", self.namespace, f"{self.deployment}-gateway")
        return GatewayConfig.model_validate_json(found["data"]["config.json"]) if found else None

    def state(self) -> dict[str, object]:
        self.asked += 1
        config = self.frozen or self.config()
        revisions = [
            {
                "name": revision.name,
                "endpoints": int(revision.version not in self.unloaded),
                "loadError": self.unloaded.get(revision.version or 0, ""),
                "warm": self.warm and not prompt_error(revision),
                "promptError": prompt_error(revision),
                "probe": self.probe if revision.probe else {"status": "Pending"},
                "inFlight": self.in_flight,
                "outcomes": self.outcomes.get(revision.version or 0, {}) if config and config.window else None,
                "engineVersion": self.engine_version,
                "promptDigest": self.prompt_digest if revision.probe_text else "",
            }
            for revision in (config.revisions if config else ())
        ]
        epoch = config.drift.epoch if config and config.drift else "0"
        return {
            "podUid": self.pod_uid,
            "startedAt": "2026-01-01T00:00:00Z",
            "generation": config.generation if config else 0,
            "held": self.held,
            "idleSeconds": self.idle,
            "revisions": revisions,
            "window": config.window if config else "",
            "drift": {"status": "Monitoring", "epoch": epoch, "logThreshold": 11.5} | self.drift,
            "skew": self.skew,
            "feedback": self.feedback,
        }
