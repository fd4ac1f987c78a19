"""Published folders: built under a temporary name, listed in a manifest with sha256 per file, made visible by one rename."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from tuneloop_trainer.contract import Manifest, ManifestFile
from tuneloop_trainer.errors import Mismatch

MANIFEST = "manifest.json"
Metadata = dict[str, str | int | float | bool | None]
_CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """The file's sha256 as hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def list_files(folder: Path, patterns: tuple[str, ...] = ("*",)) -> tuple[ManifestFile, ...]:
    """Every regular file below the folder that matches a pattern, sorted by path; the manifest itself left out."""
    paths = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    names = sorted((path.relative_to(folder).as_posix(), path) for path in paths)
    return tuple(ManifestFile(path=name, size=path.stat().st_size, sha256=sha256_file(path)) for name, path in names if name != MANIFEST)


def files_digest(files: tuple[ManifestFile, ...]) -> str:
    """`sha256:<hex>` over names, sizes and contents, whatever the folder is called."""
    return Manifest(kind="model", files=files).digest()


def verify(folder: Path, expected: str | None = None) -> Manifest:
    """The folder's manifest, once every listed file is there with its size and hash. Raises Mismatch."""
    manifest = read_manifest(folder)
    if expected is not None and manifest.digest() != expected:
        raise Mismatch(f"{folder.name} has the manifest {manifest.digest()}, not {expected}.")
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.size or sha256_file(path) != file.sha256:
            raise Mismatch(f"{folder.name}/{file.path} is missing or differs from its manifest.")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest as it stands, its files unchecked. Raises Mismatch."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise Mismatch(f"{folder.name} has no readable manifest.") from error


@contextmanager
def staging(target: Path, shared: bool = False) -> Iterator[Path]:
    """A new folder beside the target, on the same file system; gone afterwards unless it was published.

    What a killed attempt left is removed first, but not in a `shared` parent, where it may be another run's.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.tmp-"
    if not shared:
        for leftover in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = target.parent / f"{prefix}{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path, kind: Literal["dataset", "checkpoint", "model"], metadata: Metadata) -> Manifest:
    """Write the manifest, make everything readable for other users, flush to disk, and rename the folder to its target."""
    manifest = Manifest(kind=kind, files=list_files(folder), metadata=metadata)
    (folder / MANIFEST).write_bytes(manifest.canonical())
    open_to_readers(folder)
    flush(folder)
    aside = target.parent / f".{target.name}.old-{secrets.token_hex(4)}"
    if target.exists():
        target.rename(aside)
    folder.rename(target)
    _flush_entry(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
    return manifest


def open_to_readers(folder: Path) -> None:
    """0755 and 0644, whatever the umask: the engine reads under another user id."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def flush(folder: Path) -> None:
    """fsync of every file and folder, deepest first."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _flush_entry(path)
    _flush_entry(folder)


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace one file by rename, readable for everybody."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp-{secrets.token_hex(4)}"
    temporary.write_bytes(content)
    temporary.chmod(0o644)
    if durable:
        _flush_entry(temporary)
    temporary.replace(path)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
