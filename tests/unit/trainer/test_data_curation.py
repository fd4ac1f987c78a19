"""What curation keeps, drops and counts; and that it does so on disk."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tuneloop_gateway.canonical import redact_personal_data
from tuneloop_trainer.contract import Curation, Reason
from tuneloop_trainer.data import filters, personal, quality
from tuneloop_trainer.data.curation import Curating, Judging
from tuneloop_trainer.data.languages import LanguageFilter
from tuneloop_trainer.data.near import NearDuplicates, signatures
from tuneloop_trainer.data.records import Record
from tuneloop_trainer.data.splits import boundary, place
from tuneloop_trainer.data.toxicity import ToxicityScorer
from tuneloop_trainer.errors import Invalid

WORDS = (
    "harbour",
    "lantern",
    "meadow",
    "copper",
    "violin",
    "thunder",
    "orchard",
    "velvet",
    "compass",
    "granite",
    "willow",
    "ember",
    "saddle",
)
WORDS += ("marble", "anchor", "prairie")


def make_record(number: int, text: str, completion: str = "good", **fields: Any) -> Record:
    return Record(
        **({"prompt": f"Say: {text}", "completion": completion, "document": str(number), "content": text, "row": number} | fields)
    )


def make_text(number: int, words: int = 40) -> str:
    chosen = random.Random(number)
    return " ".join(f"{chosen.choice(WORDS)}{chosen.randrange(50)}" for _ in range(words))


def curated(
    root: Path, records: list[Record], items: list[Record] | None = None, fraction: float = 0.0, **asked: Any
) -> tuple[list[Record], list[Record], Any]:
    """What is trained on, what is held out, and what was counted."""
    curating, judging = Curating(Curation(**asked), root / "spool", seed=1, most_held_out=1000), Judging(Curation(**asked))
    with closing(curating):
        judging.guard(items or [])
        curating.add(records, judging)
        curating.drops.update(judging.filters.drops)
        sources, validation = curating.divide(fraction)
        counted = SimpleNamespace(drops=curating.drops, filters=judging.filters)
        return [record for source in sources for record in source], validation, counted


# --- personal data ---

PERSONAL = {
    "write to anna.b+x@mail.example.org today": ("write to [EMAIL] today", {"EMAIL": 1}),
    "card 4111 1111 1111 1111, thanks": ("card [CARD], thanks", {"CARD": 1}),
    "card 4111 1111 1111 1112, thanks": ("card 4111 1111 1111 1112, thanks", {}),
    "IBAN DE89 3704 0044 0532 0130 00 please": ("IBAN [IBAN] please", {"IBAN": 1}),
    "IBAN DE88 3704 0044 0532 0130 00 please": (None, None),
    "from 192.168.0.7 and 2001:db8::1": ("from [IP] and [IP]", {"IP": 2}),
    "version 1.2.3.400 at 12:30": ("version 1.2.3.400 at 12:30", {}),
    "my number is 078-05-1120": ("my number is [SSN]", {"SSN": 1}),
    "call +49 (30) 123 456-78 or (212) 555-0100": ("call [PHONE] or [PHONE]", {"PHONE": 2}),
    "on 2026-11-23 I paid 1.250,00 for 12 of 300": ("on 2026-11-23 I paid 1.250,00 for 12 of 300", {}),
    "no numbers here": ("no numbers here", {}),
}


@pytest.mark.parametrize("text", PERSONAL)
def test_personal_data_is_found_by_form_and_checksum_as_in_captured_traffic(text: str) -> None:
    found: Counter[str] = Counter()

    redacted = personal.redact(text, found)

    assert redacted == redact_personal_data(text), "what is trained on looks like what is captured"
    expected, counts = PERSONAL[text]
    if expected is not None:
        assert (redacted, dict(found)) == (expected, counts)


def test_redaction_covers_every_text_of_a_record_and_counts_rows(tmp_path: Path) -> None:
    mail = "a@example.org"
    record = make_record(1, f"from {mail}", f"to {mail}", system=f"for {mail}", user=f"by {mail}", rejected=f"not {mail}")

    train, _, curating = curated(tmp_path, [record, make_record(2, "nothing")], personal_data="Redact")

    assert not any(mail in str(value) for value in (getattr(train[0], name) for name in Record.__slots__))
    assert curating.filters.details["personalData"] == {"EMAIL": 1}
    assert curating.drops == {}


def test_rows_with_personal_data_can_be_dropped(tmp_path: Path) -> None:
    train, _, curating = curated(tmp_path, [make_record(1, "a@example.org"), make_record(2, "nothing")], personal_data="Drop")

    assert [record.row for record in train] == [2]
    assert curating.drops == {"PersonalData": 1}


def test_rows_that_redaction_makes_equal_are_duplicates(tmp_path: Path) -> None:
    train, _, curating = curated(
        tmp_path, [make_record(1, "ask a@example.org"), make_record(2, "ask b@example.org")], personal_data="Redact"
    )

    assert (len(train), curating.drops) == (1, {"Duplicate": 1})


# --- near duplicates ---


def test_near_duplicates_go_and_the_first_is_kept(tmp_path: Path) -> None:
    texts = [make_text(number) for number in range(60)]
    near = [" ".join([*text.split()[:-1], "changed"]) for text in texts[:20]]
    records = [make_record(number, text) for number, text in enumerate([*texts, *near])]

    train, _, curating = curated(tmp_path, records, deduplicate="Near", decontaminate=False)

    assert [record.row for record in train] == list(range(60))
    assert curating.drops == {"NearDuplicate": 20}


def test_texts_that_share_three_quarters_of_their_words_are_no_near_duplicates(tmp_path: Path) -> None:
    """Jaccard similarity 0.58: some meet in a band, and are told apart by their signatures."""
    records = [make_record(number, f"{make_text(0, 30)} {make_text(number, 10)}") for number in range(1, 40)]

    train, _, _ = curated(tmp_path, records, deduplicate="Near", decontaminate=False)

    assert len(train) == 39


def test_a_chain_of_near_texts_keeps_its_first(tmp_path: Path) -> None:
    words = make_text(1, 80).split()
    near = NearDuplicates(tmp_path)
    near.add(signatures([" ".join([*words[:place], "x", *words[place + 1 :]]) for place in range(10, 15)]))

    assert list(near.later()) == [2, 3, 4, 5]


def test_exact_deduplication_leaves_near_ones(tmp_path: Path) -> None:
    text = make_text(1)

    train, _, curating = curated(tmp_path, [make_record(1, text), make_record(2, text), make_record(3, text + " more")])

    assert [record.row for record in train] == [1, 3]
    assert curating.drops == {"Duplicate": 1}


# --- toxicity, language, quality ---


class Censor:
    """Finds one word."""

    name = "censor 1"

    def scores(self, texts: Sequence[str]) -> list[float]:
        return [0.95 if "idiot" in text else 0.2 for text in texts]


RUDE = "you are a fucking idiot and I hate you"


def test_toxic_rows_are_dropped_but_an_answer_to_avoid_may_be_toxic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "ToxicityScorer", Censor)
    records = [
        make_record(1, "what a lovely sunny day"),
        make_record(2, RUDE),
        make_record(3, "hello there", completion=RUDE),
        make_record(4, "hello again", completion=RUDE, desirable=False),
        make_record(5, "good morning", rejected=RUDE),
    ]

    train, _, curating = curated(tmp_path, records, max_toxicity=0.9)

    assert [record.row for record in train] == [1, 4, 5]
    assert curating.drops == {"Toxic": 2}
    assert curating.filters.tools == ["censor 1"]
    assert len(curated(tmp_path / "all", records, max_toxicity=0.95)[0]) == 5, "a score at the limit is kept"


@pytest.mark.long
def test_the_scorer_in_its_package_tells_rude_from_friendly_texts() -> None:
    scorer = ToxicityScorer()

    friendly, rude = scorer.scores(["what a lovely sunny day in the garden", RUDE])

    assert friendly < 0.1 < 0.9 < rude
    assert scorer.name == "alt-profanity-check 1.9.1"


@pytest.fixture(scope="module")
def english() -> LanguageFilter:
    return LanguageFilter(["en"])


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The weather in the mountains was cold and clear this morning.", None),
        ("Das Wetter in den Bergen war heute Morgen kalt und klar.", "de"),
        ("Le temps dans les montagnes était froid et clair ce matin.", "fr"),
        ("der hund", None),
        ("12345 67890 12345 67890 12345 67890", None),
    ],
)
def test_other_languages_are_told_apart_where_a_text_is_long_enough(text: str, language: str | None, english: LanguageFilter) -> None:
    assert english.foreign(text) == language


def test_an_unknown_language_is_named() -> None:
    with pytest.raises(Invalid, match=r"data\.curation\.languages has 'xx', which is none of the \d+ known codes"):
        LanguageFilter(["xx"])


PROSE = (
    "The harbour was quiet when the first boats came back, and the men who had been out since midnight climbed the steps one by one. "
    "Nobody spoke much. A dog lay in the sun beside the nets, and somebody in the house above began to play a song that all of them knew, "
    "slowly, as if it had to be remembered note by note before the day could start at last."
)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (PROSE, None),
        ("a short question?", None),
        ("#sunny day", None),
        ("Lorem ipsum dolor sit amet", "Placeholder"),
        ("please enable JavaScript to go on", "Placeholder"),
        ("\ufffd\ufffd broken", "BrokenEncoding"),
        ("# # # # # # # # #", "Symbols"),
        (" ".join(["a", "b", "c", "d"] * 20), "WordLength"),
        (" ".join(f"{number:06}" for number in range(60)), "NoLetters"),
        ("\n".join(f"- {WORDS[number % 16]} number {WORDS[number // 16]} of the list" for number in range(30)), "Bullets"),
        ("\n".join(f"{WORDS[number % 16]} and then {WORDS[number // 4]}…" for number in range(16)), "Ellipses"),
        ("\n".join([PROSE, *["Click here to subscribe to all our letters"] * 12]), "RepeatedLines"),
        (" ".join(["buy cheap watches"] * 30), "RepeatedRuns"),
        (f"{PROSE} {PROSE}", "RepeatedRuns"),
    ],
)
def test_rules_of_quality(text: str, rule: str | None) -> None:
    if rule == "Ellipses":
        text = text.replace("…", " …")  # so that the rule on symbols in words does not come first
        text = "\n".join(f"{line.removesuffix(' …')} with more words behind it to fill the line up…" for line in text.splitlines())

    assert quality.flaw(text) == rule


def test_low_quality_is_counted_by_rule(tmp_path: Path) -> None:
    records = [make_record(1, PROSE), make_record(2, "Lorem ipsum dolor"), make_record(3, " ".join(["buy cheap watches"] * 30))]

    train, _, curating = curated(tmp_path, records, quality="Gopher")

    assert (len(train), curating.drops) == (1, {"LowQuality": 2})
    assert curating.filters.details["quality"] == {"Placeholder": 1, "RepeatedRuns": 1}


# --- the whole ---


def test_classes_are_capped_by_the_smallest(tmp_path: Path) -> None:
    records = [make_record(number, make_text(number, 9), "rare" if number % 10 == 0 else "common") for number in range(100)]

    train, _, curating = curated(tmp_path, records, max_class_ratio=2.0)
    again, _, _ = curated(tmp_path / "again", records, max_class_ratio=2.0)

    assert Counter(record.completion for record in train) == {"rare": 10, "common": 20}
    assert curating.drops == {"ClassBalance": 70}
    assert train == again


def test_balance_needs_classes(tmp_path: Path) -> None:
    records = [make_record(number, make_text(number, 9), f"answer {number}") for number in range(70)]

    with pytest.raises(Invalid, match=r"data\.curation\.classBalance needs completions of at most 64 classes") as error:
        curated(tmp_path, records, max_class_ratio=2.0)

    assert error.value.reason is Reason.DATA_INVALID


def test_gate_items_and_the_validation_split_never_train(tmp_path: Path) -> None:
    texts = [make_text(number) for number in range(100)]
    records = [make_record(number, text) for number, text in enumerate(texts)]
    records += [make_record(1000 + number, f"{text} x") for number, text in enumerate(texts)]  # each again, as a document of its own

    train, validation, curating = curated(tmp_path, records, [make_record(0, texts[7])], fraction=0.1)

    held = {record.content.removesuffix(" x") for record in validation}
    assert 10 <= len(validation) <= 20
    assert not any(record.content.removesuffix(" x") in held | {texts[7]} for record in train)
    assert len(train) + len(validation) + curating.drops.total() == 200


def test_no_more_is_held_out_than_can_be_scored(tmp_path: Path) -> None:
    curating = Curating(Curation(decontaminate=False), tmp_path, seed=1, most_held_out=10)
    with closing(curating):
        curating.add((make_record(number, make_text(number, 5)) for number in range(200)), Judging(Curation()))
        sources, validation = curating.divide(0.5)

        assert (len(validation), len(sources[0])) == (10, 190)


def test_what_comes_back_from_disk_is_what_went_in_and_can_be_walked_again(tmp_path: Path) -> None:
    records = [make_record(n, f"é {n}", system=None if n % 2 else "s", user="u", rejected="r", desirable=bool(n % 2)) for n in range(30)]
    curating = Curating(Curation(), tmp_path, seed=1, most_held_out=1000)
    with closing(curating):
        curating.add(records[:20], Judging(Curation()))
        curating.add(records[20:], Judging(Curation()))
        (first, second), _ = curating.divide(0.0)

        assert [list(first), list(first), list(second)] == [records[:20], records[:20], records[20:]]
        assert (len(first), len(second)) == (20, 10)


def test_documents_are_held_out_in_the_order_of_their_places() -> None:
    def counts() -> Iterator[tuple[bytes, int]]:
        return iter([(b"a", 3), (b"b", 4), (b"c", 5), (b"d", 1)])

    assert [boundary(counts(), rows) for rows in (1, 7, 8, 12, 100)] == [b"a", b"b", b"b", b"c", b"c"]
    assert boundary(iter([(b"a", 9)]), 5) == b"", "the only document is not held out"
    assert place("x", 1) != place("x", 2)
