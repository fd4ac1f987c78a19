"""The configuration in force: from the mounted file at start, from the watched ConfigMap afterwards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import ValidationError

from tuneloop_gateway.contract import GatewayConfig, Revision, RevisionState
from tuneloop_gateway.prompts import CompiledPrompt, PromptInvalid, compile_prompt

logger = logging.getLogger(__name__)
CONFIG_KEY = "config.json"


def parse_config(raw: str | bytes) -> GatewayConfig | None:
    """None (and a log line) where it is not a valid configuration: the one in force stays."""
    try:
        return GatewayConfig.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        logger.error("Configuration refused: %s at %s.", first["msg"], ".".join(map(str, first["loc"])) or "its root")
        return None


class Configuration:
    """Holds the applied configuration and its compiled prompts, and tells listeners about a new one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: bytes | None = None
        self._listeners: list[Callable[[], None]] = []
        self._config: GatewayConfig | None = None
        self.prompts: Mapping[str, CompiledPrompt] = {}
        self.prompt_errors: Mapping[str, str] = {}

    @property
    def current(self) -> GatewayConfig:
        """Only to be asked after `load`."""
        if self._config is None:
            raise RuntimeError("No configuration was loaded.")
        return self._config

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def apply(self, config: GatewayConfig) -> bool:
        """Takes a configuration that is not older than the one in force. True where something changed."""
        if self._config is not None and (config.generation < self._config.generation or config == self._config):
            return False
        prompts, errors = {}, {}
        for revision in config.revisions:
            try:
                prompts[revision.name] = compile_prompt(revision)
            except PromptInvalid as error:
                errors[revision.name] = str(error)
                logger.error("Revision %s is not used: %s", revision.name, error)
        self._config, self.prompts, self.prompt_errors = config, prompts, errors
        logger.info("Configuration of generation %d applied: %d revisions.", config.generation, len(config.revisions))
        for listener in self._listeners:
            listener()
        return True

    def load(self) -> bool:
        """Reads the mounted file. True where a configuration is in force afterwards."""
        try:
            raw = self._path.read_bytes()
        except OSError as error:
            logger.warning("Cannot read the configuration %s: %s.", self._path, error.strerror)
            return self._config is not None
        if raw != self._seen:
            self._seen = raw
            config = parse_config(raw)
            if config is not None:
                self.apply(config)
        return self._config is not None

    async def follow_file(self, seconds: float) -> None:
        """The file is the second way: it changes without the API server's watch, if a minute later."""
        while True:
            await asyncio.sleep(seconds)
            self.load()


def adapter_of(revision: Revision) -> str:
    """Name of the adapter that a replica must have to answer for it; "" where the engine is the model."""
    return revision.model_id if revision.adapter is not None else ""


def takes_traffic(revision: Revision) -> bool:
    return revision.state is not RevisionState.DRAINING and revision.weight > 0
