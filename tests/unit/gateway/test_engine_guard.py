"""The engine is usable only with its key and on its allowed paths; a model that is not what was approved is not loaded."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tuneloop_gateway import engine_guard
from tuneloop_gateway.engine_guard import Guard, Mismatch, verify, verify_base

KEY = [(b"authorization", b"Bearer the-key")]
LISTED_BY_VLLM = (
    "/ping",
    "/invocations",
    "/v1/load_lora_adapter",
    "/v1/embeddings",
    "/classify",
    "/pooling",
    "/score",
    "/load",
)


class Reached(Exception):
    """The request came through to the engine."""


async def _engine(scope: Any, receive: Any, send: Any) -> None:
    raise Reached


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guard:
    (tmp_path / "engine-key").write_text("the-key\n")
    monkeypatch.setenv("TUNELOOP_ENGINE_KEY_FILE", str(tmp_path / "engine-key"))
    monkeypatch.setenv("TUNELOOP_PROBES_FILE", str(tmp_path / "probes.json"))
    monkeypatch.setenv("TUNELOOP_REFERENCE_FILE", str(tmp_path / "reference.json"))
    return Guard(_engine)


async def ask(
    guard: Guard, path: str, headers: Any = (), method: str = "GET", kind: str = "http", query: bytes = b""
) -> tuple[int, bytes]:  # fmt: skip
    """(status, body); (0, b"") where the engine itself was reached."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("a guard reads no body")

    try:
        extensions = {"websocket.http.response": {}}
        scope = {"type": kind, "method": method, "path": path, "headers": list(headers), "query_string": query, "extensions": extensions}
        await guard(scope, receive, send)
    except Reached:
        return 0, b""
    if kind == "websocket":
        assert "accept" not in sent[0]["type"]
        return sent[0].get("status", 403), b""
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize(
    "path",
    [
        *LISTED_BY_VLLM,
        "/version",
        "/v1/chat/completions",
        "/v1/models",
        "/docs",
        "/openapi.json",
        "/",
        "/tuneloop/probes",
        "/tuneloop/reference",
    ],
)
@pytest.mark.parametrize("headers", [[], [(b"authorization", b"Bearer wrong")], [(b"authorization", b"the-key")], [*KEY, *KEY]])
async def test_without_the_key_every_path_is_401(guard: Guard, path: str, headers: Any) -> None:
    assert (await ask(guard, path, headers))[0] == 401


async def test_health_and_metrics_are_open_for_get_alone(guard: Guard) -> None:
    for path in ("/health", "/metrics"):
        assert (await ask(guard, path))[0] == 0
        assert (await ask(guard, path, method="POST"))[0] == 401
        assert (await ask(guard, path + "/"))[0] == 401


async def test_with_the_key_allowed_paths_reach_the_engine_and_others_do_not(guard: Guard) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/version"):
        assert (await ask(guard, path, KEY, "POST"))[0] == 0
    for path in LISTED_BY_VLLM:
        assert (await ask(guard, path, KEY, "POST"))[0] == 404


async def test_websockets_are_refused_even_with_the_key(guard: Guard) -> None:
    assert (await ask(guard, "/v1/realtime", KEY, kind="websocket"))[0] == 401
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await guard({"type": "websocket", "path": "/v1/realtime", "headers": KEY}, send, send)  # a server that knows no other answer
    assert [m["type"] for m in sent] == ["websocket.close"]


async def test_a_key_file_that_is_missing_or_empty_closes_the_engine(guard: Guard, tmp_path: Path) -> None:
    for content in ("", "\n"):
        (tmp_path / "engine-key").write_text(content)
        assert (await ask(guard, "/v1/models", [(b"authorization", b"Bearer ")]))[0] == 401
    (tmp_path / "engine-key").unlink()
    assert (await ask(guard, "/v1/models", KEY))[0] == 401


@pytest.mark.parametrize("name", ["probes", "reference"])
async def test_what_is_recorded_with_the_model_is_served_with_the_key(guard: Guard, tmp_path: Path, name: str) -> None:
    assert (await ask(guard, f"/tuneloop/{name}", KEY))[0] == 404
    (tmp_path / f"{name}.json").write_text('[{"prompt":"p"}]')
    assert await ask(guard, f"/tuneloop/{name}", KEY) == (200, b'[{"prompt":"p"}]')
    assert (await ask(guard, f"/tuneloop/{name}"))[0] == 401


# --- adapters ------------------------------------------------------------------


