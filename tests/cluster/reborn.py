"""`python -m tests.cluster.reborn`: the operator, started again as often as it is killed, without the seconds that its imports take.

A parent imports everything and forks; the child is the operator, its process id is in the file that TUNELOOP_PID_FILE names. SIGTERM stops
both.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tuneloop_operator.__main__ import main, registrations


def run() -> int:
    kinds = registrations()
    pid_file = Path(os.environ["TUNELOOP_PID_FILE"])
    while True:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os._exit(main(kinds))
        pid_file.write_text(str(child))
        signal.signal(signal.SIGTERM, lambda *_, pid=child: os.kill(pid, signal.SIGTERM))
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(run())
