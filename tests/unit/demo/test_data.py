"""The demo's data: splits that share nothing, slang in place of sentiment words, labels found by text."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

import pytest
from dev.demo import data, settings
from dev.demo.data import Row
from dev.demo.packages import TEXTS, packages_folder

LEXICON = {"great": 3.1, "nice": 1.8, "poor": -1.9, "awful": -2.0, "don't like": -1.0}


def make_corpus(tweets: int = 3400, documents: int = 300, sentences: int = 8) -> data.Corpus:
    """As many texts as the real one has, each different; every fourth review sentence has no sentiment word."""
    words = ("great", "nice", "poor", "plain")
    labels = itertools.cycle(settings.LABELS)
    return data.Corpus(
        tweets=tuple(Row(f"tweet-{at}", f"tweet-{at}", f"word{chr(97 + at % 26)} {_letters(at)} :)", next(labels)) for at in range(tweets)),
        reviews=tuple(
            Row(f"review-{document}_{at}", f"review-{document}", f"a {words[at % 4]} {_letters(document * sentences + at)}", next(labels))
            for document in range(documents)
            for at in range(sentences)
        ),
        lexicon=LEXICON,
    )


def _letters(number: int) -> str:
    return "".join(chr(97 + int(digit)) for digit in str(number))


def real_corpus() -> data.Corpus:
    package = packages_folder() / TEXTS.file
    if not package.exists():
        pytest.skip("the package of texts has not been fetched on this machine")
    return data.read_corpus(package)


@pytest.fixture(params=[make_corpus, real_corpus], ids=["made-up", "real"])
def files(request: pytest.FixtureRequest) -> dict[str, tuple[Row, ...]]:
    return data.build(request.param())


def test_no_two_files_share_an_id_or_a_text(files: dict[str, tuple[Row, ...]], tmp_path: Path) -> None:
    data.write(files, tmp_path)
    ids = json.loads((tmp_path / "ids.json").read_text())
    assert ids.keys() == files.keys()
    for (one, first), (two, second) in itertools.combinations(ids.items(), 2):
        assert not set(first) & set(second), f"{one} and {two} share ids"
    texts = [data.normalise(row.text).lower() for name in ids for row in data.read(tmp_path / name)]
    assert len(texts) == len(set(texts))


def test_documents_of_the_final_test_are_in_no_other_file(files: dict[str, tuple[Row, ...]]) -> None:
    held_out = {row.document for row in files["reviews/test.jsonl"]}
    others = {row.document for name, rows in files.items() if name != "reviews/test.jsonl" for row in rows}
    assert held_out
    assert not held_out & others


def test_files_hold_as_many_rows_as_the_settings_say(files: dict[str, tuple[Row, ...]]) -> None:
    sizes = {name: len(rows) for name, rows in files.items()}
    assert sizes["tweets/train.jsonl"] == settings.TRAIN_ROWS
    assert sizes["tweets/gate.jsonl"] == settings.GATE_ROWS
    assert sizes["tweets/reference.jsonl"] == settings.REFERENCE_ROWS * 11 // 10
    assert sizes["tweets/clean.jsonl"] >= 300
    assert sizes["reviews/labelled.jsonl"] == settings.LABELLED_ROWS
    assert sizes["reviews/later.jsonl"] >= 300
    assert settings.TEST_ROWS <= sizes["reviews/test.jsonl"] < settings.TEST_ROWS + 60


def test_labelled_rows_fall_into_halves_that_share_no_document_and_suffice_for_the_gate() -> None:
    train, gate = data.halves(data.build(real_corpus())["reviews/labelled.jsonl"])
    assert not {row.document for row in train} & {row.document for row in gate}
    assert 400 <= len(gate) <= 600
    assert len(train) >= 400


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_splits(tmp_path: Path) -> None:
    corpus = make_corpus()
    for name, seed in {"first": 1, "again": 1, "other": 2}.items():
        data.write(data.build(corpus, seed), tmp_path / name)
    for file in data.build(corpus):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
        assert (tmp_path / "first" / file).read_bytes() != (tmp_path / "other" / file).read_bytes()


def test_every_sentiment_word_becomes_slang_by_its_valence_and_nothing_else_changes() -> None:
    row = Row("1", "1", "Great phone; NICE keys, poor-ish sound.  Awful greatness!", "positive")
    strong, mild, bad, worst = (settings.SLANG[name] for name in ("strongly positive", "positive", "negative", "strongly negative"))
    expected = f"{strong} phone; {mild} keys, {bad}-ish sound.  {worst} greatness!"
    assert data.with_slang(row, LEXICON).text == expected


def test_reviews_without_a_sentiment_word_are_left_out_and_tweets_hold_no_slang(files: dict[str, tuple[Row, ...]]) -> None:
    coined = set(settings.SLANG.values())
    for name, rows in files.items():
        for row in rows:
            assert bool(coined & set(data.WORD.findall(row.text))) is name.startswith("reviews/"), row


def test_slang_is_in_no_text_and_not_in_the_lexicon() -> None:
    corpus = real_corpus()
    coined = set(settings.SLANG.values())
    assert len(coined) == len(settings.SLANG)
    assert not coined & corpus.lexicon.keys()
    assert not coined & {word.lower() for row in corpus.tweets + corpus.reviews for word in data.WORD.findall(row.text)}


def test_captured_requests_get_the_label_of_their_text_and_others_are_passed_over() -> None:
    labelled = [
        Row("review-1_1", "review-1", "a glimmish phone", "positive"),
        Row("review-2_1", "review-2", "call 555-123-4567 if mubbed", "negative"),
    ]
    captured = [
        {"id": "a", "text": "a  glimmish\nphone", "answer": "negative"},
        {"id": "b", "text": "call [PHONE] if mubbed", "answer": "negative"},
        {"id": "c", "text": "a tweet that nobody labelled", "answer": "positive"},
    ]
    assert data.labels_for(captured, labelled) == [
        {"id": "a", "label": "positive", "document": "review-1"},
        {"id": "b", "label": "negative", "document": "review-2"},
    ]


def test_a_package_is_read_without_unclear_scores_repeated_texts_and_emoticons(tmp_path: Path) -> None:
    tweets = "1\t2.5\tgood &amp; bad\n2\t0.4\tunclear\n3\t-0.5\tsad  day\n4\t-3\tSad day!\n"
    rated = _archive({data.TWEETS: tweets, data.REVIEWS: "7_1\t-1.2\tno picture\n7_2\t1\tworks\n"})
    outer = _archive({data.LEXICON: "great\t3.1\t0.7\t[3]\n:)\t2.0\t1.1\t[2]\n", data.RATED: rated})
    package = tmp_path / "package.tar.gz"
    package.write_bytes(outer)
    corpus = data.read_corpus(package)
    assert [(row.id, row.text, row.label) for row in corpus.tweets] == [
        ("tweet-1", "good & bad", "positive"),
        ("tweet-3", "sad day", "negative"),
    ]
    assert [(row.id, row.document) for row in corpus.reviews] == [("review-7_1", "review-7"), ("review-7_2", "review-7")]
    assert corpus.lexicon == {"great": 3.1}


def _archive(files: dict[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            raw = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return buffer.getvalue()
