"""What holds for all tests, before any library is imported; and which of them share a process."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# As the launcher has it in pods: else the hub's client, once in each process, and TRL with each trainer ask the hub for things of
# their own, over the network, or of the hub that a test plays, which counts what it is asked.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

ROOT = Path(__file__).parents[1]
GROUP = re.compile(r"""^pytestmark = .*xdist_group\("(\w+)"\)""", re.MULTILINE)


class Groups(LoadScopeScheduling):
    """`--dist loadgroup` for files: all tests of those whose `pytestmark` names one `xdist_group` are one process's.

    pytest-xdist 3.8 tells the groups in ids that it writes to `_nodeid`, which pytest 9.2 does not read: nothing is grouped.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.partition("::")[0]) or nodeid


@cache
def group_of(file: str) -> str | None:
    found = GROUP.search((ROOT / file).read_text())
    return found[1] if found is not None else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups | None:
    return Groups(config, log) if config.getoption("dist") == "loadgroup" else None
