"""The engine is usable only with its key and on its allowed paths; a model that is not what was approved is not loaded."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
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


async def ask(guard: Guard, path: str, headers: Any = (), method: str = "GET", kind: str = "http") -> tuple[int, bytes]:
    """(status, body); (0, b"") where the engine itself was reached."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("a guard reads no body")

    try:
        extensions = {"websocket.http.response": {}}
        await guard({"type": kind, "method": method, "path": path, "headers": list(headers), "extensions": extensions}, receive, send)
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
        ([], 2, "usage"),
    ):
        done = subprocess.run([sys.executable, engine_guard.__file__, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert says in done.stdout + done.stderr
