"""A row may be a conversation: each answer that is to be learned stands behind exactly what the engine reads when it is asked for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
from tests.unit.trainer.builders import make_config, make_source, replace, run_stage, write_jsonl

from tuneloop_trainer.chat import IGNORED, Formatter, Turn, stop_ids
from tuneloop_trainer.contract import Curation, Evaluation, ExitCode, Gate, RunConfig, Stage, Suite, Template
from tuneloop_trainer.data.conversations import MAX_TURNS, Unusable, read_conversation
from tuneloop_trainer.data.preflight import Preflight, Vocabulary
from tuneloop_trainer.data.records import CONVERSED, PROMPTED, Record, RowReader
from tuneloop_trainer.data.shards import TokenRow, read_rows
from tuneloop_trainer.data.spool import Spool
from tuneloop_trainer.data.suites import items_of, read_items, write_items
from tuneloop_trainer.data.terms import texts_of
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.evaluation.suites import prepare_suite
from tuneloop_trainer.models import load_tokenizer
from tuneloop_trainer.objectives import objective_of

FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template as reasoning models have: what stands before an answer is gone once there is another one."""


JOINED = "{% for message in messages %}{{ message['content'] }}{{ '<|im_end|>' if message['role'] == 'assistant' else '' }}{% endfor %}"
"""A template under which a question and its answer are one word."""


