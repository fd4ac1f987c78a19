"""Builds the demo's data files from the human-rated texts of the vaderSentiment source distribution.

Tweets are the domain that the first model is trained for. Amazon review sentences are the domain that drifts in, with every sentiment
word replaced by coined slang (`settings.SLANG`): texts and scores are real, the slang is made up. `python -m dev.demo.data <folder>` writes

    tweets/{train,gate,reference,clean}.jsonl    disjoint by text
    reviews/{labelled,later}.jsonl               traffic: requests that get labelled, and those that come after the new model
    reviews/test.jsonl                           held out: whole documents that are in no other file
    ids.json                                     file -> ids of its rows

A row is `{"id", "document", "text", "label"}`. Same seed, same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dev.demo import settings
from dev.demo.packages import TEXTS, PackageError, fetch, packages_folder

from tuneloop_gateway.canonical import canonical, normalise
from tuneloop_gateway.curation import split_of

ROOT = "vaderSentiment-3.3.2"
LEXICON = f"{ROOT}/vaderSentiment/vader_lexicon.txt"
RATED = f"{ROOT}/additional_resources/hutto_ICWSM_2014.tar.gz"
TWEETS = "hutto_ICWSM_2014/tweets_GroundTruth.txt"
REVIEWS = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)?")


@dataclass(frozen=True)
class Row:
    """A text with its human label. `document` is the tweet or the review that it is from."""

    id: str
    document: str
    text: str
    label: str


@dataclass(frozen=True)
class Corpus:
    """What the package holds of use here."""

    tweets: tuple[Row, ...]
    reviews: tuple[Row, ...]
    """As their authors wrote them."""
    lexicon: Mapping[str, float]
    """Word -> valence, -4 to 4."""


def read_corpus(package: Path) -> Corpus:
    """Reads the source distribution without unpacking it to disk."""
    with tarfile.open(package) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, RATED))) as rated:
        return Corpus(
            tweets=_unique(_rows("tweet", _member(rated, TWEETS))),
            reviews=_unique(_rows("review", _member(rated, REVIEWS))),
            lexicon=_lexicon(_member(outer, LEXICON)),
        )


def build(corpus: Corpus, seed: int = settings.SEED) -> dict[str, tuple[Row, ...]]:
    """File name -> rows, all splits made by hashes under the seed."""
    tweets = _shuffled(corpus.tweets, seed, lambda row: row.id)
    sizes = {"train": settings.TRAIN_ROWS, "gate": settings.GATE_ROWS, "reference": settings.REFERENCE_ROWS * 11 // 10}
    files: dict[str, tuple[Row, ...]] = {}
    for name, size in sizes.items():
        files[f"tweets/{name}.jsonl"], tweets = tweets[:size], tweets[size:]
    files["tweets/clean.jsonl"] = tweets

    slang = tuple(with_slang(row, corpus.lexicon) for row in corpus.reviews)
    reviews = _unique(new for new, old in zip(slang, corpus.reviews, strict=True) if new.text != old.text)
    test, traffic = _hold_out_documents(reviews, settings.TEST_ROWS, seed)
    traffic = _shuffled(traffic, seed, lambda row: row.id)
    files["reviews/labelled.jsonl"] = traffic[: settings.LABELLED_ROWS]
    files["reviews/later.jsonl"] = traffic[settings.LABELLED_ROWS :]
    files["reviews/test.jsonl"] = test
    return files


def with_slang(row: Row, lexicon: Mapping[str, float]) -> Row:
    """The row with every word of the lexicon replaced by the coined word for its valence."""
    return replace(row, text=WORD.sub(lambda match: _slang(match.group(), lexicon), row.text))


def labels_for(captured: Iterable[Mapping[str, object]], labelled: Iterable[Row]) -> list[dict[str, str]]:
    """Rows to import as labels: the human label of each captured request that is one of `labelled`, found by its text.

    `captured` are rows with at least `id` and `text`, as `tuneloop label export` writes them; other texts are passed over.
    """
    known = {form: row for row in labelled for form in (canonical(row.text, redact=False), canonical(row.text, redact=True))}
    found = ((str(item["id"]), known.get(canonical(str(item["text"]), redact=False))) for item in captured)
    return [{"id": id_, "label": row.label, "document": row.document} for id_, row in found if row is not None]


def halves(rows: Iterable[Row]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Labelled rows as the gateway splits them by document: about half to train on, half to gate with."""
    kept = tuple(rows)
    return tuple(row for row in kept if split_of(row.document) == "train"), tuple(row for row in kept if split_of(row.document) == "gate")


