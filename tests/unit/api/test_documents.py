"""What is written for users holds: links lead somewhere, the smallest manifests are small, and README shows the one that is tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", path.read_text()):
        if target and "://" not in target:
            assert (path.parent / target).exists(), target
    for target, heading in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", path.read_text()):
        if "://" not in target:
            text = (path.parent / target).read_text() if target else path.read_text()
            headings = {
                re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines() if line[:1] == "#"
            }
            assert heading in headings, heading


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("smallest-*.yaml")), ids=lambda path: path.name)
def test_the_smallest_manifests_have_at_most_fifteen_lines(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert 5 <= len(lines) <= 15


def test_readme_shows_the_smallest_job() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert yaml.safe_load(shown) == yaml.safe_load((ROOT / "examples" / "smallest-finetunejob.yaml").read_text())
    assert len(shown.splitlines()) <= 15


def test_every_make_target_that_readme_and_contributing_name_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", (ROOT / name).read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_decision_says_what_why_and_at_what_cost() -> None:
    records = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [record.name[:4] for record in records] == [f"{number:04d}" for number in range(1, len(records) + 1)]
    for record in records:
        assert "**Decided.**" in record.read_text()
        assert "**Because**" in record.read_text()


PACKAGES = {
    "operator": ROOT / "operator" / "tuneloop_operator",
    "trainer": ROOT / "trainer_image" / "tuneloop_trainer",
    "gateway": ROOT / "gateway_image" / "tuneloop_gateway",
}


def test_architecture_names_files_that_exist() -> None:
    for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = re.match(r"(operator|trainer|gateway) `", cells[1]) if len(cells) == 2 and line.startswith("|") else None
        if found:
            folder = PACKAGES[found[1]]
            for name in re.findall(r"`([a-z_*/.]+)`", cells[1]):
                path = name.rstrip("/")
                assert [*folder.glob(f"**/{path}"), *ROOT.glob(f"charts/**/{path}")], name
