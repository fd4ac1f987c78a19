"""A real browser, spoken to over the pipe that it offers (Chrome DevTools Protocol): what a page measures, asks for, and looks like."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 60


@dataclass
class Seen:
    """A page at one width."""

    width: float
    height: float
    requests: list[str]
    complaints: list[str]
    screenshot: bytes


@dataclass
class Browser:
    """One tab of a browser that runs without a screen."""

    commands: int
    answers: int
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    _number: int = 0
    _read: bytes = b""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; what the browser tells meanwhile goes to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def wait_for(self, event: str) -> None:
        while not any(told.get("method") == event for told in self.events):
            self.events.append(self._next())

    def look(self, page: Path, width: int) -> Seen:
        """Open a file in a window of so many pixels' width, as a phone or a desk would show it."""
        self.events.clear()
        is_phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=is_phone)
        self.call("Page.navigate", url=page.as_uri())
        self.wait_for("Page.loadEventFired")
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        told = {
            method: [event["params"] for event in self.events if event.get("method") == method]
            for method in ("Network.requestWillBeSent", "Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        }
        requests = [params["request"]["url"] for params in told.pop("Network.requestWillBeSent")]
        complaints = [json.dumps(params) for kind in told.values() for params in kind]
        return Seen(size["width"], size["height"], requests, complaints, base64.b64decode(picture))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            piece = os.read(self.answers, 1 << 20)
            assert piece, "the browser went away"
            self._read += piece
        message, _, self._read = self._read.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Chromium without a screen. Fails where there is none: Debian's package is `chromium`."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program is not None, "no browser: install Debian's package chromium"
    read_commands, commands = os.pipe()
    answers, write_answers = os.pipe()
    options = f"--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile} about:blank"
    shell = f"exec {program} {options} 3<&{read_commands} 4>&{write_answers}"
    process = subprocess.Popen(["bash", "-c", shell], pass_fds=(read_commands, write_answers), stderr=subprocess.DEVNULL)
    os.close(read_commands)
    os.close(write_answers)
    try:
        found = Browser(commands, answers)
        target = found.call("Target.createTarget", url="about:blank")["targetId"]
        found.session = found.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            found.call(f"{domain}.enable")
        yield found
    finally:
        process.terminate()
        process.wait(timeout=SECONDS)
        os.close(commands)
        os.close(answers)
