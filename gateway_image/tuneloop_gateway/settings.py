"""Where the gateway finds its files, ports and cluster: the environment, read once."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from tuneloop_gateway import contract


@dataclass(frozen=True)
class Settings:
    """Every default is the contract's; tests and benchmarks override them by environment."""

    config_path: Path = Path(contract.CONFIG_PATH)
    secrets_path: Path = Path(contract.SECRETS_PATH)
    keys_path: Path = Path(contract.KEYS_PATH)
    data_path: Path = Path(contract.DATA_PATH)
    database_url_path: Path = Path(contract.DATABASE_URL_PATH)
    token_path: Path = Path(contract.TOKEN_PATH)
    host: str = "0.0.0.0"
    public_port: int = contract.PUBLIC_PORT
    internal_port: int = contract.INTERNAL_PORT
    endpoints: Mapping[str, tuple[str, ...]] | None = None
    """Static replicas by service, instead of EndpointSlices."""
    namespace: str = "default"
    pod_uid: str = ""
    config_map: str | None = None
    api_server: str | None = None
    """Base URL of the API server; None outside a cluster."""
    wait_seconds: float = 15
    """How long a request waits for a ready replica before it is answered 503."""
    drain_delay_seconds: float = 6
    """Between failing readiness and refusing connections. Endpoints are updated meanwhile, each answer tells its client to close its
    connection, and what the `openai` client leaves unused for five seconds it does not use again: then nobody's connection is left."""
    drain_seconds: float = 60
    """How long running requests may take after that."""


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Reads the variables `TUNELOOP_GATEWAY_*`, NAMESPACE, POD_UID, CONFIG_MAP and KUBERNETES_SERVICE_HOST/PORT."""

    def get(name: str, default: str) -> str:
        return environ.get(f"TUNELOOP_GATEWAY_{name}", default)

    static = environ.get("TUNELOOP_GATEWAY_ENDPOINTS")
    host, config_map = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("CONFIG_MAP")
    api_server = None
    if host and not static:
        bracketed = f"[{host}]" if ":" in host else host
        api_server = f"https://{bracketed}:{environ.get('KUBERNETES_SERVICE_PORT', '443')}"
    defaults = Settings()
    return Settings(
        config_path=Path(get("CONFIG", contract.CONFIG_PATH)),
        secrets_path=Path(get("SECRETS", contract.SECRETS_PATH)),
        keys_path=Path(get("KEYS", contract.KEYS_PATH)),
        data_path=Path(get("DATA", contract.DATA_PATH)),
        database_url_path=Path(get("DATABASE_URL_FILE", contract.DATABASE_URL_PATH)),
        token_path=Path(get("TOKEN_PATH", contract.TOKEN_PATH)),
        host=get("HOST", defaults.host),
        public_port=int(get("PUBLIC_PORT", str(contract.PUBLIC_PORT))),
        internal_port=int(get("INTERNAL_PORT", str(contract.INTERNAL_PORT))),
        endpoints=TypeAdapter(dict[str, tuple[str, ...]]).validate_python(json.loads(static)) if static else None,
        namespace=environ.get("NAMESPACE", "default"),
        pod_uid=environ.get("POD_UID") or secrets.token_hex(8),
        config_map=config_map,
        api_server=get("API_SERVER", api_server or "") or None,
        wait_seconds=float(get("WAIT_SECONDS", str(defaults.wait_seconds))),
        drain_delay_seconds=float(get("DRAIN_DELAY_SECONDS", str(defaults.drain_delay_seconds))),
        drain_seconds=float(get("DRAIN_SECONDS", str(defaults.drain_seconds))),
    )
