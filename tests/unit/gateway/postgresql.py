"""Debian's PostgreSQL for the tests of the store: one server for each test process, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

COMMAND = Path(__file__).parents[3] / "dev" / "postgresql"
READY_SECONDS = 60.0


class Missing(Exception):
    """There is no server on this machine."""


class Server:
    """`dev/postgresql serve` as a child of this process: its pid is the server's, and it ends with us."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tuneloop-postgresql-"))
        self.url = _output("url", str(self.folder))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Returns when connections are taken. Raises Missing where the package is not installed."""
        try:
            _output("bin")
        except subprocess.CalledProcessError as error:
            raise Missing(error.stderr.strip()) from None
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen((COMMAND, "serve", self.folder), stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + READY_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "server.log").read_text()[-2000:])
            time.sleep(0.02)
        return self

    def _is_ready(self) -> bool:
        try:
            lines = (self.folder / "data" / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        assert self._process is not None
        return len(lines) >= 8 and lines[0] == str(self._process.pid) and lines[7].strip() == "ready"

    def kill(self) -> None:
        """As if its machine went away: connections break at once, nothing is finished."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
            self._process = None

    @contextmanager
    def largest_file(self, size: int) -> Iterator[None]:
        """No file of the server grows beyond `size` bytes meanwhile. Its log of 1 MiB pieces goes on."""
        assert self._process is not None
        _limit(self._process.pid, size)
        try:
            yield
        finally:
            _limit(self._process.pid, "unlimited")

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _limit(server: int, size: int | str) -> None:
    for pid in (server, *(child.pid for child in psutil.Process(server).children())):
        # As the server's user: root without the capability for it may not.
        user = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups") if os.getuid() == 0 else ()
        subprocess.run((*user, "prlimit", f"--pid={pid}", f"--fsize={size}:unlimited"), check=False, capture_output=True)


def _output(*arguments: str) -> str:
    return subprocess.run((COMMAND, *arguments), check=True, capture_output=True, text=True).stdout.strip()
