"""How the operator proves who it is: a pod's token, or a kubeconfig. Loads what it needs and no client library, for their memory."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import yaml

MOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REREAD_SECONDS = 60.0
EXEC_SECONDS = 60.0
EARLY_SECONDS = 60.0
"""A token with an expiry is replaced so long before."""


class CredentialsError(Exception):
    """No usable credentials; the message says which file or field."""


@dataclass
class Credentials:
    """The server, how to trust it, and who we are. Usable from several threads and loops."""

    server: str
    tls: ssl.SSLContext | bool = True
    token: str | None = None
    token_file: Path | None = None
    exec: Mapping[str, Any] | None = None
    _read_at: float = field(default=float("-inf"), init=False)
    _expires_at: float = field(default=float("inf"), init=False)

    async def headers(self, *, is_refused: bool = False) -> dict[str, str]:
        """The Authorization header. Token files are read again every minute, and at once where the last answer was 401."""
        now = time.monotonic()
        is_stale = is_refused or now - self._read_at > REREAD_SECONDS
        if self.token_file is not None and is_stale:
            self.token, self._read_at = self.token_file.read_text().strip(), now
        elif self.exec is not None and (is_refused or self.token is None or time.time() > self._expires_at - EARLY_SECONDS):
            self.token, self._expires_at = await asyncio.to_thread(_run_plugin, self.exec)
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def session(
        self,
        *,
        headers: dict[str, str] | None = None,
        middlewares: tuple[aiohttp.ClientMiddlewareType, ...] = (),
        response_class: type[aiohttp.ClientResponse] = aiohttp.ClientResponse,
        limit: int = 0,
    ) -> aiohttp.ClientSession:
        """A session to the API server, without proxies and cookies."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self.tls, limit=limit, keepalive_timeout=60),
            headers={"User-Agent": "tuneloop-operator", **(headers or {})},
            cookie_jar=aiohttp.DummyCookieJar(),
            middlewares=middlewares,
            response_class=response_class,
        )


def load_credentials(environment: Mapping[str, str] = os.environ) -> Credentials:
    """A pod's service account where there is one and no KUBECONFIG is set, else the kubeconfig's current context."""
    if "KUBECONFIG" not in environment and environment.get("KUBERNETES_SERVICE_HOST") and (MOUNT / "token").exists():
        return _of_pod(environment)
    path = Path(environment.get("KUBECONFIG", "").split(os.pathsep)[0] or Path.home() / ".kube" / "config")
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise CredentialsError(f"cannot read the kubeconfig {path}: {error.strerror}") from error
    return _of_kubeconfig(document or {}, path)


def _of_pod(environment: Mapping[str, str]) -> Credentials:
    host, port = environment["KUBERNETES_SERVICE_HOST"], environment.get("KUBERNETES_SERVICE_PORT", "443")
    host = f"[{host}]" if ":" in host else host
    return Credentials(f"https://{host}:{port}", ssl.create_default_context(cafile=str(MOUNT / "ca.crt")), token_file=MOUNT / "token")


def _of_kubeconfig(document: dict[str, Any], path: Path) -> Credentials:
    name = document.get("current-context")
    context = _named(document, "contexts", name, path)["context"]
    cluster = _named(document, "clusters", context.get("cluster"), path)["cluster"]
    user = _named(document, "users", context.get("user"), path).get("user") or {}
    token_file = user.get("tokenFile")
    return Credentials(
        server=cluster["server"].rstrip("/"),
        tls=_tls(cluster, user, path.parent) if cluster["server"].startswith("https:") else True,
        token=user.get("token"),
        token_file=path.parent / token_file if token_file else None,
        exec=user.get("exec"),
    )


def _named(document: dict[str, Any], section: str, name: str | None, path: Path) -> dict[str, Any]:
    entry = next((entry for entry in document.get(section) or () if entry.get("name") == name), None)
    if entry is None:
        raise CredentialsError(f"the kubeconfig {path} has no {section} entry named {name!r}")
    return dict(entry)


def _tls(cluster: dict[str, Any], user: dict[str, Any], folder: Path) -> ssl.SSLContext:
    with ExitStack() as stack:
        authority = _file(cluster, "certificate-authority", folder, stack)
        context = ssl.create_default_context(cafile=authority)
        certificate = _file(user, "client-certificate", folder, stack)
        if certificate:
            context.load_cert_chain(certificate, _file(user, "client-key", folder, stack))
    if cluster.get("insecure-skip-tls-verify"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _file(section: dict[str, Any], name: str, folder: Path, stack: ExitStack) -> str | None:
    """The path of a file that is named or inlined; an inlined one lies in a private temporary file until the stack ends."""
    if section.get(f"{name}-data"):
        file = stack.enter_context(tempfile.NamedTemporaryFile())  # noqa: SIM115 - the stack closes it
        file.write(base64.b64decode(section[f"{name}-data"]))
        file.flush()
        return file.name
    return str(folder / section[name]) if section.get(name) else None


def _run_plugin(plugin: Mapping[str, Any]) -> tuple[str, float]:
    """Token and expiry (seconds since 1970) from a client-go credential plugin."""
    environment = {**os.environ, **{pair["name"]: pair["value"] for pair in plugin.get("env") or ()}}
    request = {"apiVersion": plugin.get("apiVersion"), "kind": "ExecCredential", "spec": {"interactive": False}}
    environment["KUBERNETES_EXEC_INFO"] = json.dumps(request)
    command = [plugin["command"], *(plugin.get("args") or ())]
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=EXEC_SECONDS, check=True)
        status = json.loads(done.stdout)["status"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        raise CredentialsError(f"the credential plugin {plugin['command']} failed: {type(error).__name__}") from error
    if not status.get("token"):
        raise CredentialsError(f"the credential plugin {plugin['command']} gave no token")
    expiry = status.get("expirationTimestamp")
    return status["token"], datetime.fromisoformat(expiry).timestamp() if expiry else float("inf")
