"""Guards an engine: a key on every path but two, an allow-list of paths, the recorded probes, a `/health` that tells when the engine
stands still; and verifies a model before it is loaded, an adapter also while the engine runs.

One file that needs nothing but the standard library: it is mounted into the engine's image and used as
`--middleware engine_guard.Guard` (vLLM's own key leaves inference paths open) and, before the engine starts, as
`python3 engine_guard.py verify <model folder> <sha256:digest> [<base folder> <sha256:digest>]`; of an engine for adapters, `verify-base`
with its base. Revisions that an earlier release made are run with this file too.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs

KEY_FILE_VARIABLE = "TUNELOOP_ENGINE_KEY_FILE"
PROBES_FILE_VARIABLE = "TUNELOOP_PROBES_FILE"
OPEN_PATHS = {("GET", "/health"), ("GET", "/metrics")}
REFERENCE_FILE_VARIABLE = "TUNELOOP_REFERENCE_FILE"
PROBES_PATH = "/tuneloop/probes"
REFERENCE_PATH = "/tuneloop/reference"
ADAPTERS_PATH = "/tuneloop/adapters"
MODELS_FOLDER = Path("/volumes")
"""Where claims are mounted, for reading alone: nothing outside is verified, loaded or shown."""
GENERATING_PATHS = {"/v1/chat/completions", "/v1/completions"}
ALLOWED_PATHS = {*GENERATING_PATHS, "/v1/models", "/tokenize", "/version"}
MANIFEST = "manifest.json"
CARD = "MODEL_CARD.md"
"""What a copy of a model has beside its manifest: the card with the figures of its evaluation. No engine reads it."""
BASE_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
"""What the trainer's digest of a base model is made of; files below subfolders are left out."""
MAX_MANIFEST_BYTES = 16 << 20
MAX_RECORDED_BYTES = 2 << 20
MAX_WANTED_BYTES = 1 << 20
MAX_ADAPTERS = 32
MAX_ERROR = 500

