"""`tuneloop render`: what the operator would make of a manifest."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    command = commands.add_parser("render", help="print what the operator would make of a manifest")
    command.add_argument("-f", "--file", required=True)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    raise NotImplementedError
