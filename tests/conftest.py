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
TOGETHER = ("tests/unit/trainer",)
"""Tests that use torch and transformers: one process spends four seconds on importing them, and not each."""
GROUP = re.compile(r"""^pytestmark = .*xdist_group\("(\w+)"\)""", re.MULTILINE)


class Groups(LoadScopeScheduling):
    """`--dist loadgroup` and `loadfile`, but that all tests of files whose `pytestmark` names one `xdist_group`, or that lie in one of
    the folders TOGETHER, are one process's.

    pytest-xdist 3.8 tells the groups in ids that it writes to `_nodeid`, which pytest 9.2 does not read: nothing is grouped.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return group_of(file) or (file if self.config.getoption("dist") == "loadfile" else nodeid)


@cache
def group_of(file: str) -> str | None:
    found = GROUP.search((ROOT / file).read_text())
    return found[1] if found is not None else next((folder for folder in TOGETHER if file.startswith(f"{folder}/")), None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups | None:
    return Groups(config, log) if config.getoption("dist") in ("loadgroup", "loadfile") else None
