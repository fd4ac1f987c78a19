"""The report of a run: all of it on one page, whatever users and models wrote."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.unit.trainer.reports import EVIL, LONG, STEPS, make_finished, make_history

from tuneloop_trainer import pages
from tuneloop_trainer.pages.charts import BUCKETS, Curve, chart, interval, named, smoothed, thinned, ticks
from tuneloop_trainer.report import MAX_TEXT, curves, written_report


class Outline(HTMLParser):
    """Tags and their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    text = written_report(*make_finished(tmp_path_factory.mktemp("finished")))
    assert text is not None
    return text


def test_report_says_what_every_stage_found(page: str) -> None:
    words = " ".join(Outline(page).words.split())

    for told in (
        "Inconclusive", "0.81", "-0.02 to 0.04", "412", "no worse than the baseline by more than the margin of 0.03", "-0.6 to 0.1",
        "Loss 2.379 → 0.323, between 0.2013 and 9", "1 newly right, 0 newly wrong, 400 right as before, 11 wrong as before.",
        "Learning rate", "Gradient norm", "gate: Accuracy by label", "400.125 → 0.8750.61 to 0.85", "all others3720.9 → 0.7-0.3 to -0.1",
        "the worst: 0.775 → 0.175 (0.0625 to 0.3125); grown by -0.75 to -0.5.",
        "Tokens per second", "Held-out loss 0.5", "peak memory (cpu)", "1 GiB (+7%)", "6 min 0 s to 2 h 30 min", "1 h 6 min",
        "learning_rate0.0001spec", "Duplicate", "rows trained on", "sha256:" + "1" * 64, "`apache-2.0`", "not asked", "(nothing)",
    ):  # fmt: skip
        assert told in words, told


def test_report_holds_no_script_and_asks_for_nothing(page: str) -> None:
    tags = Outline(page).tags

    assert EVIL not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not {tag for tag, _ in tags} & {"script", "img", "link", "iframe", "object", "image", "use", "a", "foreignobject"}
    assert not any(name in ("src", "href", "xlink:href") or name.startswith("on") for _, attributes in tags for name in attributes)
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", page)
    assert "url(" not in page
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags
    policy = next(attributes["content"] for tag, attributes in tags if tag == "meta" and attributes.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_report_is_bounded_however_long_the_texts_and_the_run(page: str, tmp_path: Path) -> None:
    longer = written_report(*make_finished(tmp_path, text=f"{EVIL} {LONG * 20}", steps=STEPS))

    assert len(page) < 300_000
    assert longer is not None
    answers = longer[longer.index("Before and after") : longer.index("<h2>Training")]
    assert len(answers) < 20 * MAX_TEXT


def test_report_shows_an_earlier_releases_run_without_its_data_card(tmp_path: Path) -> None:
    finished = make_finished(tmp_path)
    (tmp_path / "work" / "prepare" / "card.json").write_text("{}")

    page = written_report(*finished)

    assert page is not None
    assert "Three rows" not in page
    assert "Lineage" in page


def test_report_that_cannot_be_made_is_none_and_no_failure(tmp_path: Path) -> None:
    finished = make_finished(tmp_path)
    (tmp_path / "work" / "train" / "final" / "log.json").write_text("{")

    assert written_report(*finished) is None


def test_thinning_keeps_the_spike_and_drops_what_is_no_number() -> None:
    points = [(float(entry["step"]), entry["loss"]) for entry in make_history(STEPS) if "loss" in entry]

    kept = thinned(points)

    assert len(kept) <= 2 * BUCKETS
    assert max(value for _, value in kept) == 9.0
    assert all(math.isfinite(value) for _, value in kept)
    assert kept == sorted(kept)


def test_curve_of_one_value_or_none_is_drawn_as_such() -> None:
    assert chart([Curve("main", [])], "nothing") == ""
    assert "circle" in chart([Curve("main", [(1.0, 2.0)])], "a point")
    flat = chart([Curve("main", [(1.0, 0.0), (2.0, 0.0)])], '"><script>')
    assert "polyline" in flat
    assert "<script>" not in flat
    assert "nan" not in flat


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.0, 10.0, [0, 2, 4, 6, 8, 10]), (1e-5, 1e-4, [2e-5, 4e-5, 6e-5, 8e-5, 1e-4]), (-3.0, 3.0, [-2, 0, 2])]
)
def test_ticks_are_round_numbers_within_the_range(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "name"), [(0.0, "0"), (2e-5, "2e-5"), (0.005, "0.005"), (12_500.0, "12.5k"), (3_000_000.0, "3M")])
def test_ticks_are_named_shortly(value: float, name: str) -> None:
    assert named(value) == name


def test_interval_shows_the_side_that_is_better() -> None:
    drawn = interval(-0.6, 0.1, -0.25, 0.0, "left")

    assert drawn.index("← better") < drawn.index("worse →")
    assert interval(0.0, math.nan, 0.0, 0.0, "left") == ""


def test_smoothing_is_the_mean_of_the_last_values() -> None:
    assert smoothed([(1, 1.0), (2, 3.0), (3, math.nan), (4, 5.0)], 2) == [(1, 1.0), (2, 2.0), (4, 4.0)]


def test_curves_are_those_that_the_run_logged() -> None:
    drawn = list(curves([{"step": 1, "loss": 1.0, "rewards/margins": 0.1}, {"step": 2, "loss": True, "rewards/margins": 0.3}]))

    assert [curve["title"] for curve in drawn] == ["Loss", "Reward margin"]
    assert drawn[1]["told"] == "0.1 → 0.3, between 0.1 and 0.3"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (pages.duration(7.25), "7.2 s"), (pages.duration(61), "1 min 1 s"), (pages.duration(7260), "2 h 1 min"),
        (pages.bytes_of(None), "–"), (pages.bytes_of(512), "512 B"), (pages.bytes_of(3 << 30), "3 GiB"), (pages.short(None), "–"),
    ],
)  # fmt: skip
def test_figures_are_told_in_units_for_people(told: str, expected: str) -> None:
    assert told == expected
