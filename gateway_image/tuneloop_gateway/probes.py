"""Before a revision takes traffic: a warm-up prompt, and the questions whose answers the evaluator recorded."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tuneloop_gateway.answers import ABORT, read_answer
from tuneloop_gateway.canonical import normalise
from tuneloop_gateway.configuration import Configuration, adapter_of
from tuneloop_gateway.contract import (
    ENGINE_PROBES_PATH,
    ENGINE_REFERENCE_PATH,
    ENGINE_VERSION_PATH,
    ProbeState,
    Revision,
    RevisionState,
    tokens_digest,
)
from tuneloop_gateway.endpoints import Endpoint, Endpoints
from tuneloop_gateway.errors import Refused
from tuneloop_gateway.inbound import CHAT_PATH, COMPLETION_PATH, Inbound, Json
from tuneloop_gateway.routing import Router

logger = logging.getLogger(__name__)
CONCURRENCY = 8
MAX_PROBES = 200
MAX_TEXTS = 2000
MAX_RECORDED_BYTES = 2 << 20
TRIES = 3
AGAIN_SECONDS = 5.0
LOOK_SECONDS = 1.0
TOKENIZE_PATH = "/tokenize"
TOKENIZE_SECONDS = 15.0
FAILURES = (aiohttp.ClientError, ConnectionError, TimeoutError, ValueError, LookupError, Refused)


class ProbeItem(BaseModel):
    """One item of the engine's list (the trainer's `Probe`)."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    prompt: str
    answer: str
    max_tokens: int = Field(alias="maxTokens")


_ITEMS = TypeAdapter(list[ProbeItem])
_TEXTS = TypeAdapter(list[str])


class _Tokenized(BaseModel):
    """vLLM's answer to /tokenize."""

    tokens: list[int]


class _Version(BaseModel):
    """vLLM's answer to /version."""

    version: str = Field(pattern=r"^[\w.+-]{1,32}$")


@dataclass(frozen=True)
class _Subject:
    """What a result is about: another model or prompt is probed anew; a revision that is promoted keeps its result."""

    revision: Revision

    @property
    def key(self) -> str:
        r = self.revision
        return json.dumps([r.service, r.model_id, r.prompt.model_dump(mode="json"), r.probe_text])

    def is_answered_by(self, other: _Subject) -> bool:
        return self.key == other.key and (other.revision.probe or not self.revision.probe)


