"""The licence that a model card tells of the base."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneloop_trainer.card import base_licence


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: []\n---\n# x", "apache-2.0"),
        ('---\ntags: []\nlicense: "mit"\n---\n', "mit"),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("license: mit\n", None),
    ],
)
def test_licence_of_the_base_is_what_its_header_says(tmp_path: Path, card: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_text(card)
    assert base_licence(tmp_path) == licence


def test_base_without_a_card_has_no_known_licence(tmp_path: Path) -> None:
    assert base_licence(tmp_path) is None