Scope = MutableMapping[str, Any]  # the three shapes of ASGI
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """Pure ASGI middleware: streams pass untouched. Without a readable key it refuses everything but the open paths."""

    def __init__(self, app: App, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._vigil = Vigil(clock)
        self._adapters = Adapters(app)
        self._key_file = os.environ.get(KEY_FILE_VARIABLE)
        self._recorded = {
            PROBES_PATH: os.environ.get(PROBES_FILE_VARIABLE),
            REFERENCE_PATH: os.environ.get(REFERENCE_FILE_VARIABLE),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
        elif kind != "http":
            await _refuse(scope, send)
        elif (scope["method"], scope["path"]) == ("GET", "/health") and await self._vigil.is_still(self._app, scope):
            await _answer(send, 503, b'{"error":"requests wait and the engine stands still"}')
        elif (scope["method"], scope["path"]) in OPEN_PATHS:
            await self._app(scope, receive, send)
        elif not self._has_key(scope):
            await _answer(send, 401, b'{"error":"unauthorized"}')
        elif scope["path"] in self._recorded:
            await self._answer_recorded(scope, send)
        elif (scope["method"], scope["path"]) == ("PUT", ADAPTERS_PATH):
            await self._answer_adapters(scope, receive, send)
        elif scope["path"] in GENERATING_PATHS:
            await self._vigil.attend(self._app, scope, receive, send)
        elif scope["path"] in ALLOWED_PATHS:
            await self._app(scope, receive, send)
        else:
            await _answer(send, 404, b'{"error":"not found"}')

    def _has_key(self, scope: Scope) -> bool:
        """In constant time. The file is read each time: a mounted secret changes under a running engine."""
        key = _read(self._key_file, 4096)
        key = key.strip() if key is not None else None
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if not key or len(given) != 1:
            return False
        return hmac.compare_digest(given[0], b"Bearer " + key)

    async def _answer_recorded(self, scope: Scope, send: Send) -> None:
        path = self._recorded[scope["path"]]
        if asked := parse_qs(scope.get("query_string", b"").decode("latin-1")).get("model"):
            recorded = self._adapters.recorded(asked[0])
            if recorded is None:  # another answer than "it has none": it may have been loaded before this process started
                await _answer(send, 409, b'{"error":"this adapter is not loaded here"}')
                return
            path = recorded[scope["path"]]
        body = _read(path, MAX_RECORDED_BYTES) if scope["method"] == "GET" else None
        if body is None:
            await _answer(send, 404, b'{"error":"nothing of this kind is recorded for this model"}')
        else:
            await _answer(send, 200, body)

    async def _answer_adapters(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            generation, wanted = parse_wanted(await _body(receive, MAX_WANTED_BYTES))
        except ValueError as error:
            await _answer(send, 400, json.dumps({"error": str(error)}).encode())
            return
        loaded, errors = await self._adapters.follow(scope, generation, wanted)
        await _answer(send, 200, json.dumps({"loaded": loaded, "errors": errors}).encode())


async def _body(receive: Receive, limit: int) -> bytes:
    """Raises ValueError where there is more."""
    body = bytearray()
    while True:
        message = await receive()
        body.extend(message.get("body", b""))
        if len(body) > limit or message["type"] != "http.request":
            raise ValueError(f"the body has to be at most {limit} bytes")
        if not message.get("more_body"):
            return bytes(body)


def _read(path: str | None, limit: int) -> bytes | None:
    """None where the file is not there or is longer than it may be."""
    if not path:
        return None
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError:
        return None
    return content if len(content) <= limit else None


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refuse(scope: Scope, send: Send) -> None:
    """Nothing allowed speaks another protocol than HTTP. Where a server cannot answer a websocket with a status, it answers 403."""
    if scope["type"] != "websocket":
        return
    if "websocket.http.response" in (scope.get("extensions") or {}):
        await send({"type": "websocket.http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "websocket.http.response.body", "body": b""})
    else:
        await send({"type": "websocket.close", "code": 1008})


async def _call(app: App, scope: Scope, method: str, path: str, content: bytes = b"") -> tuple[int, bytes]:
    """(status, body) of the engine's own answer to a request that nobody sent."""
    status, body = 500, bytearray()

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        body.extend(message.get("body", b""))

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())] if content else []
    own = {"method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
    await app({**scope, **own}, receive, send)
    return status, bytes(body)


# --- adapters --------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """An adapter that this process is to have."""

    name: str
    path: str
    digest: str
    probes: str | None
    reference: str | None


def parse_wanted(raw: bytes) -> tuple[int, list[Wanted]]:
    """(generation, adapters). Raises ValueError, with a sentence."""
    try:
        given = json.loads(raw)
        fields = [[one["name"], one["path"], one["digest"], one.get("probes"), one.get("reference")] for one in given["adapters"]]
        generation = given["generation"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("the body has to be {generation, adapters: [{name, path, digest, probes, reference}]}") from None
    if not isinstance(generation, int) or len(fields) > MAX_ADAPTERS:
        raise ValueError(f"the generation has to be a number, and the adapters at most {MAX_ADAPTERS}")
    for name, path, digest, *recorded in fields:
        if not all(isinstance(text, str) and text for text in (name, path, digest)):
            raise ValueError("name, path and digest have to be texts")
        if not all(text is None or isinstance(text, str) for text in recorded):
            raise ValueError("probes and reference have to be paths")
        _inside(path)
    return generation, [Wanted(*one) for one in fields]


def _inside(path: str) -> Path:
    """Raises ValueError for what lies outside of the mounted claims."""
    found = Path(path)
    if "\0" in path or not found.is_absolute() or not found.resolve().is_relative_to(MODELS_FOLDER):
        raise ValueError(f"a path has to lie below {MODELS_FOLDER}")
    return found


class Adapters:
    """Has the engine load what is wanted, each verified before, through its own endpoints, which the guard closes to everybody else.

    What is loaded is asked of the engine each time: nothing here outlives it, and nothing of it is guessed.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._lock = asyncio.Lock()
        self._generation = 0
        self._wanted: dict[str, Wanted] = {}

    def recorded(self, name: str) -> dict[str, str | None] | None:
        """The files recorded with an adapter; None where it is not one of those that are wanted."""
        wanted = self._wanted.get(name)
        if wanted is None:
            return None
        files = {PROBES_PATH: wanted.probes, REFERENCE_PATH: wanted.reference}
        return {path: file if file is not None and _is_inside(file) else None for path, file in files.items()}

    async def follow(self, scope: Scope, generation: int, wanted: list[Wanted]) -> tuple[list[str], dict[str, str]]:
        """(those that the engine has, why others could not be loaded). One at a time; an older generation changes nothing."""
        async with self._lock:
            errors: dict[str, str] = {}
            if generation >= self._generation:
                self._generation, self._wanted = generation, {one.name: one for one in wanted}
                present = await self._listed(scope)
                for name in present - self._wanted.keys():
                    await self._tell(scope, "/v1/unload_lora_adapter", {"lora_name": name})
                for one in wanted:
                    if one.name not in present and (error := await self._load(scope, one)):
                        print(f"The adapter {one.name} was not loaded: {error}", file=sys.stderr, flush=True)
                        errors[one.name] = error[:MAX_ERROR]
            return sorted(await self._listed(scope)), errors

    async def _load(self, scope: Scope, wanted: Wanted) -> str:
        """Why it could not be loaded; "" where it was."""
        try:
            await asyncio.to_thread(verify, _inside(wanted.path), wanted.digest)
        except (Mismatch, OSError, ValueError) as error:
            return f"The adapter in {wanted.path} is refused: {error}"
        return await self._tell(scope, "/v1/load_lora_adapter", {"lora_name": wanted.name, "lora_path": wanted.path})

    async def _tell(self, scope: Scope, path: str, body: dict[str, str]) -> str:
        """The engine's own sentence where it refuses; "" where it obeys."""
        status, raw = await _call(self._app, scope, "POST", path, json.dumps(body).encode())
        if status == 200:
            return ""
        try:
            return str(json.loads(raw)["error"]["message"])
        except (ValueError, TypeError, KeyError):
            return f"{path} was answered {status}."

    async def _listed(self, scope: Scope) -> set[str]:
        """Adapters by the engine's own list of models: those that have a parent."""
        status, raw = await _call(self._app, scope, "GET", "/v1/models")
        try:
            return {str(model["id"]) for model in json.loads(raw)["data"] if model.get("parent")}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise RuntimeError(f"the engine's list of models was answered {status}") from None


def _is_inside(path: str) -> bool:
    try:
        return bool(_inside(path))
    except ValueError:
        return False


# --- an engine that stands still ------------------------------------------------

STILL_SECONDS = 45
LOOK_SECONDS = 5
GIVEN_UP_SECONDS = 10
"""A client that waited so long and left is one that was not answered; one that left before may never have reached the engine."""
ITERATIONS = b"vllm:iteration_tokens_total_count"
NO_STEPS = b"vllm:admission_rejections"
"""What the server counts without the engine."""


class Vigil:
    """Whether an engine stands still: for `STILL_SECONDS` a request has waited for it, and none of its metrics has moved.

    vLLM's own gauges do not say who waits: they are written after a step, so that they are 0 where the first step hangs. Its count of
    iterations does not say what moves: it leaves out steps that only read a part of a long prompt, which show in the share of the KV cache.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: dict[object, float] = {}
        self._given_up: float | None = None
        self._seen = b""
        self._moved = self._looked = self._left = clock()
        self._still = False

    async def attend(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on. It waits for the engine while its body is there and no part of the answer is on its way to a slow reader."""
        request = object()

        async def read() -> MutableMapping[str, Any]:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                self._waiting[request] = self._clock()
            return message

        async def answer(message: MutableMapping[str, Any]) -> None:
            self._waiting.pop(request, None)
            await send(message)
            if message["type"] == "http.response.start" or message.get("more_body"):
                self._waiting[request] = self._clock()

        try:
            await app(scope, read, answer)
        finally:
            since = self._waiting.pop(request, None)
            if since is not None and self._clock() - since >= GIVEN_UP_SECONDS:
                self._left = self._clock()
                self._given_up = since if self._given_up is None else min(since, self._given_up)

    async def is_still(self, app: App, scope: Scope) -> bool:
        """Looks at the metrics at most every `LOOK_SECONDS`."""
        now = self._clock()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            seen = await _progress(app, scope)
            if seen != self._seen:  # as None always is
                self._seen, self._moved, self._given_up = seen or b"", now, None
            oldest = min([*self._waiting.values(), *([] if self._given_up is None else [self._given_up])], default=now)
            # An engine that nobody waits for any more is idle: what it was waited for without a step counts, not what came after.
            until = now if any(now - since >= GIVEN_UP_SECONDS for since in self._waiting.values()) else self._left
            still = until - max(oldest, self._moved) >= STILL_SECONDS
            if still and not self._still:
                print(f"Requests wait, and no step has ended for {now - self._moved:.0f} s: /health is 503.", file=sys.stderr, flush=True)
            self._still = still
        return self._still


async def _progress(app: App, scope: Scope) -> bytes | None:
    """A digest of what the engine's steps move; None where its metrics do not tell: nobody is ended for want of evidence."""
    try:
        _, body = await _call(app, scope, "GET", "/metrics")
    except Exception:  # noqa: BLE001 - whatever it was, it is no evidence
        return None
    lines = [line for line in body.splitlines() if line.startswith(b"vllm:") and not line.startswith(NO_STEPS)]
    if not any(line.startswith(ITERATIONS) for line in lines):
        return None
    return hashlib.sha256(b"\n".join(lines)).digest()


# --- verification ----------------------------------------------------------------


class Mismatch(Exception):
    """The folder is not what was published; the message says where."""


def verify(folder: Path, digest: str) -> int:
    """Checks the manifest's digest, then every file's size and sha256, and that no file but the card is unlisted. Returns the number of
    files."""
    _require_digest(digest)
    files = _read_manifest(folder, digest)
    for path, size, sha256 in files:
        _verify_file(folder / path, path, size, sha256)
    listed = {path for path, _, _ in files}
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}
    beside = {MANIFEST} if (folder / CARD).is_symlink() else {MANIFEST, CARD}
    unlisted = sorted(present - listed - beside)
    if unlisted:
        raise Mismatch(f"{unlisted[0]} is not in the manifest.")
    _refuse_code(folder, sorted(listed))
    return len(files)


def verify_base(folder: Path, digest: str) -> int:
    """Checks that the base model of an adapter is the one that it was trained on: the same files, by the trainer's digest over them.
    Returns the number of files."""
    _require_digest(digest)
    if not folder.is_dir():
        raise Mismatch("the folder does not exist.")
    paths = sorted(p for p in folder.iterdir() if p.suffix in BASE_FILES and p.name != MANIFEST and p.is_file())
    listed = [{"path": p.name, "size": p.stat().st_size, "sha256": _sha256(p)} for p in paths]
    content = {"version": 1, "kind": "model", "files": listed, "metadata": {}}
    found = "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    if not hmac.compare_digest(found, digest):
        raise Mismatch(f"its files have the digest {found}, but the adapter was trained on {digest}. Restore that base, or train again.")
    _refuse_code(folder, [path.name for path in paths])
    return len(paths)


def _refuse_code(folder: Path, paths: list[str]) -> None:
    """Code that a model brings along (`auto_map`) is not run here, and old engines have run it unasked."""
    for path in paths:
        if not path.endswith("config.json"):
            continue
        try:
            config = json.loads(_read(str(folder / path), MAX_MANIFEST_BYTES) or b"")
        except (ValueError, RecursionError):
            continue  # no engine reads it either
        if isinstance(config, dict) and "auto_map" in config:
            raise Mismatch(f"it needs code of its own (auto_map in {path}), which is not run.")


def _require_digest(digest: str) -> None:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise Mismatch(f"'{digest}' is no digest; it must be sha256: and 64 hexadecimal digits.")


def _read_manifest(folder: Path, digest: str) -> list[tuple[str, int, str]]:
    raw = _read(str(folder / MANIFEST), MAX_MANIFEST_BYTES)
    if raw is None:
        raise Mismatch(f"{MANIFEST} is missing in {folder} or cannot be read.")
    try:
        manifest = json.loads(raw)
        canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
        found = "sha256:" + hashlib.sha256(canonical).hexdigest()
        files = [(str(f["path"]), int(f["size"]), str(f["sha256"])) for f in manifest["files"]]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise Mismatch(f"{MANIFEST} is not a manifest.") from None
    if not hmac.compare_digest(found, digest):
        raise Mismatch(f"{MANIFEST} has the digest {found}, but {digest} is what was approved.")
    if not files:
        raise Mismatch(f"{MANIFEST} lists no file.")
    for path, _, _ in files:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise Mismatch(f"{MANIFEST} lists {path}, which lies outside of the folder.")
    return files


def _verify_file(file: Path, path: str, size: int, sha256: str) -> None:
    if file.is_symlink() or not file.is_file():
        raise Mismatch(f"{path} is missing.")
    if file.stat().st_size != size:
        raise Mismatch(f"{path} has {file.stat().st_size} bytes instead of {size}.")
    found = _sha256(file)
    if not hmac.compare_digest(found, sha256.removeprefix("sha256:")):
        raise Mismatch(f"{path} is not what was published (its sha256 is {found[:12]}…).")


def _sha256(file: Path) -> str:
    """As hex; `hashlib.file_digest` is missing from the Python of older engine images."""
    state = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            state.update(block)
    return state.hexdigest()


USAGE = """usage: engine_guard.py verify <model folder> <sha256:digest> [<base folder> <sha256:digest>]
       engine_guard.py verify-base <base folder> <sha256:digest>"""


def main(arguments: list[str]) -> int:
    model, base = ("model", verify), ("base model", verify_base)
    checks = {("verify", 3): (model,), ("verify", 5): (model, base), ("verify-base", 3): (base,)}.get(
        (arguments[0] if arguments else "", len(arguments))
    )
    if checks is None:
        print(USAGE, file=sys.stderr)
        return 2
    for (what, check), folder, digest in zip(checks, arguments[1::2], arguments[2::2], strict=True):
        try:
            files = check(Path(folder), digest)
        except (Mismatch, OSError) as error:
            print(f"The {what} in {folder} is refused: {error}", file=sys.stderr)
            return 1
        print(f"Verified {files} files of the {what} against {digest}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
