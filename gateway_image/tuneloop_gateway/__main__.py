"""`python -m tuneloop_gateway`: runs until SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys

import uvloop

from tuneloop_gateway.app import Gateway
from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.settings import Settings, read_settings

CONFIG_WAIT_SECONDS = 60
logger = logging.getLogger("tuneloop_gateway")


async def _wait_for_config(configuration: Configuration) -> bool:
    """The mount may come a moment after the process."""
    for _ in range(CONFIG_WAIT_SECONDS):
        if configuration.load():
            return True
        await asyncio.sleep(1)
    return False


async def run(settings: Settings) -> int:
    """The process's life; its exit code."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    configuration = Configuration(settings.config_path)
    if not await _wait_for_config(configuration):
        logger.error("There is no valid configuration at %s.", settings.config_path)
        return 1
    try:
        gateway = Gateway(settings, configuration)
    except (OSError, ValueError) as error:
        logger.error("The gateway cannot start: %s", error)
        return 1
    await gateway.start()
    gc.collect()
    gc.freeze()  # what lives for ever need not be looked through again: shorter pauses
    gc.set_threshold(5000, 20, 50)
    logger.info("Serving %s/%s on port %d.", configuration.current.namespace, configuration.current.deployment, settings.public_port)
    await stop.wait()
    logger.info("Stopping.")
    await gateway.stop()
    return 0


def main() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # our own line says what became of the schema
    sys.setswitchinterval(0.001)  # the database's threads shall not hold requests for 5 ms at a time
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run(read_settings(os.environ)))


if __name__ == "__main__":
    sys.exit(main())