def write(files: Mapping[str, Iterable[Row]], folder: Path) -> None:
    """Writes the data files and `ids.json`."""
    ids: dict[str, list[str]] = {}
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = list(rows)
        path.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        ids[name] = [row.id for row in kept]
    (folder / "ids.json").write_text(json.dumps(ids, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> tuple[Row, ...]:
    """The rows of a data file that `write` wrote."""
    with path.open(encoding="utf-8") as file:
        return tuple(Row(**json.loads(line)) for line in file)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise PackageError(f"{name} is not a file in the package.")
    return file.read()


def _rows(prefix: str, content: bytes) -> Iterable[Row]:
    """Lines are `id <tab> mean score <tab> text`; an id of the reviews is `document_sentence`."""
    for line in content.decode("utf-8", errors="replace").splitlines():
        number, score, text = line.split("\t", 2)
        text = normalise(html.unescape(text))
        if abs(float(score)) < settings.MINIMUM_SCORE or not text or "\ufffd" in text:
            continue
        label = settings.POSITIVE if float(score) > 0 else settings.NEGATIVE
        yield Row(id=f"{prefix}-{number}", document=f"{prefix}-{number.partition('_')[0]}", text=text, label=label)


def _lexicon(content: bytes) -> dict[str, float]:
    """Lines are `token <tab> mean valence <tab> …`; emoticons and the like are left out."""
    entries = (line.split("\t")[:2] for line in content.decode("utf-8").splitlines() if line.strip())
    return {token: float(valence) for token, valence in entries if WORD.fullmatch(token)}


def _slang(word: str, lexicon: Mapping[str, float]) -> str:
    valence = lexicon.get(word.lower())
    if valence is None:
        return word
    strength = "strongly " if abs(valence) >= settings.STRONG_VALENCE else ""
    return settings.SLANG[strength + ("positive" if valence > 0 else "negative")]


def _unique(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Without repeated texts (case and punctuation aside), so that splits by row are disjoint by text."""
    kept: dict[str, Row] = {}
    for row in rows:
        kept.setdefault(" ".join(WORD.findall(row.text.lower())), row)
    return tuple(kept.values())


def _shuffled(rows: Iterable[Row], seed: int, key: Callable[[Row], str]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda row: _hash(seed, key(row))))


def _hold_out_documents(rows: tuple[Row, ...], at_least: int, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Whole documents with at least so many rows together, and the rows of all others."""
    held: set[str] = set()
    for count, row in enumerate(_shuffled(rows, seed, lambda row: row.document)):
        if row.document not in held and count >= at_least:
            break
        held.add(row.document)
    return tuple(row for row in rows if row.document in held), tuple(row for row in rows if row.document not in held)


def _hash(seed: int, value: str) -> bytes:
    return hashlib.sha256(f"{seed}/{value}".encode()).digest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        files = build(read_corpus(fetch(TEXTS, packages_folder())))
    except PackageError as error:
        print(error, file=sys.stderr)
        return 1
    write(files, folder)
    for name, rows in files.items():
        positive = sum(row.label == settings.POSITIVE for row in rows) / len(rows)
        print(f"{folder / name}: {len(rows)} rows, {positive:.2f} positive")
    return 0


if __name__ == "__main__":
    sys.exit(main())