def said(*contents: str, system: str | None = None, silent: tuple[int, ...] = ()) -> list[dict[str, object]]:
    """User and assistant in turns; `silent` are the answers, by their number, that are not learned."""
    turns: list[dict[str, object]] = [] if system is None else [{"role": "system", "content": system}]
    for place, content in enumerate(contents):
        turn: dict[str, object] = {"role": ("user", "assistant")[place % 2], "content": content}
        turns.append(turn | ({"weight": 0} if place % 2 and place // 2 in silent else {}))
    return turns


def talks(count: int, **columns: Any) -> list[dict[str, object]]:
    return [
        {"messages": said(f"sunny day {n}?", f"positive {n}", f"rainy tea {n}?", f"negative {n}"), "document": f"d{n}"} | columns
        for n in range(count)
    ]


def make_talk(root: Path, base: Path, rows: list[Any], **fields: Any) -> RunConfig:
    return make_config(root, base, [make_source(write_jsonl(root / "data" / "train.jsonl", rows), template=None)], **fields)


def shown(tokenizer: Any, row: TokenRow) -> list[str]:
    """The pieces of text that are learned."""
    pieces: list[list[int]] = [[]]
    for label in row.labels:
        pieces = [*pieces[:-1], [*pieces[-1], label]] if label != IGNORED else [*pieces, []]
    return [tokenizer.decode(piece) for piece in pieces if piece]


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return load_tokenizer(base, "base")


# --- tokens ---


def test_each_answer_stands_behind_what_the_engine_renders_of_the_turns_before_it(tokenizer: Any, base: Path, tmp_path: Path) -> None:
    messages = said("Is it sunny?", "positive", "And the tea?", "negative", "The song?", "positive", system="Be brief.", silent=(1,))
    config = make_talk(tmp_path, base, [{"messages": messages}])

    assert run_stage(config, Stage.PREPARE).exit_code == 0

    row = next(read_rows(tmp_path / "work" / "prepare", "train"))
    assert shown(tokenizer, row) == ["positive<|im_end|>", "positive<|im_end|>"]
    for place in (2, 6):  # the learned answers' places
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages[:place]]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(rendered, add_special_tokens=False)["input_ids"]  # as the engine does
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels[len(prompt) - 1] == IGNORED
        assert row.labels[len(prompt)] == row.input_ids[len(prompt)]


def test_the_loss_may_be_on_the_whole_conversation(tokenizer: Any, base: Path, tmp_path: Path) -> None:
    config = replace(make_talk(tmp_path, base, talks(1)), loss="FullSequence")

    assert run_stage(config, Stage.PREPARE).exit_code == 0

    row = next(read_rows(tmp_path / "work" / "prepare", "train"))
    assert row.labels == row.input_ids


@pytest.mark.parametrize("limit", [1, 20, 30, 40, 60, 500])
def test_a_conversation_is_cut_as_one_text(tokenizer: Any, base: Path, limit: int) -> None:
    formatter = Formatter(tokenizer, stop_ids(base, tokenizer), "Chat")
    history = [Turn("user", "A sunny day?", False), Turn("assistant", "positive", True)]

    whole = formatter.converse("And tea?", "negative", None, history, 10_000)
    cut = formatter.converse("And tea?", "negative", None, history, limit)

    assert cut == (whole[0][:limit], whole[1][:limit], len(whole[0]))


@pytest.mark.parametrize(("system", "turn"), [(None, 4), ("Be brief.", 5)])
def test_a_template_that_rewrites_earlier_turns_is_refused_with_row_and_turn(
    base: Path, tmp_path: Path, system: str | None, turn: int
) -> None:
    forgetful = with_template(base, tmp_path / "forgetful", FORGETFUL)
    rows = [{"messages": said("A day?", "positive", system=system)}, {"messages": said("A day?", "yes", "Tea?", "no", system=system)}]

    result = run_stage(make_talk(tmp_path, forgetful, rows), Stage.PREPARE)

    assert result.exit_code == ExitCode.INVALID
    assert result.message.startswith(f"Row 2: turn {turn}: the base model's chat template")
    assert "weight: 0" in result.message


def test_such_a_template_learns_the_answers_of_rows_that_have_one_each(tokenizer: Any, base: Path, tmp_path: Path) -> None:
    forgetful = with_template(base, tmp_path / "forgetful", FORGETFUL)
    rows = [{"messages": said("A day?", "yes")}, {"messages": said("A day?", "yes", "Tea?", "no", silent=(0,))}]

    assert run_stage(make_talk(tmp_path, forgetful, rows), Stage.PREPARE).exit_code == 0

    learned = [shown(tokenizer, row) for row in read_rows(tmp_path / "work" / "prepare", "train")]
    assert learned == [["<think></think>yes<|im_end|>"], ["<think></think>no<|im_end|>"]]


def with_template(base: Path, folder: Path, template: str) -> Path:
    shutil.copytree(base, folder)
    tokenizer = load_tokenizer(folder, "base")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_a_prompt_that_would_merge_with_the_answer_before_it_is_refused(base: Path, tmp_path: Path) -> None:
    """Texts that go on are not enough: the engine tokenises question and answer together once they are the past."""
    plain = with_template(base, tmp_path / "plain", JOINED)

    result = run_stage(make_talk(tmp_path, plain, [{"messages": said(" posi", "tive", " nega", "tive")}]), Stage.PREPARE)

    assert result.exit_code == ExitCode.INVALID
    assert "Row 1: turn 4" in result.message


def test_text_renders_no_conversation(tokenizer: Any, base: Path) -> None:
    with pytest.raises(Invalid, match="promptFormat: Chat"):
        Formatter(tokenizer, stop_ids(base, tokenizer), "Text").encode("a", "b", None, [Turn("user", "c", False)])


# --- rows ---


def test_what_follows_the_last_learned_answer_teaches_nothing() -> None:
    found = read_conversation([*said("a", "b", "c", "d", system="s", silent=(1,)), {"role": "user", "content": "e", "weight": None}])

    assert (found.system, found.history, found.prompt, found.completion) == ("s", (), "a", "b")


UNUSABLE: dict[str, tuple[object, str, str]] = {
    "nothing": (None, "MissingValue", "nothing where a list of turns is needed"),
    "a text": ("[]", "MissingValue", "a str where a list"),
    "no turn": ([], "NoSupervisedToken", "no assistant's turn"),
    "no answer": (said("a"), "NoSupervisedToken", "no assistant's turn"),
    "no learned answer": (said("a", "b", silent=(0,)), "NoSupervisedToken", "no assistant's turn"),
    "too many": (said(*["a"] * (MAX_TURNS + 1)), "TooLong", "201 turns"),
    "no object": (["a"], "Malformed", "a str as turn 1"),
    "another role": ([{"role": "tool", "content": "a"}], "Malformed", "turn 1 of the role 'tool'"),
    "a role that is none": ([{"role": ["user"], "content": "a"}], "Malformed", "turn 1 of the role"),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "Malformed", "turn 1 without a text"),
    "tools": ([*said("a"), {"role": "assistant", "content": "", "tool_calls": [{}]}], "Malformed", "turn 2 that calls tools"),
    "empty": (said("a", " \n"), "Empty", "turn 2"),
    "another weight": ([*said("a"), {"role": "assistant", "content": "b", "weight": 0.5}], "Malformed", "turn 2 with a weight"),
    "a learned question": ([{"role": "user", "content": "a", "weight": 1}], "Malformed", "turn 1 with a weight"),
    "an answer to nothing": (said("a", "b")[1:], "Malformed", "number 1, that does not follow"),
    "two answers": ([*said("a", "b"), *said("a", "b")[1:]], "Malformed", "number 3, that does not follow"),
    "a late system turn": ([*said("a", "b"), *said("a", "b", system="s")], "Malformed", "a system turn, number 3"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_no_conversation_is_dropped_with_its_reason(case: str, tmp_path: Path) -> None:
    value, reason, problem = UNUSABLE[case]
    rows = [{"talk": value}, *({"talk": said("a", f"b{number}")} for number in range(9))]
    source = make_source(write_jsonl(tmp_path / "rows.jsonl", rows), template=None, columns={"messages": "talk"})
    reader = RowReader(source, "data.train[0]", CONVERSED)

    assert len(list(reader.records())) == 9

    assert reader.drops.counts == {reason: 1}
    assert reader.drops.first.startswith("row 1: column 'talk' has ")
    with pytest.raises(Unusable, match=problem):
        read_conversation(value)


def test_a_conversation_is_bounded_as_a_text_is(tmp_path: Path) -> None:
    rows = [{"messages": said(*["long " * 14_000, "b"] * 4)}, *talks(5)]
    reader = RowReader(make_source(write_jsonl(tmp_path / "rows.jsonl", rows), template=None), "data.train[0]", CONVERSED)

    assert len(list(reader.records())) == 5
    assert reader.drops.counts == {"TooLong": 1}


@pytest.mark.parametrize(
    ("row", "converses"),
    [({}, True), ({"prompt": "p"}, True), ({"prompt": "p", "completion": "c"}, False)],
)
def test_rows_without_prompts_are_the_conversations_that_they_have(row: dict[str, str], converses: bool, tmp_path: Path) -> None:
    source = make_source(write_jsonl(tmp_path / "rows.jsonl", [{"messages": said("a", "b"), **row}]), template=None)

    (record,) = RowReader(source, "data.train[0]", CONVERSED).records()

    assert (record.prompt, record.completion) == (("a", "b") if converses else ("p", "c"))


def test_other_objectives_and_formats_say_that_they_read_no_conversations(base: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", talks(2))
    named = make_source(path, template=None, columns={"messages": "messages"})
    with pytest.raises(Invalid, match=r"data.train\[0\].columns.messages is not read: these rows have prompt, completion."):
        RowReader(named, "data.train[0]", PROMPTED)
    with pytest.raises(Invalid, match=r"has no column 'completion'; it has messages, document. Set data.train\[0\].columns."):
        list(RowReader(make_source(path, template=None), "data.train[0]", PROMPTED).records())
    with pytest.raises(Invalid, match=r"Remove data.train\[0\].template"):
        RowReader(make_source(path, template=Template(prompt="x"), columns={"messages": "messages"}), "data.train[0]", CONVERSED)
    config = make_config(tmp_path, base)
    assert objective_of(config).shape is CONVERSED
    assert objective_of(replace(config, prompt_format="Text")).shape is PROMPTED
    assert objective_of(replace(config, objective="DPO")).shape is not CONVERSED


# --- what is done with the text of a conversation ---


def talk(*contents: str, row: int = 1, system: str | None = None) -> Record:
    (*history, prompt, completion) = contents
    turns = tuple(Turn(("user", "assistant")[place % 2], text, bool(place % 2)) for place, text in enumerate(history))
    return Record(prompt, completion, f"d{row}", "\n".join([*history, prompt]), row, system, None, history=turns)


def test_a_conversation_comes_back_from_the_disk_as_it_was(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", 42)
    record = talk("a", "b", "c", "d", system="s")
    spool.add(0, record)

    assert list(spool.train(0)) == [record]


def test_conversations_are_equal_where_all_their_turns_are() -> None:
    assert talk("a", "b", "c", "d").key == talk("a ", "b", "c", " d").key
    assert len({talk("a", "b", "c", "d").key, talk("x", "b", "c", "d").key, talk("a", "x", "c", "d").key, talk("c", "d").key}) == 4


def test_curation_sees_every_turn(base: Path, tmp_path: Path) -> None:
    gate = {"messages": said("Which of the many roads that lead to the old harbour is open at night in winter?", "positive")}
    rows = [
        *({"messages": said(f"Who is number {n} of the {n * 7} people?", f"{n}", f"And {n + 1}?", f"no {n}")} for n in range(12)),
        {"messages": said("Who is it?", "Write to ann@example.org, please", "When?", "Tomorrow at noon, as always.")},
        {"messages": said("What now?", "Wait.", *contents(gate), "And then?", "Nothing else is to be done.")},
        {"messages": said("the quick brown fox jumps over the lazy dog again", "yes", "is it so, is it really so?", "it is, it is so")},
        {"messages": said("the quick brown fox jumps over the lazy dog again!", "yes", "is it so, is it really so?", "it is; it is so")},
    ]
    suite = Suite(
        name="gate",
        type="Dataset",
        source=make_source(write_jsonl(tmp_path / "data" / "gate.jsonl", [gate]), template=None),
        metrics=("Loss",),
    )
    curation = Curation(personal_data="Redact", deduplicate="Near")
    config = make_talk(tmp_path, base, rows, curation=curation, evaluation=Evaluation(suites=(suite,)))

    result = run_stage(config, Stage.PREPARE)

    assert result.exit_code == 0, result.message
    assert result.prepare.dropped == {"ContaminatedNgram": 1, "NearDuplicate": 1}
    tokenizer = load_tokenizer(base, "base")
    texts = [tokenizer.decode(row.input_ids) for row in read_rows(tmp_path / "work" / "prepare", "train")]
    assert [text for text in texts if "[EMAIL]" in text]
    assert not [text for text in texts if "ann@example.org" in text]


def contents(row: dict[str, Any]) -> list[str]:
    return [turn["content"] for turn in row["messages"]]


def test_a_vocabulary_is_made_of_every_turn() -> None:
    assert list(texts_of([talk("a", "b", "c", "d", system="s")])) == ["s", "a", "b", "c", "d"]


def test_every_answer_has_to_end(tmp_path: Path) -> None:
    preflight = Preflight(make_config(tmp_path, tmp_path), Vocabulary(frozenset([2]), 1, 0, 100, 100))
    labels = [IGNORED, 5, 6, IGNORED, 7, 2]
    preflight.see(talk("a", "b", "c", "d"), [TokenRow([1, 5, 6, 3, 7, 2], labels, "d", 0)], 6)
    assert (preflight.whole, preflight.ended, preflight.ends) == (1, 0, {6, 2})

    preflight.see(talk("a", "b", "c", "d"), [TokenRow([1, 5, 2, 3, 7, 2], [IGNORED, 5, 2, IGNORED, 7, 2], "d", 0)], 6)
    assert (preflight.whole, preflight.ended) == (2, 1)
    assert preflight.classes is None, "a conversation is no class"


# --- items ---


def test_an_item_is_asked_behind_its_conversation(tokenizer: Any, base: Path, tmp_path: Path) -> None:
    suite = Suite(name="gate", type="Dataset", labels=("negative", "positive"), metrics=("Accuracy", "Loss"))
    records = [
        talk("Is it sunny?", "positive", "And the tea?", "negative", system="Be brief."),
        changed(talk("A song?", "positive", row=2), history=None),
    ]
    config = make_config(tmp_path, base)
    digest = write_items(tmp_path, suite, items_of(records))
    lines = [json.loads(line) for line in (tmp_path / "gate.jsonl").read_text().splitlines()]
    assert ["history" in line for line in lines] == [True, False], "the digest of other suites stays what it was"

    objective = objective_of(config)
    formatter = objective.formatter(base, tokenizer)
    prepared = prepare_suite(config, objective, suite, digest, tmp_path, formatter)

    turns = [
        {"role": "system", "content": "Be brief."},
        *({"role": turn.role, "content": turn.content} for turn in records[0].history or ()),
        {"role": "user", "content": "And the tea?"},
    ]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prepared.encoded[0].prompt == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(prepared.encoded[0].completion) == "negative<|im_end|>"
    assert read_items(tmp_path, suite) == prepared.items
    assert prepared.items[0].asked == len("Is it sunny?positiveAnd the tea?")


def test_held_out_conversations_and_packed_ones_are_whole(tokenizer: Any, base: Path, tmp_path: Path) -> None:
    gate = Gate(suite="validation", metric="Loss", rule="Superior", min_items=2)
    config = make_talk(tmp_path, base, talks(40), validation_fraction=0.2, evaluation=Evaluation(gates=(gate,)))
    config = replace(config, training=config.training.model_copy(update={"packing": True, "max_sequence_length": 256}))

    result = run_stage(config, Stage.PREPARE)

    assert result.exit_code == 0, result.message
    rows = list(read_rows(tmp_path / "work" / "prepare", "train"))
    held = list(read_rows(tmp_path / "work" / "prepare", "validation"))
    items = read_items(tmp_path / "work" / "prepare" / "suites", Suite(name="validation", type="Validation", metrics=("Loss",)))
    assert max(len(row.sequences) for row in rows) > 1
    answers = [shown(tokenizer, row) for row in rows]
    assert sum(map(len, answers)) == 2 * result.prepare.rows_kept
    assert all(answer.endswith("<|im_end|>") for row in answers for answer in row)
    assert len(held) == len(items) == result.prepare.validation_rows > 2
    assert not {item.document for item in items} & {row.document for row in rows}
    assert all(item.history and item.user is None for item in items), "no user can send a conversation as one message"
