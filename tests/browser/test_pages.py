"""The pages for people in a real browser, at the width of a phone and of a desk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.browser.chromium import Browser, browser
from tests.unit.trainer.reports import make_finished

from tuneloop_trainer.data import page
from tuneloop_trainer.report import written_report

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("finished")
    text = written_report(*make_finished(root))
    assert text is not None
    (root / "report.html").write_text(text)
    return {"report": root / "report.html", "card": root / "work" / "prepare" / page.TEMPLATE}


@pytest.mark.parametrize("width", [360, 390, 1280])
@pytest.mark.parametrize("name", ["report", "card"])
def test_page_fits_its_window_runs_nothing_and_asks_for_nothing(
    name: str, width: int, tab: Browser, written: dict[str, Path], tmp_path: Path
) -> None:
    seen = tab.look(written[name], width)

    (tmp_path / f"{name}-{width}.png").write_bytes(seen.screenshot)  # to be looked at: pytest keeps the folder
    assert seen.width <= width, "it can be scrolled sideways"
    assert seen.requests == [written[name].as_uri()]
    assert seen.complaints == []
    assert seen.height > 800
    assert len(seen.screenshot) > 20_000
