"""The base model is fetched once, at a revision, without anything that could run code; what the hub refuses is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from tests.unit.trainer.builders import make_config

from tuneloop_trainer.bases import base_digest, prepare_base, require_base
from tuneloop_trainer.contract import Base, Paths, Reason
from tuneloop_trainer.errors import Invalid, Mismatch

HUB = Base(uri="hf://org/tiny", repository="org/tiny", revision="abc")


class Response:
    """What the hub's errors carry."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None

    def __init__(self, status: int) -> None:
        self.status_code = status


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return make_config(tmp_path, tmp_path).paths


def test_hub_model_is_downloaded_once_without_pickles(paths: Paths, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def download(repository: str, **options: Any) -> None:
        calls.append({"repository": repository} | options)
        shutil.copytree(base, options["local_dir"], dirs_exist_ok=True)
        (Path(options["local_dir"]) / ".cache").mkdir()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = prepare_base(HUB, paths)

    assert prepare_base(HUB, paths) == folder
    assert base_digest(folder) == base_digest(base), "the digest is that of the files, wherever they lie"
    assert len(calls) == 1
    assert (calls[0]["repository"], calls[0]["revision"]) == ("org/tiny", "abc")
    assert not [pattern for pattern in calls[0]["allow_patterns"] if "bin" in pattern or "py" in pattern]
    assert not (folder / ".cache").exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RepositoryNotFoundError("no", response=Response(404)), Reason.MODEL_NOT_FOUND),
        (RepositoryNotFoundError("no", response=Response(401)), Reason.ACCESS_DENIED),
        (RevisionNotFoundError("no", response=Response(404)), Reason.MODEL_NOT_FOUND),
        (GatedRepoError("no", response=Response(403)), Reason.ACCESS_DENIED),
    ],
)
def test_refusal_of_the_hub_is_named(error: Exception, reason: Reason, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)

    with pytest.raises(Invalid, match="hf://org/tiny") as caught:
        prepare_base(HUB, paths)
    assert caught.value.reason == reason
    assert list(Path(paths.cache).rglob("*.safetensors")) == []


def test_changed_model_is_not_the_pinned_one(paths: Paths, base: Path) -> None:
    local = Base(uri="pvc://models/base", path=str(base))

    assert require_base(local, paths, base_digest(base)) == base
    with pytest.raises(Mismatch, match="changed since it was pinned"):
        require_base(local, paths, "sha256:0")