class FakeVllm:
    """As much of vLLM as has to do with adapters, as an application of ASGI."""

    def __init__(self) -> None:
        self.adapters: dict[str, str] = {}
        self.refusal = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"] or b"null")
        if scope["method"] == "POST":
            assert (b"content-type", b"application/json") in scope["headers"]
        status, answer = self._answer(scope["method"], scope["path"], body)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    def _answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if (method, path) == ("GET", "/v1/models"):
            listed = [{"id": name, "root": root, "parent": "tone-base"} for name, root in self.adapters.items()]
            return 200, {"data": [{"id": "tone-base", "root": "/volumes/models/base", "parent": None}, *listed]}
        if (method, path) == ("POST", "/v1/load_lora_adapter"):
            if self.refusal:
                return 500, {"error": {"message": self.refusal}}
            assert body["lora_name"] not in self.adapters, "vLLM refuses a name that it has"
            self.adapters[body["lora_name"]] = body["lora_path"]
            return 200, "Success"
        assert (method, path) == ("POST", "/v1/unload_lora_adapter")
        del self.adapters[body["lora_name"]]
        return 200, "Success"


@dataclass
class Shared:
    """An engine for adapters behind its guard, and a folder of claims with adapters to load."""

    vllm: FakeVllm
    guard: Guard
    folder: Path

    def adapter(self, name: str, **changes: Any) -> dict[str, Any]:
        folder = self.folder / "models" / name
        folder.mkdir(parents=True)
        digest = publish(folder, {"adapter_model.safetensors": name.encode()})
        return {"name": name, "path": str(folder), "digest": digest, "probes": None, "reference": None} | changes

    async def want(self, *adapters: dict[str, Any], generation: int = 1) -> tuple[int, Any]:
        return await self.put(json.dumps({"generation": generation, "adapters": adapters}).encode())

    async def put(self, body: bytes, headers: Any = KEY) -> tuple[int, Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "PUT", "path": "/tuneloop/adapters", "headers": headers, "query_string": b""}
        await self.guard(scope, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.fixture
def shared(guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shared:
    """`guard` is there for the key."""
    monkeypatch.setattr(engine_guard, "MODELS_FOLDER", tmp_path / "volumes")
    vllm = FakeVllm()
    return Shared(vllm, Guard(vllm), tmp_path / "volumes")


async def test_what_is_wanted_is_verified_and_loaded_under_its_name_from_its_path(shared: Shared) -> None:
    first, second = shared.adapter("v1"), shared.adapter("v2")
    assert await shared.want(first) == (200, {"loaded": ["v1"], "errors": {}})
    assert await shared.want(first, second, generation=2) == (200, {"loaded": ["v1", "v2"], "errors": {}})
    assert shared.vllm.adapters == {"v1": first["path"], "v2": second["path"]}


async def test_what_is_wanted_no_more_is_unloaded(shared: Shared) -> None:
    first, second = shared.adapter("v1"), shared.adapter("v2")
    await shared.want(first, second)
    assert await shared.want(second, generation=2) == (200, {"loaded": ["v2"], "errors": {}})


async def test_a_gateway_that_lags_behind_changes_nothing_and_learns_what_is_there(shared: Shared) -> None:
    first, second = shared.adapter("v1"), shared.adapter("v2")
    await shared.want(first, second, generation=5)
    assert await shared.want(first, generation=4) == (200, {"loaded": ["v1", "v2"], "errors": {}})


async def test_an_adapter_whose_files_changed_is_not_loaded(shared: Shared) -> None:
    adapter = shared.adapter("v1")
    (Path(adapter["path"]) / "adapter_model.safetensors").write_bytes(b"xx")
    status, said = await shared.want(adapter)
    assert (status, said["loaded"], shared.vllm.adapters) == (200, [], {})
    refused = f"The adapter in {adapter['path']} is refused: adapter_model.safetensors is not what was published"
    assert said["errors"]["v1"].startswith(refused)


async def test_the_engines_own_sentence_is_told_and_the_next_try_may_succeed(shared: Shared) -> None:
    adapter = shared.adapter("v1")
    shared.vllm.refusal = "LoRA rank 64 is greater than max_lora_rank 16."
    assert await shared.want(adapter) == (200, {"loaded": [], "errors": {"v1": shared.vllm.refusal}})
    shared.vllm.refusal = ""
    assert await shared.want(adapter) == (200, {"loaded": ["v1"], "errors": {}})


@pytest.mark.parametrize("path", ["/etc", "relative", "{claims}/../secrets", "{claims}/link", "{claims}/models\0x"])
async def test_nothing_outside_of_the_claims_is_loaded(shared: Shared, path: str, tmp_path: Path) -> None:
    shared.folder.mkdir()
    (tmp_path / "secrets").mkdir()
    (shared.folder / "link").symlink_to(tmp_path / "secrets")
    adapter = shared.adapter("v1", path=path.format(claims=shared.folder))
    assert (await shared.want(adapter))[0] == 400
    assert shared.vllm.adapters == {}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", b'{"generation": "1", "adapters": []}', b'{"generation": 1, "adapters": 7}',
        b'{"generation": 1, "adapters": [{}]}',
        b'{"generation": 1, "adapters": [{"name": 1, "path": "/volumes/x", "digest": "d"}]}', b"[" * 100_000, b"x" * (2 << 20),
        json.dumps({"generation": 1, "adapters": [{"name": "v", "path": "/volumes/x", "digest": "d"}] * 33}).encode(),
        json.dumps({"generation": 1, "adapters": [{"name": "v", "path": "/volumes/x", "digest": "d", "probes": 1}]}).encode(),
    ],
)  # fmt: skip
async def test_what_is_no_list_of_adapters_is_refused(shared: Shared, body: bytes) -> None:
    assert (await shared.put(body))[0] == 400


