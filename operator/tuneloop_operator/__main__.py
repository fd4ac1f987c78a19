"""`python -m tuneloop_operator`: reads settings and credentials, runs the operator until SIGTERM or SIGINT.

With arguments it is the `tuneloop` command instead, so that the image has both.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from tuneloop_operator.cluster.credentials import CredentialsError, load_credentials
from tuneloop_operator.cluster.registration import Registration
from tuneloop_operator.cluster.registrations import registrations
from tuneloop_operator.runtime.logs import configure_logs
from tuneloop_operator.runtime.operator import Operator
from tuneloop_operator.settings import Settings, read_settings

log = logging.getLogger(__name__)


async def serve(settings: Settings, kinds: Sequence[Registration[Any]]) -> None:
    """One replica, from start to a graceful end."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await Operator(settings, load_credentials(), kinds).run(stop)


def main(kinds: Sequence[Registration[Any]] | None = None) -> int:
    configure_logs()
    try:
        settings = read_settings()
        if settings.identity == Settings.model_fields["identity"].default:
            settings = settings.model_copy(update={"identity": f"{socket.gethostname()}-{os.getpid()}"})
        asyncio.run(serve(settings, registrations() if kinds is None else kinds))
    except (ValidationError, CredentialsError) as error:
        log.error("%s", error)
        return 2
    return 0


def command() -> int:
    """The `tuneloop` command; the operator itself does without what it imports."""
    from tuneloop_operator import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(command() if sys.argv[1:] else main())
