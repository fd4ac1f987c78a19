"""kopf, as informer alone: it lists, watches and reconnects. It writes nothing, and sees no object: see `answers`.

It runs in a thread with a loop of its own, so threads take turns often here: see SWITCH_SECONDS. It ends on watch errors but 410, and
is started again here without touching workers, Lease or probes. It is ended here too: where a watch of kopf's fails, kopf cancels the other
watches together with what would pause them; a watch that hears of the pause first takes its cancellation for that, looks for credentials
that nobody brings any more, and kopf waits for it for ever.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp

# kopf imports the `kubernetes` package, where it is installed, to log in with; we bring our own login, and it would cost 13 MiB.
sys.modules.setdefault("kubernetes", None)  # type: ignore[arg-type]

import kopf  # noqa: E402
from kopf import DiffBaseStorage, ProgressStorage  # noqa: E402

from tuneloop_operator.cluster.client import METADATA_ONLY  # noqa: E402
from tuneloop_operator.cluster.credentials import Credentials  # noqa: E402
from tuneloop_operator.cluster.kinds import KINDS  # noqa: E402
from tuneloop_operator.render.names import MANAGER  # noqa: E402
from tuneloop_operator.runtime.answers import Answers, Event, Listing, is_watch  # noqa: E402
from tuneloop_operator.settings import Settings  # noqa: E402

log = logging.getLogger(__name__)

WATCH_SHARE = 2 / 3
"""Part of the silence that is allowed after which the API server ends a watch: each begins anew within it, its sign of life."""
STOP_SECONDS = 2.0
"""kopf is slow to end while it begins. It has nothing to lose, and its thread is no reason for the process to stay."""
CANCEL_SECONDS = 0.1
"""So long a task of kopf's has to end before it is cancelled once more."""
SWITCH_SECONDS = 0.0005
"""A thread that parses events holds the interpreter no longer than this while a worker's answer waits; the default of 5 ms would be paid at
every await of a pass."""


class Backoffs:
    """Endless, jittered, capped at 6 s, so that work goes on soon after an outage. Without `__len__`: kopf gives up after the last of a
    sequence."""

    def __iter__(self) -> Iterator[float]:
        seconds = 0.5
        while True:
            yield seconds * (0.5 + random.random() / 2)
            seconds = min(seconds * 2, 6.0)


class NoDiffs(DiffBaseStorage):
    """Nobody reacts to differences here, so none are computed: each would copy the object."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        return None


class NoProgress(ProgressStorage):
    """There are no handlers whose progress could be stored."""

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        return None

    def purge(self, **_: Any) -> None:
        return None

    def touch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: Any, **_: Any) -> Any:
        return essence


class Informer:
    """Watches kinds in a thread, and hands events to the loop that made it, in order and in batches."""

    def __init__(
        self,
        credentials: Credentials,
        settings: Settings,
        kinds: tuple[str, ...],
        receive: Callable[[Event], None],
        listed: Callable[[Listing], None] = lambda listing: None,
        restarted: Callable[[], None] = lambda: None,
    ) -> None:
        self.credentials = credentials
        self.settings = settings
        self.kinds = kinds
        self.receive = receive
        self.listed = listed
        self.restarted = restarted
        self.signs_of_life: dict[str, float] = {}
        """Kind -> time.monotonic() of its watch's last begin or event."""
        self._answers = Answers(kinds, self._came, lambda listing: self._tell(lambda: self.listed(listing)))
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._is_flushing = False
        self._stop = threading.Event()
        self._stop_kopf: Callable[[], None] = lambda: None
        self._session: aiohttp.ClientSession | None = None
        self._thread = threading.Thread(target=self._run, name="informer", daemon=True)

    def start(self) -> None:
        now = time.monotonic()
        self.signs_of_life = dict.fromkeys(self.kinds, now)
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._stop_kopf()

    async def join(self) -> None:
        await asyncio.to_thread(self._thread.join, STOP_SECONDS)

    # --- in the thread ---

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                asyncio.run(self._watch())
            except Exception:
                log.exception("the informer ended; it is started again")
            if self._stop.wait(1.0 + random.random()):
                return
            self._tell(self.restarted)

    async def _watch(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._stop_kopf = lambda: _call(loop, stop.set)
        if self._stop.is_set():
            return
        namespaces = self.settings.watch_namespaces
        tasks = await kopf.spawn_tasks(
            registry=self._registry(),
            settings=_kopf_settings(self.kinds, self.settings.silence_seconds),
            standalone=True,
            clusterwide=not namespaces,
            namespaces=list(namespaces),
            stop_flag=stop,
        )
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await end_all_others()
        if self._session is not None:
            await self._session.close()
        for task in done:
            task.result()

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(self._login)
        for kind in self.kinds:
            resource = KINDS[kind]
            watch = kopf.on.event(group=resource.group, version=resource.version, plural=resource.plural, registry=registry, id=kind)
            watch(_unused)
        return registry

    async def _login(self, **_: Any) -> kopf.AiohttpSession:
        """Called again after each 401."""
        headers = await self.credentials.headers(is_refused=True)
        answers = self._answers.response_class()
        self._session = self.credentials.session(headers=headers, middlewares=(self._around,), response_class=answers)
        return kopf.AiohttpSession(server=self.credentials.server, aiohttp_session=self._session)

    async def _around(self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        """Around each request: lists ask for metadata from their first page, and answers are signs of life."""
        kind = self._answers.kind(request.url)
        if kind is not None and not is_watch(request.url):
            request.headers["Accept"] = METADATA_ONLY
        response = await send(request)
        if kind is not None and response.status == 200:
            self.signs_of_life[kind] = time.monotonic()
        return response

    def _came(self, events: list[Event]) -> None:
        self.signs_of_life[events[0][0]] = time.monotonic()
        self._events.extend(events)
        if not self._is_flushing:
            self._is_flushing = True
            self._tell(self._flush)

    def _tell(self, function: Callable[[], None]) -> None:
        _call(self._loop, function)

    # --- in the loop ---

    def _flush(self) -> None:
        self._is_flushing = False  # first: an event that comes from now on asks for another flush
        while self._events:
            self.receive(self._events.popleft())


async def end_all_others() -> None:
    """Cancels every task of the loop but the one that asks, again and again: one that takes a cancellation for something else hears the
    next one."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in others:
            task.cancel()
        await asyncio.wait(others, timeout=CANCEL_SECONDS)


async def _unused(**_: Any) -> None:
    """That it is registered makes kopf watch; no event comes so far."""


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:  # the loop is closed: the process ends
        log.debug("an event came too late")


def _kopf_settings(kinds: tuple[str, ...], silence: float) -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = Backoffs()
    settings.watching.chunk_size = 500
    settings.watching.server_timeout = max(1, round(silence * WATCH_SHARE))
    settings.watching.inactivity_timeout = 70
    settings.queueing.worker_limit = None
    settings.queueing.idle_timeout = 0.1  # so long an event stays in memory after it was handled
    settings.queueing.exit_timeout = 0.5
    settings.persistence.diffbase_storage = NoDiffs()
    settings.persistence.progress_storage = NoProgress()
    settings.background.instant_exit_timeout = 0
    for kind in kinds:
        resource = KINDS[kind]
        if not resource.is_ours:
            settings.watching.label_selectors[resource.group, resource.version, resource.plural] = f"app.kubernetes.io/managed-by={MANAGER}"
    return settings