async def test_nobody_without_the_key_has_anything_loaded(shared: Shared) -> None:
    adapter = shared.adapter("v1")
    body = json.dumps({"generation": 1, "adapters": [adapter]}).encode()
    assert (await shared.put(body, []))[0] == 401
    assert shared.vllm.adapters == {}
    for method in ("GET", "POST", "DELETE"):
        assert (await ask(shared.guard, "/tuneloop/adapters", KEY, method))[0] == 404


async def test_each_adapter_has_its_own_recorded_items(shared: Shared) -> None:
    probes = shared.folder / "runs.json"
    adapter = shared.adapter("v1", probes=str(probes))
    assert (await ask(shared.guard, "/tuneloop/probes", KEY, query=b"model=v1"))[0] == 409
    await shared.want(adapter)
    assert (await ask(shared.guard, "/tuneloop/probes", KEY, query=b"model=v1"))[0] == 404
    probes.write_text("[1]")
    assert await ask(shared.guard, "/tuneloop/probes", KEY, query=b"model=v1") == (200, b"[1]")
    assert (await ask(shared.guard, "/tuneloop/reference", KEY, query=b"model=v1"))[0] == 404
    assert (await ask(shared.guard, "/tuneloop/probes", KEY, query=b"model=v2"))[0] == 409


async def test_recorded_items_are_not_read_from_outside_of_the_claims(shared: Shared, tmp_path: Path) -> None:
    (tmp_path / "engine-key").touch()
    await shared.want(shared.adapter("v1", probes=str(tmp_path / "engine-key"), reference="/proc/self/environ"))
    for name in ("probes", "reference"):
        assert (await ask(shared.guard, f"/tuneloop/{name}", KEY, query=b"model=v1"))[0] == 404


def test_the_guard_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; import engine_guard; print(sorted(m for m in sys.modules if m.split('.')[0] in ('starlette', 'aiohttp', 'pydantic')))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=Path(engine_guard.__file__).parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- verification ----------------------------------------------------------------


