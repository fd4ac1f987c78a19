"""The base model is fetched once, at a commit, without anything that could run code; what the hub refuses is named."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.unit.trainer.builders import make_config, replace, run_stage
from tests.unit.trainer.hubs import COMMIT, Hub, hub_of

from tuneloop_trainer.bases import base_digest, prepare_base, require_base
from tuneloop_trainer.contract import Base, ExitCode, Paths, Reason, Stage
from tuneloop_trainer.errors import Invalid, Mismatch, Unavailable

HUB = Base(uri="hf://org/tiny", repository="org/tiny")
OTHER_COMMIT = "f" * 40


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return make_config(tmp_path, tmp_path).paths


@pytest.fixture
def hub(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_of(base, monkeypatch) as served:
        yield served


def test_model_without_a_revision_is_fetched_once_at_its_commit_without_pickles(hub: Hub, paths: Paths, base: Path) -> None:
    hub.files |= {"pytorch_model.bin": b"pickle", "modeling.py": b"code", "../escaped.json": b"{}", "onnx/model.safetensors": b""}

    found = prepare_base(HUB, paths)
    downloads = [asked for asked in hub.asked if asked.startswith("GET /org")]
    again = prepare_base(HUB, paths)

    assert found.revision == COMMIT
    assert found.folder.name == f"org--tiny@{COMMIT}"
    assert again == found
    assert base_digest(found.folder) == base_digest(base), "the digest is that of the files, wherever they lie"
    assert [asked for asked in hub.asked if asked.startswith("GET /org")] == downloads, "the second run reads the cache"
    assert {path.name for path in found.folder.iterdir()} == {path.name for path in base.iterdir()} | {"manifest.json"}
    assert not list(Path(paths.cache).rglob("escaped.json"))


def test_runs_that_want_a_model_at_the_same_time_fetch_it_once(hub: Hub, paths: Paths) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: prepare_base(HUB, paths), range(3)))

    assert found[0] == found[1] == found[2]
    files = [asked for asked in hub.asked if asked.startswith("GET /org")]
    assert len(files) == len(set(files)) > 3, files


def test_model_is_fetched_all_the_same_where_the_store_has_no_locks(hub: Hub, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(file: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuses)
    assert (prepare_base(HUB, paths).folder / "config.json").is_file()


def test_commit_that_is_in_the_cache_needs_no_hub(hub: Hub, paths: Paths) -> None:
    pinned = HUB.model_copy(update={"revision": COMMIT})
    prepare_base(pinned, paths)
    hub.asked.clear()

    assert prepare_base(pinned, paths).revision == COMMIT
    assert hub.asked == []


@pytest.mark.parametrize(
    ("status", "reason"),
    [(404, Reason.MODEL_NOT_FOUND), (401, Reason.ACCESS_DENIED), (403, Reason.ACCESS_DENIED)],
)
def test_refusal_of_the_hub_is_named_at_once(status: int, reason: Reason, hub: Hub, paths: Paths) -> None:
    hub.failures = [status] * 3

    with pytest.raises(Invalid, match="hf://org/tiny") as caught:
        prepare_base(HUB, paths)
    assert caught.value.reason == reason
    assert len(hub.asked) == 1
    assert list(Path(paths.cache).rglob("*.safetensors")) == []


SECRET = "hf_" + "s3cr3t" * 5


@pytest.mark.parametrize("token", [None, "hf_another"])
def test_gated_model_without_the_right_token_is_refused_before_a_device_is_taken(
    token: str | None, hub: Hub, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated_by = SECRET
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)

    result = run_stage(replace(make_config(tmp_path, base), base=HUB), Stage.PREPARE)

    assert (result.exit_code, result.reason) == (ExitCode.INVALID, Reason.ACCESS_DENIED)
    assert "hf://org/tiny is gated: the token may not read it" in result.message
    assert len(hub.asked) == 1
    assert list(Path(make_config(tmp_path, base).paths.cache).rglob("*.safetensors")) == []


def test_gated_model_is_read_with_its_token_which_is_told_to_nobody_else(
    hub: Hub, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    hub.gated_by = SECRET
    monkeypatch.setenv("HF_TOKEN", SECRET)
    caplog.set_level(logging.DEBUG)

    result = run_stage(replace(make_config(tmp_path, base), base=HUB), Stage.PREPARE)

    assert result.exit_code == ExitCode.DONE
    assert hub.tokens == {f"Bearer {SECRET}"}
    shown = [result.model_dump_json(), caplog.text, *capfd.readouterr()]
    assert not any(SECRET in text for text in shown)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not any(SECRET.encode() in path.read_bytes() for path in written)


@pytest.mark.parametrize("status", [500, 404])
def test_failure_of_the_hub_does_not_tell_the_token(
    status: int, hub: Hub, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.failures = [status] * 20
    monkeypatch.setenv("HF_TOKEN", SECRET)
    caplog.set_level(logging.DEBUG)

    result = run_stage(replace(make_config(tmp_path, base), base=HUB), Stage.PREPARE)

    assert result.exit_code != ExitCode.DONE
    assert SECRET not in result.model_dump_json() + caplog.text


def test_revision_that_does_not_exist_is_named(hub: Hub, paths: Paths) -> None:
    with pytest.raises(Invalid, match="does not exist at revision v9") as caught:
        prepare_base(HUB.model_copy(update={"revision": "v9"}), paths)
    assert caught.value.reason == Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize("status", [500, 503, 429, 0])
def test_hub_that_is_down_for_a_moment_is_asked_again(status: int, hub: Hub, paths: Paths) -> None:
    hub.failures = [status, status]

    assert prepare_base(HUB, paths).revision == COMMIT


def test_hub_that_stays_down_ends_the_stage_within_bounds_and_leaves_nothing(hub: Hub, paths: Paths) -> None:
    hub.failures = [503] * 100

    with pytest.raises(Unavailable, match="does not answer for hf://org/tiny: HTTP status 503") as caught:
        prepare_base(HUB, paths)
    assert (caught.value.exit_code, caught.value.reason) == (ExitCode.UNAVAILABLE, Reason.SOURCE_UNAVAILABLE)
    assert len(hub.asked) == 3
    assert not [path for path in Path(paths.cache).rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_hub_that_goes_down_during_a_download_leaves_no_half_model(hub: Hub, paths: Paths) -> None:
    pinned = HUB.model_copy(update={"revision": COMMIT})
    real, seen = hub.answer, []

    def goes_down(handler: object) -> None:
        seen.append(handler)
        hub.failures = [503] if len(seen) > 4 else []
        real(handler)  # type: ignore[arg-type]

    hub.answer = goes_down  # type: ignore[method-assign]

    with pytest.raises(Unavailable):
        prepare_base(pinned, paths)
    assert not [path for path in Path(paths.cache).rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_changed_model_is_not_the_pinned_one(paths: Paths, base: Path) -> None:
    local = Base(uri="pvc://models/base", path=str(base))

    assert require_base(local, paths, base_digest(base)) == base
    with pytest.raises(Mismatch, match="changed since it was pinned"):
        require_base(local, paths, "sha256:0")
