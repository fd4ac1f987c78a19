"""Shared fixtures: one tiny base model for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.unit.trainer.builders import make_base

# Read by OpenMP when torch is first imported; without it, threads of parallel test runs spin against each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")
