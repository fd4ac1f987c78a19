"""What the repository promises about itself: its targets, its layers, its pins."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import group_of

ROOT = Path(__file__).parents[3]
TARGETS = """demo test test-unit test-cluster test-e2e test-long lint generate verify cluster-up cluster-down images chart
    bench bench-operator bench-gateway bench-estimate bench-drift"""


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(TARGETS.split()) <= {line.split()[0] for line in listed.splitlines() if line.startswith("  ")}


@pytest.mark.parametrize("contract", ["trainer_image/tuneloop_trainer/contract.py", "gateway_image/tuneloop_gateway/contract.py"])
def test_a_contract_imports_pydantic_and_the_standard_library_only(contract: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse((ROOT / contract).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a contract stands alone, so that the operator's image can hold it without its package"
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"__future__"} == {"pydantic"}


@pytest.mark.parametrize("package", ["tuneloop_trainer", "tuneloop_gateway"])
def test_importing_a_contract_imports_nothing_else_of_its_package(package: str) -> None:
    code = f"import sys, {package}.contract; print(*(m for m in sys.modules if m.startswith('{package}')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(loaded) == [package, f"{package}.contract"]


def test_requirements_are_pinned_and_name_no_index() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        if path.name == "overrides.txt":
            continue
        for line in path.read_text().splitlines():
            text = line.split("#")[0].strip()
            assert not text.startswith("-"), f"{path.name}: {line}"
            assert not text or "==" in text, f"{path.name}: {line}"


def test_files_that_share_a_kind_of_the_cluster_are_one_processs() -> None:
    users = {path for path in (ROOT / "tests").rglob("test_*.py") if "xdist_group(" in path.read_text() and path != Path(__file__)}
    assert len(users) >= 4
    assert {group_of(str(path.relative_to(ROOT))) for path in users} == {"widgets"}
    assert group_of("tests/cluster/test_crds.py") is None
