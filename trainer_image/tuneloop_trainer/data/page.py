"""The data card as one page of HTML, made from card.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from tuneloop_trainer import pages
from tuneloop_trainer.data.tokens import HISTOGRAM_BOUNDS

TEMPLATE = "card.html"
TITLES = {"personalData": "Personal data, rows by kind", "quality": "Low quality, by rule", "languages": "Other languages"}
MAX_BARS = 20
MAX_NAME = 80


def render(card: Mapping[str, Any]) -> str:
    """The page for a card as it stands in card.json."""
    return pages.render(TEMPLATE, context(card))


def context(card: Mapping[str, Any]) -> dict[str, Any]:
    """What the template of a card's body reads."""
    return {"vocabulary": None, **card, "lengths": lengths(card["tokens"]["histogram"]), "bars": bars, "titles": TITLES}


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
        f'<span class="name">{escape(pages.clip(name, MAX_NAME))}</span><i style="width:{100 * count / most:.1f}%"></i>'
        f'<span class="count">{count:,}</span>'
        for name, count in shown
    ]
    if len(counts) > MAX_BARS:
        rows.append(f'<span class="name dim">and {len(counts) - MAX_BARS} more</span><i></i><span></span>')
    return Markup(f'<div class="bars {style}">{"".join(rows)}</div>')  # names are escaped above, the rest are numbers
