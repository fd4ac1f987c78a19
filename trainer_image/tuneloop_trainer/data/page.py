"""The data card as one page of HTML: no script, nothing fetched, readable on a phone. Users' texts are escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from tuneloop_trainer.data.samples import Sample
from tuneloop_trainer.data.tokens import HISTOGRAM_BOUNDS

TEMPLATE = Path(__file__).with_name("card.html")
TITLES = {"personalData": "Personal data, rows by kind", "quality": "Low quality, by rule", "languages": "Other languages"}
MAX_BARS = 20


def render(card: Mapping[str, object], histogram: Sequence[int], samples: Sequence[Sample]) -> str:
    """The page for a card as it stands in card.json, with everything that its template reads."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(card, lengths=lengths(histogram), samples=samples, bars=bars, titles=TITLES)


def lengths(histogram: Sequence[int]) -> dict[str, int]:
    """Rows by length, from the first to the last interval that has any."""
    bounds = [0, *HISTOGRAM_BOUNDS]
    names = [f"{low + 1}–{high}" for low, high in zip(bounds, HISTOGRAM_BOUNDS, strict=False)] + [f"over {HISTOGRAM_BOUNDS[-1]}"]
    filled = [place for place, count in enumerate(histogram) if count]
    if not filled:
        return {}
    return {names[place]: histogram[place] for place in range(filled[0], filled[-1] + 1)}


def bars(counts: Mapping[str, int], style: str) -> Markup:
    """A bar for each count, as wide as its share of the largest."""
    most = max(counts.values(), default=0) or 1
    shown = list(counts.items())[:MAX_BARS]
    rows = [
        f'<span class="name">{escape(name)}</span><i style="width:{100 * count / most:.1f}%"></i><span class="count">{count:,}</span>'
        for name, count in shown
    ]
    if len(counts) > MAX_BARS:
        rows.append(f'<span class="name dim">and {len(counts) - MAX_BARS} more</span><i></i><span></span>')
    return Markup(f'<div class="bars {style}">{"".join(rows)}</div>')  # names are escaped above, the rest are numbers
