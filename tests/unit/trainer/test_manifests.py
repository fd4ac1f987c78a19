"""A published folder is complete, readable by others, and refused when it is not what it was."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tuneloop_trainer.errors import Mismatch
from tuneloop_trainer.manifests import files_digest, list_files, publish, staging, verify


@pytest.fixture
def published(tmp_path: Path) -> Path:
    target = tmp_path / "store" / "model"
    umask = os.umask(0o077)
    try:
        with staging(target) as folder:
            (folder / "sub").mkdir()
            (folder / "weights").write_bytes(b"w" * 100)
            (folder / "sub" / "more").write_bytes(b"m")
            publish(folder, target, "model", {"step": 3})
    finally:
        os.umask(umask)
    return target


def test_published_folder_verifies_and_leaves_nothing_behind(published: Path) -> None:
    manifest = verify(published)

    assert [file.path for file in manifest.files] == ["sub/more", "weights"]
    assert manifest.metadata == {"step": 3}
    assert [path.name for path in published.parent.iterdir()] == ["model"]


def test_digest_is_that_of_the_manifest_file(published: Path) -> None:
    content = (published / "manifest.json").read_bytes()

    assert verify(published).digest() == "sha256:" + hashlib.sha256(content).hexdigest()


def test_other_users_may_read_whatever_the_umask(published: Path) -> None:
    assert {oct(path.stat().st_mode & 0o777) for path in published.rglob("*") if path.is_file()} == {"0o644"}
    assert {oct(path.stat().st_mode & 0o777) for path in (published, published / "sub")} == {"0o755"}


@pytest.mark.parametrize("change", ["altered", "cut", "removed", "no manifest", "other digest"])
def test_folder_that_differs_is_refused(published: Path, change: str) -> None:
    expected = None
    match change:
        case "altered":
            (published / "weights").write_bytes(b"v" * 100)
        case "cut":
            (published / "weights").write_bytes(b"w" * 99)
        case "removed":
            (published / "sub" / "more").unlink()
        case "no manifest":
            (published / "manifest.json").unlink()
        case "other digest":
            expected = "sha256:" + "0" * 64

    with pytest.raises(Mismatch):
        verify(published, expected)


def test_failure_while_writing_publishes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"

    with pytest.raises(FileNotFoundError), staging(target) as folder:
        publish(folder / "missing", target, "model", {})

    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_attempt_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".model.tmp-dead").mkdir()

    with staging(tmp_path / "model") as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_publishing_again_replaces(published: Path) -> None:
    with staging(published) as folder:
        (folder / "new").write_bytes(b"n")
        publish(folder, published, "model", {})

    assert [file.path for file in verify(published).files] == ["new"]
    assert [path.name for path in published.parent.iterdir()] == ["model"]


def test_digest_of_files_does_not_depend_on_where_they_lie(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")

    assert files_digest(list_files(tmp_path / "a")) == files_digest(list_files(tmp_path / "b"))
