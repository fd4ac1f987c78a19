"""EntryPoint: a function of a package in the trainer image, called once for each completion, in bounded time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points

from tuneloop_trainer.contract import EntryPoint
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.rewards.reward import Completion, Reward, failed, finite

GROUP = "tuneloop.rewards"
"""Entry points under which a derived image brings rewards of its own."""
Function = Callable[[Completion, Mapping[str, str]], float]


class Brought(Reward):
    """`function(completion, settings) -> float`. It is the image's own code, and trusted as the image is: what is bounded is that a
    slip in it ends the run with the row's number, rather than hanging it or spoiling what is learned."""

    def __init__(self, asked: EntryPoint) -> None:
        self.name = asked.name
        self._settings = dict(asked.settings)
        self._seconds = asked.timeout_seconds
        self._function, self._version = _load(asked.name)

    def of(self, completions: Sequence[Completion]) -> list[float]:
        return [finite(self.name, one, self._call(one)) for one in completions]

    def key(self) -> str:
        return f"{self.name} {self._version} {sorted(self._settings.items())}"

    def _call(self, completion: Completion) -> object:
        """In a thread of its own, which is left behind where it does not end: the run ends then anyway."""
        returned: list[object] = []
        raised: list[Exception] = []

        def work() -> None:
            try:
                returned.append(self._function(completion, self._settings))
            except Exception as error:  # noqa: BLE001  # whatever the package raises is told by the thread that waits
                raised.append(error)

        thread = threading.Thread(target=work, daemon=True, name=f"reward {self.name}")
        thread.start()
        thread.join(self._seconds)
        if raised:
            problem = f"raised {type(raised[0]).__name__}: {str(raised[0])[:120]}"
            raise failed(self.name, completion, problem) from raised[0]
        if not returned:
            raise failed(self.name, completion, f"took more than {self._seconds} s")
        return returned[0]


def _load(name: str) -> tuple[Function, str]:
    """The function, and the version of the package that it is of. Raises Invalid: only the spec, or the image, can be changed."""
    brought = entry_points(group=GROUP)
    if name not in brought.names:
        names = ", ".join(sorted(brought.names)) or "none"
        raise Invalid(f"The trainer image has no reward '{name}' in the entry points {GROUP}; it has {names}.")
    point = brought[name]
    try:
        found = point.load()
    except Exception as error:  # whatever the package raises when it is imported
        raise Invalid(f"Reward '{name}' of the trainer image does not load: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise Invalid(f"Reward '{name}' of the trainer image cannot be called.")
    return found, f"{point.dist.name}=={point.dist.version}" if point.dist is not None else ""
