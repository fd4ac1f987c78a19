"""`tuneloop usage`: what each API key of a deployment used, day by day, as a table, CSV or JSON lines."""

from __future__ import annotations

import argparse
import asyncio
import csv
import sys
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING

from pydantic import ValidationError

from tuneloop_gateway.contract import UsageRow
from tuneloop_operator.cli.errors import Failure
from tuneloop_operator.cli.gateway import add_place, connect

if TYPE_CHECKING:
    from argparse import _SubParsersAction

USAGE_PATH = "/internal/usage"


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    usage = commands.add_parser("usage", help="what each API key used: requests and tokens, day by day")
    usage.add_argument("deployment", help="name of the ModelDeployment")
    usage.add_argument("--since", type=_day, metavar="DAY", help="as 2026-01-31, in UTC (default: the first of this month)")
    usage.add_argument("--until", type=_day, metavar="DAY", help="the last day (default: today)")
    usage.add_argument("--output", choices=("table", "csv", "json"), default="table", help="json: an object a line (default: %(default)s)")
    add_place(usage)
    usage.set_defaults(run=run_usage)


def run_usage(arguments: argparse.Namespace) -> None:
    """The rows to stdout, by day and key; their sum to stderr."""
    today = datetime.now(UTC).date()
    since, until = arguments.since or today.replace(day=1), arguments.until or today
    rows = sorted(asyncio.run(_rows(arguments, since, until)), key=lambda row: (row.day, row.key or "", row.subject))
    if arguments.output == "json":
        for row in rows:
            print(row.model_dump_json(by_alias=True))
    elif arguments.output == "csv":
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(UsageRow.model_fields)
        table.writerows(row.model_dump().values() for row in rows)
    else:
        _print_table(rows)
    requests, tokens = sum(row.requests for row in rows), sum(row.prompt_tokens + row.completion_tokens for row in rows)
    failed, keys = sum(row.failed for row in rows), len({row.subject for row in rows})
    print(f"{since} to {until}: {requests:,} requests, {failed:,} failed, {tokens:,} tokens of {keys} keys.", file=sys.stderr)


def _print_table(rows: list[UsageRow]) -> None:
    """A key that was removed is shown by its pseudonym."""
    shown: list[tuple[str, ...]] = [("DAY", "KEY", "REQUESTS", "FAILED", "PROMPT", "COMPLETION")]
    for row in rows:
        counts = (f"{count:,}" for count in (row.requests, row.failed, row.prompt_tokens, row.completion_tokens))
        shown.append((row.day, row.key or f"({row.subject})", *counts))
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for line in shown:
        cells = (cell.ljust(width) if n < 2 else cell.rjust(width) for n, (cell, width) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(cells))


def _day(given: str) -> date:
    try:
        return date.fromisoformat(given)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given[:20]!r} is no day, as in 2026-01-31") from None


async def _rows(arguments: argparse.Namespace, since: date, until: date) -> list[UsageRow]:
    async with connect(arguments.deployment, arguments.namespace, arguments.url, arguments.token_file) as gateway:
        lines = [line async for line in gateway.lines(f"{USAGE_PATH}?since={since}&until={until}")]
    try:
        return [UsageRow.model_validate_json(line) for line in lines]
    except ValidationError as error:
        raise Failure("the gateway's answer is not the usage of this version; are gateway and command of one release?") from error
