"""A client of OCI registries (distribution specification 1.1): blobs and manifests, with tokens, within bounds of time.

Written on `requests`, because the maintained Python client reads each blob into memory, sets no timeouts and sleeps two minutes over an
answer of 500 (docs/decisions/0008).
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests

from tuneloop_trainer.contract import Reason
from tuneloop_trainer.errors import Invalid, Unavailable
from tuneloop_trainer.stores.credentials import Login

TIMEOUTS = (10.0, 60.0)
"""Seconds to connect, and between two pieces of an answer."""
ATTEMPTS = 3
MAX_MANIFEST = 4 << 20
CHUNK = 1 << 20
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


class Registry:
    """One repository of one registry."""

    def __init__(
        self,
        host: str,
        repository: str,
        login: Login | None = None,
        *,
        plain_http: bool = False,
        timeouts: tuple[float, float] = TIMEOUTS,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.host = host
        self._base = f"{'http' if plain_http else 'https'}://{host}/v2/{repository}/"
        self._repository = repository
        self._login = login
        self._timeouts = timeouts
        self._pause = pause
        self._session = requests.Session()
        self._session.trust_env = False  # no netrc and no proxy of somebody's environment gets to see the credentials
        self._authorization: str | None = None

    # --- blobs ---

    def has_blob(self, digest: str) -> bool:
        return self._ask("HEAD", f"blobs/{digest}", allowed=(200, 404)).status_code == 200

    def put_blob(self, content: bytes | Path, digest: str) -> None:
        """Upload in one piece, streamed from the file; nothing where the registry has it."""
        if self.has_blob(digest):
            return
        started = self._ask("POST", "blobs/uploads/", allowed=(202,))
        location = urljoin(self._base, started.headers.get("Location", ""))
        separator = "&" if urlsplit(location).query else "?"
        self._ask("PUT", f"{location}{separator}digest={digest}", content=content, allowed=(201,))

    def digest_of_blob(self, digest: str) -> str:
        """sha256 of what the registry gives back."""
        hashed = hashlib.sha256()
        with self._ask("GET", f"blobs/{digest}", allowed=(200,), stream=True) as answer:
            try:
                for chunk in answer.iter_content(CHUNK):
                    hashed.update(chunk)
            except requests.RequestException as error:
                raise self._unavailable("it breaks off while a blob is read") from error
        return f"sha256:{hashed.hexdigest()}"

    # --- manifests ---

    def put_manifest(self, content: bytes, tag: str) -> None:
        self._ask("PUT", f"manifests/{tag}", content=content, headers={"Content-Type": MANIFEST_TYPE}, allowed=(201,))

    def get_manifest(self, reference: str) -> bytes:
        with self._ask("GET", f"manifests/{reference}", headers={"Accept": MANIFEST_TYPE}, allowed=(200,), stream=True) as answer:
            try:
                return bytes(answer.raw.read(MAX_MANIFEST, decode_content=True))
            except Exception as error:  # urllib3's errors: the connection, not ours
                raise self._unavailable("it breaks off while a manifest is read") from error

    # --- requests ---

    def _ask(
        self,
        method: str,
        path: str,
        *,
        allowed: tuple[int, ...],
        content: bytes | Path | None = None,
        headers: dict[str, str] | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """Raises Invalid where the registry refuses, Unavailable where it does not answer."""
        url = urljoin(self._base, path)
        trouble = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._pause(2.0**attempt)
            try:
                answer = self._send(method, url, content, headers or {}, stream)
                if answer.status_code == 401:
                    self._authorize(answer.headers.get("WWW-Authenticate", ""))
                    answer = self._send(method, url, content, headers or {}, stream)
            except requests.RequestException as error:
                trouble = "does not answer in time" if isinstance(error, requests.Timeout) else "cannot be reached"
                continue
            if answer.status_code in allowed:
                return answer
            trouble = f"answers {answer.status_code}"
            if answer.status_code < 500 and answer.status_code != 429:
                raise self._refused(answer.status_code)
        raise self._unavailable(f"it {trouble}, {ATTEMPTS} times")

    def _send(self, method: str, url: str, content: bytes | Path | None, headers: dict[str, str], stream: bool) -> requests.Response:
        sent = dict(headers)
        if self._authorization is not None and urlsplit(url).netloc == self.host:
            sent["Authorization"] = self._authorization
        settings: dict[str, Any] = {"timeout": self._timeouts, "stream": stream}
        if not isinstance(content, Path):
            return self._session.request(method, url, data=content, headers=sent, **settings)
        with content.open("rb") as file:
            sent |= {"Content-Type": "application/octet-stream"}
            return self._session.request(method, url, data=file, headers=sent, **settings)

    def _authorize(self, challenge: str) -> None:
        """Basic, or a token from the realm that the registry names."""
        kind, _, rest = challenge.partition(" ")
        if kind.lower() == "basic" and self._login is not None:
            request = requests.Request("GET", self._base, auth=(self._login.user, self._login.password)).prepare()
            self._authorization = str(request.headers["Authorization"])
        elif kind.lower() == "bearer":
            self._authorization = f"Bearer {self._token(dict(CHALLENGE.findall(rest)))}"
        else:
            raise self._refused(401)

    def _token(self, challenge: dict[str, str]) -> str:
        realm = challenge.get("realm", "")
        if urlsplit(realm).scheme != "https" and not self._base.startswith("http://"):
            raise Invalid(f"Registry {self.host} sends credentials to {realm[:100]}, which is not https.", Reason.ACCESS_DENIED)
        query = {"service": challenge.get("service", ""), "scope": f"repository:{self._repository}:pull,push"}
        auth = (self._login.user, self._login.password) if self._login is not None else None
        answer = self._session.get(realm, params=query, auth=auth, timeout=self._timeouts)
        if answer.status_code != 200:
            raise self._refused(answer.status_code) if answer.status_code < 500 else requests.ConnectionError("no token")
        try:
            given = answer.json()
            return str(given.get("token") or given["access_token"])
        except (ValueError, KeyError, AttributeError) as error:
            raise self._refused(401) from error

    # --- errors ---

    def _refused(self, status: int) -> Invalid:
        where = f"{self.host}/{self._repository}"
        if status in (401, 403):
            return Invalid(f"Registry {where} denies access (status {status}). Look at the Secret of output.push.", Reason.ACCESS_DENIED)
        return Invalid(f"Registry {where} refuses the model (status {status}). Look at the uri of output.push.", Reason.STORE_UNAVAILABLE)

    def _unavailable(self, how: str) -> Unavailable:
        return Unavailable(f"Registry {self.host} is not available: {how}.", Reason.STORE_UNAVAILABLE)
