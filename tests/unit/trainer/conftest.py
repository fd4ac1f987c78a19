"""Shared fixtures: one tiny base model for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.trainer.builders import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")