def publish(folder: Path, files: dict[str, bytes], /, **changed: Any) -> str:
    """A folder with a manifest as the trainer writes it; its digest."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    listed = [{"path": n, "size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in sorted(files.items())]
    manifest = {"version": 1, "kind": "model", "files": listed, "metadata": {"accuracy": 0.905, "é": None}, **changed}
    raw = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    (folder / "manifest.json").write_bytes(raw)
    return "sha256:" + hashlib.sha256(raw).hexdigest()


FILES = {"model.safetensors": b"weights" * 100, "config.json": b"{}", "tokenizer/vocab.json": b"{}"}


def test_the_published_folder_is_verified(tmp_path: Path) -> None:
    assert verify(tmp_path, publish(tmp_path, FILES)) == 3


def test_the_card_of_a_copy_may_lie_beside_what_is_listed(tmp_path: Path) -> None:
    digest = publish(tmp_path, FILES)
    (tmp_path / "MODEL_CARD.md").write_text("# sentiment")
    assert verify(tmp_path, digest) == 3


def test_the_digest_is_the_trainers(tmp_path: Path) -> None:
    contract = pytest.importorskip("tuneloop_trainer.contract")
    digest = publish(tmp_path, FILES)
    assert contract.Manifest.model_validate_json((tmp_path / "manifest.json").read_bytes()).digest() == digest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"weightz" * 100), "model.safetensors is not what was published"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "has 5 bytes instead of 700"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "modeling_evil.py").write_bytes(b"x"), "modeling_evil.py is not in the manifest"),
        (lambda f: (f / "link").symlink_to("/etc"), "link is not in the manifest"),
        (lambda f: (f / "MODEL_CARD.md").symlink_to("/etc/passwd"), "MODEL_CARD.md is not in the manifest"),
        (lambda f: (f / "tokenizer" / "MODEL_CARD.md").write_bytes(b"x"), "tokenizer/MODEL_CARD.md is not in the manifest"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is not a manifest"),
        (lambda f: publish(f, {**FILES, "config.json": b"{ }"}), "but sha256:"),
    ],
)
def test_any_change_is_refused_with_what_changed(tmp_path: Path, change: Any, says: str) -> None:
    digest = publish(tmp_path, FILES)
    change(tmp_path)
    with pytest.raises(Mismatch, match=says.replace("(", r"\(")):
        verify(tmp_path, digest)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "vision/preprocessor_config.json"])
def test_a_model_that_brings_code_along_is_not_loaded(tmp_path: Path, name: str) -> None:
    digest = publish(tmp_path, {**FILES, name: b'{"auto\\u005fmap": {"AutoConfig": "evil.Config"}}'})
    with pytest.raises(Mismatch, match="needs code of its own") as refused:
        verify(tmp_path, digest)
    assert name in str(refused.value)


def test_a_base_that_brings_code_along_is_not_loaded(tmp_path: Path) -> None:
    bases = pytest.importorskip("tuneloop_trainer.bases")
    (tmp_path / "config.json").write_text('{"auto_map": {}}')
    with pytest.raises(Mismatch, match="needs code of its own"):
        verify_base(tmp_path, bases.base_digest(tmp_path))


def make_base(folder: Path) -> str:
    """A base model with files that count and files that do not; its digest by the trainer."""
    bases = pytest.importorskip("tuneloop_trainer.bases")
    (folder / "onnx").mkdir(parents=True)
    counted = ("model.safetensors", "config.json", "chat_template.jinja", "merges.txt", "tokenizer.model")
    for name in (*counted, "manifest.json", "onnx/config.json", "README.md", "pytorch_model.bin"):
        (folder / name).write_bytes(name.encode())
    return str(bases.base_digest(folder))


def test_the_digest_of_a_base_is_the_trainers(tmp_path: Path) -> None:
    assert verify_base(tmp_path / "base", make_base(tmp_path / "base")) == 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"model.safetensorz"), "the adapter was trained on sha256:"),
        (lambda f: (f / "added_tokens.json").write_bytes(b"{}"), "the adapter was trained on sha256:"),
        (lambda f: (f / "config.json").unlink(), "Restore that base, or train again"),
        (lambda f: f.rename(f.parent / "away"), "does not exist"),
    ],
)
def test_another_base_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    digest = make_base(tmp_path / "base")
    change(tmp_path / "base")
    with pytest.raises(Mismatch, match=says):
        verify_base(tmp_path / "base", digest)


def test_a_manifest_cannot_point_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    listed = [{"path": "../outside", "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}]
    digest = publish(tmp_path / "model", {}, files=listed)
    with pytest.raises(Mismatch, match="outside of the folder"):
        verify(tmp_path / "model", digest)


@pytest.mark.process
def test_the_command_fails_closed(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    digest, base = publish(tmp_path, FILES), tmp_path_factory.mktemp("x") / "base"
    base_digest = make_base(base)
    for arguments, code, says in (
        (["verify", str(tmp_path), digest], 0, "Verified 3 files of the model"),
        (["verify", str(tmp_path), "sha256:" + "0" * 64], 1, "refused"),
        (["verify", str(tmp_path), ""], 1, "is no digest"),
        (["verify", str(tmp_path / "nowhere"), digest], 1, "manifest.json is missing"),
        (["verify", str(tmp_path)], 2, "usage"),
        (["verify", str(tmp_path), digest, str(base), base_digest], 0, "of the base model against"),
        (["verify", str(tmp_path), "sha256:" + "0" * 64, str(base), base_digest], 1, f"The model in {tmp_path} is refused"),
        (["verify", str(tmp_path), digest, str(base), digest], 1, f"The base model in {base} is refused"),
        (["verify", str(tmp_path), digest, str(base)], 2, "usage"),
        (["verify-base", str(base), base_digest], 0, "of the base model against"),
        (["verify-base", str(base), digest], 1, f"The base model in {base} is refused"),
        ([], 2, "usage"),
    ):
        done = subprocess.run([sys.executable, engine_guard.__file__, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert says in done.stdout + done.stderr
