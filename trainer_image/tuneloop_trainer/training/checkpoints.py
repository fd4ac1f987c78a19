"""Checkpoints with a manifest each: only a complete one is ever resumed from."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tuneloop_trainer.contract import Manifest, Reason
from tuneloop_trainer.errors import Mismatch, Unavailable
from tuneloop_trainer.manifests import publish, read_manifest, verify, write_atomically
from tuneloop_trainer.training.publishing import Publisher
from tuneloop_trainer.training.world import World

log = logging.getLogger("tuneloop.checkpoints")
PREFIX = "step-"
POSITION = "position.json"
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
WEIGHTS = (*ADAPTER, "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json")


OUTAGE_SECONDS = 600.0
"""So long a run goes on that cannot save: what it does meanwhile would be lost with it."""
FAREWELL_SECONDS = 60.0
"""So long a save is tried again after SIGTERM: the grace period is not much longer."""
AGAIN_SECONDS = 10.0
"""Between attempts to save while the store does not take anything."""


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int
    samples: int


class Checkpoints:
    """The checkpoints of a run, newest last. `plan` is a hash of data order and configuration: others are not resumed from."""

    def __init__(self, folder: Path, plan: str, keep: int, world: World | None = None) -> None:
        self.world = world or World()
        self._folder = folder
        self._plan = plan
        self._keep = max(1, keep)
        self._lost = 0
        self.saved_step: int | None = None
        """Of the newest one that this attempt resumed from or published."""
        self.publisher = Publisher(self.world)
        self.has_missed = False
        """Whether one that was being published beside the training could not be."""
        folder.mkdir(parents=True, exist_ok=True)

    def newest(self) -> Checkpoint | None:
        """The newest one whose every file verifies; torn ones are passed over. The first process looks, and tells the others."""
        found = self.world.told_by_first(self._newest() if self.world.is_first else None)
        return found if found is None else Checkpoint(self._folder / f"{PREFIX}{found.step}", found.step, found.samples)

    def _newest(self) -> Checkpoint | None:
        for step in sorted(self._steps(), reverse=True):
            folder = self._folder / f"{PREFIX}{step}"
            try:
                manifest = verify(folder)
            except Mismatch as error:
                log.warning("checkpoint of step %d is not complete: %s", step, error.message)
                continue
            if manifest.metadata.get("plan") == self._plan:
                return _checkpoint(folder, manifest)
        return None

    def add(self, written: Path, step: int, samples: int, keep_step: int | None = None) -> Checkpoint:
        """Publish a written checkpoint and drop all but the newest few; `keep_step` stays whatever its age."""
        folder = self._folder / f"{PREFIX}{step}"
        manifest = publish(written, folder, "checkpoint", {"plan": self._plan, "step": step, "samples": samples})
        for old in sorted(self._steps())[: -self._keep]:
            if old != keep_step:
                shutil.rmtree(self._folder / f"{PREFIX}{old}", ignore_errors=True)
        return _checkpoint(folder, manifest)

    def get(self, step: int) -> Checkpoint:
        folder = self._folder / f"{PREFIX}{step}"
        return _checkpoint(folder, read_manifest(folder))

    def link_weights(self, checkpoint: Checkpoint, target: Path) -> None:
        """The checkpoint's weights in another folder, without copying them."""
        for pattern in WEIGHTS:
            for path in checkpoint.folder.glob(pattern):
                os.link(path, target / path.name)

    def take_up(self, step: int) -> int:
        """An attempt goes on from this step. Returns how many steps the run has lost so far: done, and to be done again."""
        reached, lost = self._position()
        self._lost = lost + max(0, reached - step)
        self.saved_step = step or None
        self.note_step(step)
        return self._lost

    def note_step(self, step: int) -> None:
        """Remember the last step done, to tell after a kill how many were lost."""
        if not self.world.is_first:
            return
        position = {"plan": self._plan, "reached": step, "lost": self._lost}
        try:
            write_atomically(self._folder / POSITION, json.dumps(position).encode(), durable=False)
        except OSError as error:
            log.warning("step %d is not noted: %s", step, error)

    def _position(self) -> tuple[int, int]:
        """(last step done, steps lost before) of this plan's attempts."""
        try:
            position = json.loads((self._folder / POSITION).read_bytes())
            return (int(position["reached"]), int(position["lost"])) if position["plan"] == self._plan else (0, 0)
        except (OSError, ValueError, KeyError, TypeError):
            return 0, 0

    def _steps(self) -> list[int]:
        names = (path.name.removeprefix(PREFIX) for path in self._folder.glob(f"{PREFIX}*"))
        return [int(name) for name in names if name.isdigit()]


def _checkpoint(folder: Path, manifest: Manifest) -> Checkpoint:
    return Checkpoint(folder, int(manifest.metadata["step"] or 0), int(manifest.metadata["samples"] or 0))


class Saves:
    """Saving to a store that may be full or away: the run goes on without, and ends when that lasted too long."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, wait: Callable[[float], None] = time.sleep) -> None:
        self._clock = clock
        self._wait = wait
        self._failing_since: float | None = None

    def attempt(self, save: Callable[[], None], within: float | None, *, is_all: bool = True) -> bool:
        """Save; False where the store does not take it. With `within` seconds it is tried until then, and not being able to raises
        Unavailable, as it does when nothing could be saved for OUTAGE_SECONDS. `is_all`: it is published with that."""
        started = self._clock()
        while True:
            try:
                save()
            except Exception as error:
                if not is_of_the_store(error):
                    raise
                log.error("the checkpoint cannot be written: %s", error)
                self._failed(error, started, within)
                if within is None:
                    return False
                self._wait(AGAIN_SECONDS)
            else:
                if is_all:
                    self.succeeded()
                return True

    def succeeded(self) -> None:
        self._failing_since = None

    def failed_meanwhile(self, error: Exception) -> None:
        """What was written could not be published. Raises Unavailable as `attempt` does."""
        log.error("the checkpoint cannot be published: %s", error)
        self._failed(error, self._clock(), None)

    def _failed(self, error: Exception, started: float, within: float | None) -> None:
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since >= OUTAGE_SECONDS or (within is not None and now - started >= within):
            seconds = now - self._failing_since
            raise Unavailable(f"The store took no checkpoint for {seconds:.0f} s: {error}.", Reason.STORE_UNAVAILABLE) from error


def is_of_the_store(error: Exception) -> bool:
    """Whether writing failed, rather than what writes: safetensors and torch.save wrap the system's error in classes of their own."""
    from safetensors import SafetensorError

    return isinstance(error, (OSError, SafetensorError)) or "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
