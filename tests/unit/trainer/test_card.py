"""What model cards tell: the licence of the base, and with the figures of the evaluation everything that is known of a model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.unit.trainer.reports import make_finished

from tuneloop_trainer.card import base_licence
from tuneloop_trainer.report import written_card


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


IMAGE = "![x](http://e.test) <img src=x> a | b `c` www.e.test me@e.test"


def test_card_of_an_evaluated_model_tells_all_that_is_known_of_it(tmp_path: Path) -> None:
    card = written_card(*make_finished(tmp_path))

    assert card is not None
    for told in (
        "license: apache-2.0", "# tiny", "| rows trained on | 5 |", "| tokens | 70 |", "| suite `gate` | `sha256:444",
        "| gate | Accuracy | NonInferior | Pass | 0.81 | 0.8 | -0.02 to 0.04 | 412 | |", "| held | Loss | Superior | Inconclusive |",
        "| gate | 412 | macro f1 | 0.79 |", "## Accuracy of gate by label", "| all others | 372 | 0.7 | 0.9 | -0.3 to -0.1 |",
        "Between the best and the worst: 0.175 (0.0625 to 0.3125), the baseline's 0.775; grown by -0.75 to -0.5.",
        "Verdict: Inconclusive, of the artifact `sha256:", "The base model's card says `apache-2.0`.",
    ):  # fmt: skip
        assert told in card, told
    assert card.index("## Limits") > card.index("## Accuracy of gate by label")
    assert str(tmp_path) not in card, "no path of the store"


def test_names_of_groups_stay_words(tmp_path: Path) -> None:
    card = written_card(*make_finished(tmp_path, text=IMAGE))

    assert card is not None
    (row,) = (line for line in card.splitlines() if line.endswith("| 40 | 0.875 | 0.125 | 0.61 to 0.85 |"))
    assert row.replace("\u2060", "").startswith(r"| \!\[x\](http://e.test) &lt;img src=x> a \| b \`c\` www.e.test me@e.test |")
    assert not re.search(r"https?://|www\.|\w@", row), "a hub makes links of bare addresses"


def test_card_that_cannot_be_made_loses_no_evaluation(tmp_path: Path) -> None:
    config, artifact, summary, told = make_finished(tmp_path)
    (Path(config.paths.work) / "train" / "final" / "result.json").unlink()
    assert written_card(config, artifact, summary, told) is None
