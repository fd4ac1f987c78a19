"""`tuneloop crds`: the generated files, from the models that are in this program."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tuneloop_operator.api import crds, docs
from tuneloop_operator.cli.errors import Failure

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    command = commands.add_parser("crds", help="print the CustomResourceDefinitions, or write them to a folder")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="write one file per kind here instead of printing")
    command.add_argument("--chart", action="store_true", help="as templates of the chart")
    command.add_argument("--reference", type=Path, metavar="FILE", help="write the reference of the API (Markdown) to this file instead")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print or write; what is there is overwritten."""
    if arguments.reference is not None:
        _write(arguments.reference, docs.render_reference())
        return
    files = crds.render_chart_templates() if arguments.chart else crds.render_files()
    if arguments.out is None:
        print("---\n".join(files.values()), end="")
        return
    for name, text in files.items():
        _write(arguments.out / name, text)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}.") from error
