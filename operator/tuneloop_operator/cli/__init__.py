"""The `tuneloop` command: render, estimate, crds, label export and import, forget, usage. Results to stdout, the rest to stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from tuneloop_operator.cli import estimating, forgetting, generation, labels, rendering, usage
from tuneloop_operator.cli.errors import Failure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code: 0 done, 1 it failed (one sentence on stderr), 2 wrong usage."""
    arguments = parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.run
    try:
        command(arguments)
    except Failure as failure:
        print(f"tuneloop: {failure}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # whoever read stdout has had enough
        return 0
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """Arguments of all commands."""
    top = argparse.ArgumentParser(prog="tuneloop", description="The life of a language model on Kubernetes, from the command line.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    rendering.add_to(commands)
    generation.add_to(commands)
    labels.add_to(commands)
    forgetting.add_to(commands)
    usage.add_to(commands)
    estimating.add_to(commands)
    return top
