"""The cluster as the demo uses it: through kubectl, as a user would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class CommandFailed(Exception):
    """A command ended with an error; the message is what it printed last."""


def run(*command: str, stdin: str | None = None, timeout: float = 600) -> str:
    """What the command printed. Raises CommandFailed with the end of its errors."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        raise CommandFailed(f"{' '.join(command[:6])} failed:\n{(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


class Namespace:
    """One namespace of the current context."""

    def __init__(self, name: str) -> None:
        self.name = name

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout: float = 600) -> str:
        return run("kubectl", "-n", self.name, *arguments, stdin=stdin, timeout=timeout)

    def apply(self, manifest: Path | str) -> str:
        """Applies a file, or the text of one."""
        if isinstance(manifest, Path):
            return self.kubectl("apply", "-f", str(manifest))
        return self.kubectl("apply", "-f", "-", stdin=manifest)

    def get(self, resource: str, name: str) -> dict[str, Any] | None:
        """The object, or None where there is none."""
        text = self.kubectl("get", resource, name, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def list(self, resource: str, selector: str = "") -> list[dict[str, Any]]:
        return list(json.loads(self.kubectl("get", resource, "-l", selector, "-o", "json"))["items"])

    def wait_until(
        self,
        resource: str,
        name: str,
        done: Callable[[dict[str, Any]], bool],
        show: Callable[[dict[str, Any]], str] | None = None,
        timeout: float = 1800,
    ) -> dict[str, Any]:
        """Looks at an object until `done`, printing what `show` says whenever it changes. Raises TimeoutError with the last status."""
        shown, found, end = "", None, time.monotonic() + timeout
        while time.monotonic() < end:
            found = self.get(resource, name)
            if found is not None:
                line = show(found) if show else ""
                if line and line != shown:
                    say(line)
                    shown = line
                if done(found):
                    return found
            time.sleep(2)
        status = json.dumps((found or {}).get("status"), indent=1)[:3000]
        raise TimeoutError(f"{resource} {name} did not get there in {timeout:.0f} s; its status: {status}")

    @contextmanager
    def forward(self, target: str, port: int) -> Iterator[str]:
        """A local URL that leads to a port of a Service, for the time of the block."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            local = probe.getsockname()[1]
        command = ["kubectl", "-n", self.name, "port-forward", target, f"{local}:{port}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            if "Forwarding" not in process.stdout.readline():
                raise CommandFailed(f"kubectl port-forward {target} {port} does not work.")
            yield f"http://127.0.0.1:{local}"
        finally:
            process.terminate()
            process.wait()


def condition(found: dict[str, Any], type_: str) -> dict[str, Any]:
    """A condition of an object, or an empty one."""
    return next((c for c in found.get("status", {}).get("conditions", []) if c["type"] == type_), {})


START = float(os.environ.get("TUNELOOP_T0", time.time()))


def say(text: str = "") -> None:
    """One line of the story, with the time since its start."""
    seconds = int(time.time() - START)
    print(f"[{seconds // 60:3d}:{seconds % 60:02d}] {text}" if text else "", flush=True)
