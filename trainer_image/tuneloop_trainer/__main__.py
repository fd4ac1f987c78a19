"""`python -m tuneloop_trainer <prepare|train|package|evaluate>`: the command of every stage's pod."""

from __future__ import annotations

import argparse
import signal
import sys


def main() -> int:
    # PID 1 is given no signal that it has no handler for. What comes while Python imports waits until the launcher has one.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    from tuneloop_trainer.contract import Stage
    from tuneloop_trainer.launcher import Launcher, Surroundings

    parser = argparse.ArgumentParser(prog="tuneloop_trainer", description="Runs one stage of a FineTuneJob.")
    parser.add_argument("stage", choices=[stage.value for stage in Stage])
    return Launcher(Stage(parser.parse_args().stage), Surroundings.from_environment()).run()


if __name__ == "__main__":
    sys.exit(main())
