"""`tuneloop crds`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tuneloop_operator.api import crds
from tuneloop_operator.cli import main


def test_printed_crds_are_one_yaml_stream(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crds"]) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [document["spec"]["names"]["kind"] for document in documents] == ["FineTuneJob", "ModelVersion", "ModelDeployment"]


def test_files_are_written_where_asked(tmp_path: Path) -> None:
    assert main(["crds", "--out", str(tmp_path / "new")]) == 0
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == crds.render_files()


def test_an_unwritable_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["crds", "--out", str(tmp_path / "file")]) == 1
    assert "cannot write" in capsys.readouterr().err
