"""`tuneloop forget`: deletes what one API key asked and said from the gateway's store."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING

from pydantic import ValidationError

from tuneloop_gateway.contract import ForgetReceipt, ForgetRequest
from tuneloop_operator.cli.errors import Failure
from tuneloop_operator.cli.gateway import add_place, connect

if TYPE_CHECKING:
    from argparse import _SubParsersAction

FORGET_PATH = "/internal/forget"


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    forget = commands.add_parser("forget", help="delete what one API key asked and said")
    forget.add_argument("deployment", help="name of the ModelDeployment")
    whose = forget.add_mutually_exclusive_group(required=True)
    whose.add_argument("--key", help="the key's name in the Secret of keys; `anonymous`: all callers without a key")
    whose.add_argument("--subject", help="its pseudonym, as a receipt of this command shows it")
    add_place(forget)
    forget.set_defaults(run=run_forget)


def run_forget(arguments: argparse.Namespace) -> None:
    """The receipt to stdout."""
    try:
        request = ForgetRequest(key=arguments.key, subject=arguments.subject)
    except ValidationError as error:
        raise Failure(f"--{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}.") from error
    receipt = asyncio.run(_forget(arguments, request))
    print(receipt.model_dump_json(by_alias=True))
    rows = receipt.captured + receipt.feedback + receipt.labels + receipt.corrections
    trained = " Models that learnt from its labels and corrections keep what they learnt." if receipt.labels + receipt.corrections else ""
    print(f"{rows:,} rows deleted.{trained}", file=sys.stderr)


async def _forget(arguments: argparse.Namespace, request: ForgetRequest) -> ForgetReceipt:
    async with connect(arguments.deployment, arguments.namespace, arguments.url, arguments.token_file) as gateway:
        answer = await gateway.post(FORGET_PATH, request.model_dump_json(by_alias=True, exclude_none=True).encode())
    try:
        return ForgetReceipt.model_validate_json(answer)
    except ValidationError as error:
        raise Failure("the gateway's answer is not the receipt of this version; are gateway and command of one release?") from error
