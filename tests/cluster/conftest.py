"""Tests of this folder see an API server that has no node, so that they play the kubelet's part undisturbed.

`make test` runs them beside tests on real pods: KUBECONFIG is another one for the time of each test here. With CLUSTER=current it
stays what it is.
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[2] / "dev" / "cluster" / "cluster"


def cluster(*arguments: str) -> str:
    return subprocess.run([CLUSTER, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@functools.cache
def environment() -> dict[str, str]:
    """Starts the control plane where it is not running."""
    cluster("up", "--control-plane-only")
    return {"KUBECONFIG": cluster("kubeconfig", "--control-plane-only"), "PATH": f"{cluster('bin')}:{os.environ['PATH']}"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Around fixtures of every scope too."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("CLUSTER") != "current":
            for name, value in environment().items():
                patch.setenv(name, value)
        return (yield)
