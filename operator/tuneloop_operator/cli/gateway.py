"""The gateway's internal port, through the API server's service proxy or by a URL."""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import aiohttp
import yaml

from tuneloop_gateway.contract import TOKEN_HEADER
from tuneloop_operator.cli.errors import Failure
from tuneloop_operator.cluster.credentials import CredentialsError, load_credentials
from tuneloop_operator.render import names

PORT_NAME = "internal"
TOKEN_KEY = "internal-token"
TIMEOUT = aiohttp.ClientTimeout(total=600, sock_connect=10, sock_read=120)
MAX_ANSWER = 1 << 20
MAX_LINE = 1 << 20
MAX_EXPORT = 1 << 30


@dataclass(frozen=True)
class Gateway:
    """An open session; `base` is what paths are put behind."""

    session: aiohttp.ClientSession
    base: str
    headers: dict[str, str]

    async def post(self, path: str, body: bytes) -> bytes:
        """The answer's body. Raises Failure."""
        headers = {**self.headers, "Content-Type": "application/x-ndjson"}
        async with _asking(self.session.post(self.base + path, data=body, headers=headers, allow_redirects=False)) as answer:
            return await _read(answer)

    async def lines(self, path: str) -> AsyncIterator[bytes]:
        """The lines of the answer as they come. Raises Failure."""
        async with _asking(self.session.get(self.base + path, headers=self.headers, allow_redirects=False)) as answer:
            rest, size = b"", 0
            async for chunk in answer.content.iter_any():
                *whole, rest = (rest + chunk).split(b"\n")
                size += len(chunk)
                if size > MAX_EXPORT or len(rest) > MAX_LINE:
                    raise Failure("the gateway's answer is too large; ask for fewer rows with --limit.")
                for line in filter(None, whole):
                    yield line
            if rest:
                yield rest


def add_place(command: argparse.ArgumentParser) -> None:
    """Declare where the gateway is: what `connect` takes beside the deployment's name."""
    command.add_argument("-n", "--namespace", help="its namespace (default: the kubeconfig's)")
    command.add_argument("--url", help="ask the gateway's internal port here, for example through `kubectl port-forward`")
    command.add_argument("--token-file", type=Path, help="the internal token, for use with --url")


@asynccontextmanager
async def connect(deployment: str, namespace: str | None, url: str | None, token_file: Path | None) -> AsyncIterator[Gateway]:
    """A gateway to ask, with the internal token. Raises Failure."""
    if url is not None:
        if not url.startswith(("http://", "https://")):
            raise Failure(f"--url {url} must begin with http:// or https://.")
        headers = {TOKEN_HEADER: _token_of(token_file)} if token_file is not None else {}
        async with aiohttp.ClientSession(timeout=TIMEOUT, read_bufsize=1 << 18) as session:
            yield Gateway(session, url.rstrip("/"), headers)
        return
    try:
        credentials = load_credentials()
        space = namespace or current_namespace()
        own = await credentials.headers()
    except (CredentialsError, OSError) as error:
        raise Failure(f"{error}.") from error
    async with credentials.session() as session:
        place = f"{credentials.server}/api/v1/namespaces/{quote(space, safe='')}"
        token = await _token_in_secret(session, place, deployment, own)
        service = quote(f"{deployment}:{PORT_NAME}", safe=":")
        yield Gateway(session, f"{place}/services/{service}/proxy", {**own, TOKEN_HEADER: token})


def current_namespace() -> str:
    """The namespace of the kubeconfig's current context; "default" where it names none, as kubectl does."""
    path = Path(os.environ.get("KUBECONFIG", "").split(os.pathsep)[0] or Path.home() / ".kube" / "config")
    document = yaml.safe_load(path.read_text()) if path.exists() else {}
    contexts = {entry.get("name"): entry.get("context") or {} for entry in document.get("contexts") or ()}
    return str(contexts.get(document.get("current-context"), {}).get("namespace") or "default")


async def _token_in_secret(session: aiohttp.ClientSession, place: str, deployment: str, headers: dict[str, str]) -> str:
    name = names.gateway_secret(deployment)
    async with _asking(session.get(f"{place}/secrets/{quote(name, safe='')}", headers=headers, timeout=TIMEOUT)) as answer:
        data = json.loads(await _read(answer)).get("data") or {}
    try:
        return base64.b64decode(data[TOKEN_KEY]).decode().strip()
    except (KeyError, binascii.Error, UnicodeDecodeError) as error:
        raise Failure(f"the Secret {name} has no usable key {TOKEN_KEY}.") from error


def _token_of(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}.") from error


@asynccontextmanager
async def _asking(request: AbstractAsyncContextManager[aiohttp.ClientResponse]) -> AsyncIterator[aiohttp.ClientResponse]:
    try:
        async with request as answer:
            if answer.status >= 300:
                raise Failure(_refusal(answer.status, await _read(answer, cut=True)))
            yield answer
    except aiohttp.ClientConnectorError as error:
        raise Failure(f"cannot connect to {error.host}:{error.port}: {error.os_error.strerror or error.os_error}.") from error
    except (aiohttp.ClientError, TimeoutError) as error:
        raise Failure(f"the connection failed: {error or type(error).__name__}.") from error


async def _read(answer: aiohttp.ClientResponse, cut: bool = False) -> bytes:
    body = b""
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER:
            if cut:
                break
            raise Failure("the answer is larger than 1 MiB, which nothing here should be.")
    return body


def _refusal(code: int, body: bytes) -> str:
    """The sentence of a Kubernetes Status, of our gateway's error, or the beginning of whatever it is."""
    text = body[:300].decode(errors="replace").strip()
    try:
        document = json.loads(body)
    except ValueError:
        document = {}
    if isinstance(document, dict) and document.get("kind") == "Status":
        hint = {
            403: " Reading the Secret and the proxy of Services must be allowed to you.",
            404: " Is the name that of a ModelDeployment in this namespace (-n)?",
            503: " Is the gateway's pod ready?",
        }
        return f"the API server answers {code}: {document.get('message', text)}.{hint.get(code, '')}"
    if code == 401:
        return "the gateway refuses the internal token (401); with --url give the right one by --token-file."
    error = document.get("error") if isinstance(document, dict) else None
    message = error.get("message", text) if isinstance(error, dict) else text
    return f"the gateway answers {code}: {message}"
