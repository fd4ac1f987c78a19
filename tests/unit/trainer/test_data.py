"""Order, splits, packing and contamination."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloop_trainer.chat import IGNORED
from tuneloop_trainer.data import packing
from tuneloop_trainer.data.contamination import HASH, JACCARD, NGRAM, ContaminationIndex
from tuneloop_trainer.data.packing import pack, pack_stream
from tuneloop_trainer.data.schedule import by_length_within_batches, quotas, sample_order, total_steps
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.data.splits import boundary, place

SOURCES = st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 10)), min_size=1, max_size=4)


@given(SOURCES, st.integers(1, 200), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_source_gets_exactly_its_share(sources: list[tuple[int, float]], total: int, seed: int) -> None:
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]

    order = sample_order(sizes, weights, total, seed)

    bounds = np.cumsum([0, *sizes])
    counts = [int(((order >= low) & (order < high)).sum()) for low, high in pairwise(bounds)]
    assert counts == quotas(weights, total)
    assert sum(counts) == total
    assert all(abs(count - total * weight / sum(weights)) < 1 for count, weight in zip(counts, weights, strict=True))
    uses = Counter(order.tolist())
    for low, high, count, size in zip(bounds, bounds[1:], counts, sizes, strict=False):
        assert {uses[row] for row in range(low, high)} <= {count // size, -(-count // size)}, "no row twice before each was once"


def test_sources_are_mixed_evenly() -> None:
    order = sample_order([100, 100], [0.5, 0.5], 200, seed=1)

    halves = [int((part >= 100).sum()) for part in np.split(order, 10)]

    assert all(9 <= count <= 11 for count in halves)


def test_order_follows_from_the_seed() -> None:
    assert np.array_equal(sample_order([50], [1], 70, 1), sample_order([50], [1], 70, 1))
    assert not np.array_equal(sample_order([50], [1], 70, 1), sample_order([50], [1], 70, 2))


def test_sorting_by_length_stays_within_the_global_batch() -> None:
    order = sample_order([40], [1], 40, 1)
    lengths = np.arange(40)

    ordered = by_length_within_batches(order, lengths, 8)

    assert [set(batch) for batch in ordered.reshape(-1, 8).tolist()] == [set(batch) for batch in order.reshape(-1, 8).tolist()]
    assert all((np.diff(lengths[batch]) <= 0).all() for batch in ordered.reshape(-1, 8))


@pytest.mark.parametrize(
    ("rows", "epochs", "steps", "expected"), [(100, 1, None, 7), (100, 3, None, 19), (100, 0.5, None, 4), (100, 1, 12, 12)]
)
def test_steps_follow_from_epochs_unless_they_are_given(rows: int, epochs: float, steps: int | None, expected: int) -> None:
    assert total_steps(rows, epochs, steps, 16) == expected


def held_out_documents(documents: list[str], fraction: float, seed: int) -> set[str]:
    counts = Counter(documents)
    last = boundary(sorted((place(name, seed), count) for name, count in counts.items()), fraction * len(documents))
    return {name for name in counts if place(name, seed) <= last}


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60), st.floats(0.01, 0.9), st.integers(0, 3))
def test_documents_are_held_out_whole(documents: list[str], fraction: float, seed: int) -> None:
    held = held_out_documents(documents, fraction, seed)

    assert held < set(documents) or not held, "something is left to train on"
    if len(set(documents)) > 1:
        assert held
        first = min(Counter(documents)[name] for name in held)
        assert sum(name in held for name in documents) <= max(fraction * len(documents), first, max(Counter(documents).values()))


def test_a_new_document_moves_no_other_one_out_of_the_split() -> None:
    before = held_out_documents([str(number) for number in range(100)], 0.2, 1)
    after = held_out_documents([str(number) for number in range(105)], 0.2, 1)

    assert len(before) == 20
    assert len(before & after) >= 18


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_packing_keeps_every_row_and_no_loss_across_borders(lengths: list[int]) -> None:
    rows = [TokenRow([number + 1] * length, [number + 1] * length, "d", 0) for number, length in enumerate(lengths)]

    packed = pack(rows, 20)

    assert Counter(token for row in packed for token in row.input_ids) == Counter(token for row in rows for token in row.input_ids)
    for row in packed:
        assert len(row.input_ids) == sum(row.sequences) <= 20
        starts = np.cumsum([0, *row.sequences[:-1]])
        assert all(row.labels[start] == IGNORED for start in starts)
    assert len(packed) <= len(rows)
    assert all(len(a.input_ids) + len(b.input_ids) > 20 for a, b in pairwise(packed)) or len(packed) < len(rows)


def test_packing_of_a_stream_keeps_every_row_over_the_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW_ROWS", 7)
    rows = [TokenRow([number] * (number % 5 + 1), [number] * (number % 5 + 1), "d", 0) for number in range(1, 40)]

    packed = list(pack_stream(iter(rows), 12))

    assert Counter(token for row in packed for token in row.input_ids) == Counter(token for row in rows for token in row.input_ids)
    assert len(packed) < 20


ITEM = "the quick brown fox jumps over the lazy dog while seven grey cats watch from the old garden wall"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("The quick, brown FOX jumps over the lazy dog — while seven grey cats watch from the old garden wall!", HASH),
        (ITEM.replace("quick", "slow") + " today", NGRAM),
        ("so they say: " + " ".join(ITEM.split()[3:16]) + " and then they all slept very well", NGRAM),
        ("one two three four five six seven eight nine ten eleven", JACCARD),
        ("the quick brown fox is not in this sentence at all", None),
        ("", None),
    ],
)
def test_contamination_is_found_by_rule(text: str, rule: str | None) -> None:
    index = ContaminationIndex([ITEM, "one two three four five six seven eight nine ten twelve", "something else", "and more"])

    assert index.rule(text) == rule


def test_words_that_all_items_share_are_not_contamination() -> None:
    boilerplate = "Please read the following message of a customer very carefully and then tell me in one word its sentiment: "
    index = ContaminationIndex([f"{boilerplate} item {number} says {number * 7919}" for number in range(40)])

    assert index.rule(f"{boilerplate} something new altogether") is None
    assert index.rule(f"{boilerplate} item 3 says {3 * 7919}") == HASH