class Prober:
    """One task for each revision that is not draining; results stay until the revision changes."""

    def __init__(
        self, configuration: Configuration, endpoints: Endpoints, router: Router, session: aiohttp.ClientSession, engine_key: str
    ) -> None:
        self._configuration, self._endpoints, self._router, self._session = configuration, endpoints, router, session
        self._headers = {"Authorization": f"Bearer {engine_key}"}
        self._tasks: dict[str, tuple[_Subject, asyncio.Task[None]]] = {}
        self._states: dict[str, ProbeState] = {}
        self._digests: dict[str, str] = {}
        self._versions: dict[str, str] = {}
        self._turns: dict[str, Iterator[int]] = defaultdict(count)

    def state(self, revision: str) -> ProbeState:
        if error := self._configuration.prompt_errors.get(revision):
            return ProbeState(status="Failed", message=error[:300])
        return self._states.get(revision, ProbeState(status="Pending"))

    def prompt_digest(self, revision: str) -> str:
        """Of the prompt that its engine reads of `probe_text`; "" where that is not known."""
        return self._digests.get(revision, "")

    def engine_version(self, revision: str) -> str:
        """vLLM's; "" where it is not known."""
        return self._versions.get(revision, "")

    async def run(self) -> None:
        """Starts a task for each new revision and ends those of revisions that are gone. Runs for ever."""
        try:
            while True:
                self._follow()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for _, task in self._tasks.values():
                task.cancel()

    def _follow(self) -> None:
        config = self._configuration.current
        wanted = {
            r.name: _Subject(r) for r in config.revisions if r.state is not RevisionState.DRAINING and r.name in self._configuration.prompts
        }
        for name, (subject, task) in list(self._tasks.items()):
            if name not in wanted or not wanted[name].is_answered_by(subject):
                task.cancel()
                del self._tasks[name]
                self._states.pop(name, None)
                self._digests.pop(name, None)
                self._versions.pop(name, None)
                self._router.count(name).warm = False
        for name, subject in wanted.items():
            if name not in self._tasks:
                self._tasks[name] = (subject, asyncio.create_task(self._probe(subject.revision)))

    async def _probe(self, revision: Revision) -> None:
        """Warm-up, then the probes, again and again until the engine could be asked."""
        while True:
            try:
                await self._warm_up(revision)
                if not revision.probe:
                    return
                self._states[revision.name] = await self._ask_all(revision)
                logger.info("Revision %s: %s.", revision.name, self._states[revision.name])
                return
            except FAILURES as error:
                message = f"The engine could not be asked: {type(error).__name__} {error}"[:300]
                if self._router.count(revision.name).warm:
                    self._states[revision.name] = ProbeState(status="Failed", message=message)
                logger.warning("Revision %s: %s", revision.name, message)
                await asyncio.sleep(random.uniform(AGAIN_SECONDS / 2, AGAIN_SECONDS))

    async def _endpoint(self, revision: Revision) -> Endpoint:
        """One replica after the other, waited for as long as it takes."""
        while not (choices := self._choices(revision)):
            await self._endpoints.changed(30)
        return choices[next(self._turns[revision.name]) % len(choices)]

    def _choices(self, revision: Revision) -> list[Endpoint]:
        return self._endpoints.choices(revision.service, (), time.monotonic(), adapter_of(revision))

    async def _warm_up(self, revision: Revision) -> None:
        """A prompt for each replica; an adapter is asked nothing before all have it."""
        while revision.adapter is not None and len(self._choices(revision)) < len(self._endpoints.ready(revision.service)):
            await self._endpoints.changed(30)
        took = []
        for _ in range(max(1, len(self._choices(revision)))):
            began = time.monotonic()
            await self._ask(revision, "Hello", 1)
            took.append(time.monotonic() - began)
        self._router.count(revision.name).warm_up_seconds = max(took)
        if revision.probe_text is not None:
            self._digests[revision.name] = await self._read_prompt(revision, revision.probe_text)
        self._versions[revision.name] = await self._read_version(revision)
        self._router.count(revision.name).warm = True

    async def _ask_all(self, revision: Revision) -> ProbeState:
        items = await self._fetch(revision)
        if items is None:
            return ProbeState(status="NoProbes")
        agreed = asked = 0
        self._states[revision.name] = ProbeState(status="Running")
        slots = asyncio.Semaphore(CONCURRENCY)
        disagreement = ""

        async def ask(item: ProbeItem) -> None:
            nonlocal agreed, asked, disagreement
            async with slots:
                answer = await self._ask_patiently(revision, item)
            same = normalise(answer) == normalise(item.answer)
            asked, agreed = asked + 1, agreed + same
            if not same and not disagreement:
                disagreement = f"For example the engine answered {answer.strip()[:60]!r} where the evaluator had {item.answer[:60]!r}."
            self._states[revision.name] = ProbeState(status="Running", asked=asked, agreed=agreed)

        tasks = [asyncio.create_task(ask(item)) for item in items]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return ProbeState(status="Done", asked=asked, agreed=agreed, message=disagreement[:300])

    async def training_inputs(self, revision: Revision) -> list[str] | None:
        """A sample of the inputs that the model was trained on; None where the engine has none. Raises one of FAILURES."""
        raw = await self._recorded(revision, ENGINE_REFERENCE_PATH)
        try:
            return None if raw is None else _TEXTS.validate_json(raw)[:MAX_TEXTS] or None
        except ValidationError:
            raise ValueError("the sample of training inputs is not as expected") from None

    async def _read_version(self, revision: Revision) -> str:
        """ "" where the engine does not tell. Raises one of FAILURES."""
        raw = await self._recorded(revision, ENGINE_VERSION_PATH)
        try:
            return "" if raw is None else _Version.model_validate_json(raw).version
        except ValidationError:
            return ""

    async def _fetch(self, revision: Revision) -> list[ProbeItem] | None:
        """The recorded items; None where the engine has none. Raises one of FAILURES."""
        raw = await self._recorded(revision, ENGINE_PROBES_PATH)
        try:
            return None if raw is None else _ITEMS.validate_json(raw)[:MAX_PROBES] or None
        except ValidationError:
            raise ValueError("the list of probes is not as expected") from None

    async def _recorded(self, revision: Revision, path: str) -> bytes | None:
        """What the engine's guard hands out; None where there is no such thing. Raises one of FAILURES."""
        endpoint = await self._endpoint(revision)
        url, timeout = f"http://{endpoint.address}{path}", aiohttp.ClientTimeout(total=15)
        whose = {"model": adapter_of(revision)} if revision.adapter is not None else None
        async with self._session.get(url, params=whose, headers=self._headers, timeout=timeout) as response:
            if response.status == 404:
                return None
            if response.status != 200:
                raise ValueError(f"{path} was answered {response.status}")
            raw = b""
            while chunk := await response.content.readany():
                raw += chunk
                if len(raw) > MAX_RECORDED_BYTES:
                    raise ValueError(f"the answer to {path} is too large")
        return raw

    async def _ask_patiently(self, revision: Revision, item: ProbeItem) -> str:
        for attempt in range(TRIES):
            try:
                return await self._ask(revision, item.prompt, item.max_tokens)
            except FAILURES:
                if attempt == TRIES - 1:
                    raise
                await asyncio.sleep(random.uniform(0.2, 1.0))
        raise AssertionError("unreachable")

    async def _ask(self, revision: Revision, text: str, max_tokens: int) -> str:
        """One greedy answer, through the same prompt as users'. Raises one of FAILURES."""
        inbound = self._inbound(text, {"temperature": 0, "max_tokens": max_tokens})
        payload = self._configuration.prompts[revision.name].apply(inbound)
        raw = await self._post(revision, inbound.path, payload, self._configuration.current.limits.upstream_timeout_seconds)
        answer = read_answer(raw, stream=False)
        if answer.finish_reason == ABORT:
            raise ConnectionError("the engine aborted")
        return answer.text

    def _inbound(self, text: str, body: Json) -> Inbound:
        """A request of a user who says this text."""
        if self._configuration.current.task == "Chat":
            return Inbound(CHAT_PATH, {**body, "messages": [{"role": "user", "content": text}]}, text, stream=False)
        return Inbound(COMPLETION_PATH, {**body, "prompt": text}, text, stream=False)

    async def _post(self, revision: Revision, path: str, payload: Json, seconds: float) -> bytes:
        endpoint = await self._endpoint(revision)
        url, timeout = f"http://{endpoint.address}{path}", aiohttp.ClientTimeout(total=seconds)
        async with self._session.post(url, json=payload, headers=self._headers, timeout=timeout) as response:
            raw = await response.read()
            if response.status != 200:
                raise ValueError(f"{path} was answered {response.status}")
        return raw

    async def _read_prompt(self, revision: Revision, text: str) -> str:
        """Digest of the tokens that the engine reads where a user says this text; "" where it does not tell. Raises one of FAILURES."""
        applied = self._configuration.prompts[revision.name].apply(self._inbound(text, {}))
        asked: Json = {name: value for name, value in applied.items() if name in ("model", "messages", "prompt")}
        try:
            answer = _Tokenized.model_validate_json(await self._post(revision, TOKENIZE_PATH, asked, TOKENIZE_SECONDS))
        except ValueError as error:
            logger.warning("Revision %s: its engine does not tell which prompt it reads: %s", revision.name, error)
            return ""
        return tokens_digest(answer.tokens)
