"""A pushed model is pulled back whole, and a store that refuses or hangs ends the stage with a reason, soon."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from tests.unit.trainer import stores

from tuneloop_gateway import engine_guard
from tuneloop_trainer.contract import EvaluateSummary, ExitCode, Manifest, Push, Reason, Stage, StageResult
from tuneloop_trainer.errors import Invalid, Mismatch, Unavailable
from tuneloop_trainer.stages.outputs import MODEL_CARD
from tuneloop_trainer.stages.push import push
from tuneloop_trainer.stores import oci, s3
from tuneloop_trainer.stores.buckets import filesystem
from tuneloop_trainer.stores.credentials import registry_login
from tuneloop_trainer.stores.registry import MANIFEST_TYPE, Registry

PASSWORD = "a password for tests"
PASSWORD_HASH = "$2b$04$abcdefghijklmnopqrstuuU9tuCsSfvqLb3ZvMivaBDcGya0m8DpG"
"""The registry takes bcrypt alone."""
needs_registry = pytest.mark.skipif(not stores.has_registry(), reason="Debian's docker-registry is not installed")
needs_s3 = pytest.mark.skipif(not stores.has_s3(), reason="not built: dev/s3 install")


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, Manifest]:
    return stores.make_model(tmp_path / "artifact")


@pytest.fixture
def card(tmp_path: Path) -> Path:
    path = tmp_path / "evaluate" / MODEL_CARD
    path.parent.mkdir()
    path.write_text("# tiny\n\nVerdict: Pass\n")
    return path


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with stores.registry(tmp_path_factory.mktemp("registry") / "data") as address:
        yield address


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("s3") / "data"
    with stores.s3(folder) as endpoint:
        yield endpoint, folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def s3_secret(folder: Path, endpoint: str, secret: str = stores.SECRET) -> str:
    return stores.write_secret(folder, AWS_ACCESS_KEY_ID=stores.ACCESS, AWS_SECRET_ACCESS_KEY=secret, AWS_ENDPOINT_URL=endpoint)


# --- OCI ----------------------------------------------------------------------


@needs_registry
def test_model_is_an_artifact_that_can_be_pulled(registry: str, model: tuple[Path, Manifest], card: Path, tmp_path: Path) -> None:
    folder, manifest = model
    digest = oci.push_model(Push(uri=f"oci://{registry}/team/tiny:v1", plain_http=True), folder, manifest, card)

    answer = requests.get(f"http://{registry}/v2/team/tiny/manifests/v1", headers={"Accept": MANIFEST_TYPE}, timeout=5)
    image = answer.json()
    assert answer.headers["Docker-Content-Digest"] == digest
    assert image["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert image["annotations"]["dev.tuneloop.manifest-digest"] == manifest.digest()
    kinds = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"].rsplit(".", 2)[0] for layer in image["layers"]}
    assert kinds == {
        "README.md": "application/vnd.cncf.model.doc",
        "MODEL_CARD.md": "application/vnd.cncf.model.doc",
        "config.json": "application/vnd.cncf.model.weight.config",
        "model.safetensors": "application/vnd.cncf.model.weight",
        "manifest.json": "application/vnd.cncf.model.weight.config",
    }
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for layer in image["layers"]:
        blob = requests.get(f"http://{registry}/v2/team/tiny/blobs/{layer['digest']}", timeout=5).content
        (pulled / layer["annotations"]["org.opencontainers.image.title"]).write_bytes(blob)
    assert contents(pulled) == contents(folder) | contents(card.parent)
    assert engine_guard.verify(pulled, manifest.digest()) == 3, "an engine takes the copy for the model that was evaluated"


@needs_registry
def test_equal_models_have_equal_digests_and_a_second_push_uploads_nothing(
    registry: str, model: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Push(uri=f"oci://{registry}/team/equal", plain_http=True)
    first = oci.push_model(target, *model)
    other = stores.make_model(tmp_path / "again")
    monkeypatch.setattr(Registry, "_ask", _without(Registry._ask, "POST"))
    assert oci.push_model(target, *other) == first
    tags = requests.get(f"http://{registry}/v2/team/equal/tags/list", timeout=5).json()["tags"]
    assert tags == [f"sha256-{model[1].digest()[7:19]}"]


def _without(ask: Any, method: str) -> Any:
    def asked(self: Registry, verb: str, *args: Any, **kwargs: Any) -> Any:
        assert verb != method, "the blobs are there already"
        return ask(self, verb, *args, **kwargs)

    return asked


@needs_registry
def test_registry_with_passwords_takes_the_model_of_who_knows_them(tmp_path: Path, model: tuple[Path, Manifest]) -> None:
    (tmp_path / "htpasswd").write_text(f"{stores.ACCESS}:{PASSWORD_HASH}\n")
    with stores.registry(tmp_path / "data", tmp_path / "htpasswd") as address:
        right = stores.write_secret(tmp_path / "right", username=stores.ACCESS, password=PASSWORD)
        wrong = stores.write_secret(tmp_path / "wrong", username=stores.ACCESS, password="wrong")
        oci.push_model(Push(uri=f"oci://{address}/tiny:v1", credentials=right, plain_http=True), *model)
        for credentials in (wrong, None):
            with pytest.raises(Invalid) as refused:
                oci.push_model(Push(uri=f"oci://{address}/tiny:v1", credentials=credentials, plain_http=True), *model)
            assert refused.value.reason is Reason.ACCESS_DENIED


def test_blob_that_comes_back_otherwise_is_told(model: tuple[Path, Manifest]) -> None:
    class Forgetful(Registry):
        def put_blob(self, content: bytes | Path, digest: str) -> None:
            """As if it went well."""

        def put_manifest(self, content: bytes, tag: str) -> None:
            self.manifest = content

        def get_manifest(self, reference: str) -> bytes:
            return self.manifest

        def digest_of_blob(self, digest: str) -> str:
            return "sha256:" + hashlib.sha256(b"").hexdigest()

    with pytest.raises(Mismatch, match="gives back another blob"):
        oci.push_model(Push(uri="oci://registry.test/tiny:v1"), *model, registry=Forgetful("registry.test", "tiny"))


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (401, Invalid, Reason.ACCESS_DENIED),
        (403, Invalid, Reason.ACCESS_DENIED),
        (404, Invalid, Reason.STORE_UNAVAILABLE),
        (500, Unavailable, Reason.STORE_UNAVAILABLE),
        (None, Unavailable, Reason.STORE_UNAVAILABLE),
    ],
)
def test_registry_that_refuses_or_hangs_is_a_typed_error_soon(
    model: tuple[Path, Manifest], status: int | None, error: type[Exception], reason: Reason
) -> None:
    pauses: list[float] = []
    with stores.answering(status) as (address, asked):
        started = time.monotonic()
        client = Registry(address, "tiny", plain_http=True, timeouts=(0.2, 0.2), pause=pauses.append)
        with pytest.raises(error) as raised:
            oci.push_model(Push(uri=f"oci://{address}/tiny:v1", plain_http=True), *model, registry=client)
    assert raised.value.reason is reason  # type: ignore[attr-defined]
    assert time.monotonic() - started < 5
    assert len(asked) <= 6
    assert pauses == ([2.0, 4.0] if error is Unavailable else [])


def test_token_is_not_asked_for_where_credentials_would_go_in_the_clear() -> None:
    client = Registry("registry.test", "tiny", timeouts=(0.1, 0.1))
    with pytest.raises(Invalid, match="not https"):
        client._authorize('Bearer realm="http://elsewhere.test/token",service="x"')


@pytest.mark.parametrize(
    "content",
    [
        {"username": "u", "password": "p"},
        {".dockerconfigjson": json.dumps({"auths": {"registry.test": {"auth": base64.b64encode(b"u:p").decode()}}})},
        {".dockerconfigjson": json.dumps({"auths": {"https://registry.test": {"username": "u", "password": "p"}}})},
    ],
)
def test_logins_are_read_in_every_form(tmp_path: Path, content: dict[str, str]) -> None:
    login = registry_login(stores.write_secret(tmp_path / "secret", **content), "registry.test")
    assert login is not None
    assert (login.user, login.password) == ("u", "p")
    assert repr(login) == "Login()"


@pytest.mark.parametrize("content", [{}, {".dockerconfigjson": "{"}, {".dockerconfigjson": '{"auths": {}}'}, {".dockerconfigjson": "[]"}])
def test_secret_without_a_login_is_refused(tmp_path: Path, content: dict[str, str]) -> None:
    with pytest.raises(Invalid) as refused:
        registry_login(stores.write_secret(tmp_path / "secret", **content), "registry.test")
    assert refused.value.reason is Reason.ACCESS_DENIED


# --- S3 -----------------------------------------------------------------------


@needs_s3
def test_model_is_on_s3_below_its_digest(bucket: tuple[str, Path], model: tuple[Path, Manifest], card: Path, tmp_path: Path) -> None:
    endpoint, data = bucket
    folder, manifest = model
    target = Push(uri="s3://models/team/tiny", credentials=s3_secret(tmp_path / "secret", endpoint))

    assert s3.push_model(target, folder, manifest, card) == manifest.digest()

    stored = data / "models" / "team" / "tiny" / manifest.digest()[7:]
    assert contents(stored) == contents(folder) | contents(card.parent)
    assert engine_guard.verify(stored, manifest.digest()) == 3
    before = {path.name: path.stat().st_mtime_ns for path in stored.iterdir()}
    assert s3.push_model(target, folder, manifest, card) == manifest.digest()
    assert {path.name: path.stat().st_mtime_ns for path in stored.iterdir()} == before, "what is there is verified, not written again"
    card.write_text("# tiny\n\nVerdict: Inconclusive\n")
    s3.push_model(target, folder, manifest, card)
    assert contents(stored) == contents(folder) | contents(card.parent)
    assert {path.name for path in stored.iterdir() if path.stat().st_mtime_ns != before[path.name]} == {MODEL_CARD}


@needs_s3
def test_object_that_was_changed_on_s3_is_told(bucket: tuple[str, Path], model: tuple[Path, Manifest], tmp_path: Path) -> None:
    endpoint, _ = bucket
    target = Push(uri="s3://models/changed", credentials=s3_secret(tmp_path / "secret", endpoint))
    s3.push_model(target, *model)
    with filesystem(target.credentials, "output.push", 5, 1).open_output_stream(
        f"models/changed/{model[1].digest()[7:]}/config.json"
    ) as sink:
        sink.write(b"[]")
    with pytest.raises(Mismatch, match=r"another config\.json"):
        s3.push_model(target, *model)


@needs_s3
@pytest.mark.parametrize(
    ("uri", "secret", "reason"),
    [("s3://models/x", "wrong", Reason.ACCESS_DENIED), ("s3://nothing/x", stores.SECRET, Reason.STORE_UNAVAILABLE)],
    ids=["wrong-key", "no-bucket"],
)
def test_wrong_keys_and_missing_buckets_are_the_users_to_change(
    bucket: tuple[str, Path], model: tuple[Path, Manifest], tmp_path: Path, uri: str, secret: str, reason: Reason
) -> None:
    target = Push(uri=uri, credentials=s3_secret(tmp_path / "secret", bucket[0], secret))
    with pytest.raises(Invalid) as refused:
        s3.push_model(target, *model)
    assert refused.value.reason is reason
    assert secret not in str(refused.value)


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (403, Invalid, Reason.ACCESS_DENIED),
        (404, Invalid, Reason.STORE_UNAVAILABLE),
        (500, Unavailable, Reason.STORE_UNAVAILABLE),
        (None, Unavailable, Reason.STORE_UNAVAILABLE),
    ],
)
def test_s3_that_refuses_or_hangs_is_a_typed_error_soon(
    model: tuple[Path, Manifest], tmp_path: Path, status: int | None, error: type[Exception], reason: Reason
) -> None:
    with stores.answering(status) as (address, _):
        started = time.monotonic()
        target = Push(uri="s3://models/x", credentials=s3_secret(tmp_path / "secret", f"http://{address}"))
        with pytest.raises(error) as raised:
            s3.push_model(target, *model, request_seconds=0.3, attempts=1)
    assert raised.value.reason is reason  # type: ignore[attr-defined]
    assert time.monotonic() - started < 10


def test_s3_without_keys_is_refused(model: tuple[Path, Manifest], tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="AWS_ACCESS_KEY_ID"):
        s3.push_model(Push(uri="s3://models/x", credentials=stores.write_secret(tmp_path / "secret")), *model)


# --- the step after evaluate --------------------------------------------------


def evaluated(manifest: Manifest, verdict: Any) -> StageResult:
    summary = EvaluateSummary(verdict=verdict, artifact_digest=manifest.digest())
    return StageResult(stage=Stage.EVALUATE, exit_code=ExitCode.DONE, evaluate=summary)


@pytest.mark.parametrize("has_card", [True, False], ids=["", "evaluated by an earlier release"])
@pytest.mark.parametrize(("verdict", "pushed"), [("Pass", True), ("NoGates", True), ("Inconclusive", True), ("Fail", False)])
def test_only_what_the_gates_did_not_reject_is_pushed(
    tmp_path: Path, model: tuple[Path, Manifest], card: Path, monkeypatch: pytest.MonkeyPatch, verdict: str, pushed: bool, has_card: bool
) -> None:
    from tests.unit.trainer.builders import make_config, make_progress

    cards: list[Path | None] = []
    monkeypatch.setattr(oci, "push_model", lambda target, folder, manifest, card: cards.append(card) or f"sha256:{target.uri[-1]}")
    config = make_config(tmp_path, tmp_path / "base", push=(Push(uri="oci://registry.test/a"), Push(uri="oci://registry.test/b")))
    paths = config.paths.model_copy(update={"artifact": str(model[0]), "work": str(tmp_path if has_card else tmp_path / "work")})
    config = config.model_copy(update={"paths": paths})
    result = push(config, evaluated(model[1], verdict), make_progress(tmp_path, Stage.EVALUATE))
    assert result.evaluate is not None
    assert result.evaluate.pushed == (("sha256:a", "sha256:b") if pushed else ())
    assert cards == ([card if has_card else None] * 2 if pushed else [])


def test_nothing_of_a_secret_is_logged(tmp_path: Path, model: tuple[Path, Manifest], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = stores.write_secret(tmp_path / "secret", username=stores.ACCESS, password=stores.SECRET)
    with stores.answering(401) as (address, _), pytest.raises(Invalid) as refused:
        oci.push_model(Push(uri=f"oci://{address}/tiny", credentials=secret, plain_http=True), *model)
    assert stores.SECRET not in caplog.text + str(refused.value)


def test_the_script_of_the_s3_server_is_sound() -> None:
    assert subprocess.run(["bash", "-n", str(stores.ROOT / "dev" / "s3")], check=False).returncode == 0
