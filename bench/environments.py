"""Environments and sources of the software that a benchmark is beside, each at a fixed version, kept between runs."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuneloop-bench"


class Source(NamedTuple):
    """A folder of a repository at a commit, for what is not published as a package."""

    name: str
    url: str
    commit: str
    inside: str

    @property
    def folder(self) -> Path:
        return CACHE / f"{self.name}-source" / self.inside

    def fetch(self) -> None:
        """Raises CalledProcessError or TimeoutExpired."""
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            root = CACHE / f"{self.name}-source"
            root.mkdir(parents=True, exist_ok=True)
            git = ["git", "-C", str(root)]
            for command in (
                ["init", "-q"], ["fetch", "-q", "--depth", "1", self.url, self.commit], ["checkout", "-q", self.commit, "--", self.inside]
            ):  # fmt: skip
                subprocess.run([*git, *command], check=True, timeout=300, stdin=subprocess.DEVNULL)


def environment(name: str) -> Path:
    """The interpreter of an environment made of `requirements/bench-<name>.txt` where it is not there. Raises CalledProcessError."""
    pins, folder = ROOT / "requirements" / f"bench-{name}.txt", CACHE / name
    stamp, digest = folder / ".stamp", hashlib.sha256(pins.read_bytes()).hexdigest()
    python = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != digest:
        print(f"making {name}'s environment", flush=True)
        uv = str(ROOT / "dev" / "uv")
        subprocess.run([uv, "venv", "-q", "--clear", "--python", "3.11", folder], check=True, timeout=600)
        subprocess.run([uv, "pip", "install", "-q", "--no-deps", "--python", python, "-r", pins], check=True, timeout=1800)
        stamp.write_text(digest)
    return python
