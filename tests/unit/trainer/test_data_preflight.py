"""What is refused or warned of before a device is taken; and the page that shows the data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace as replace_vocabulary
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.unit.trainer.builders import make_config, make_gated, make_rows, make_source, replace, run_stage, write_jsonl

from tuneloop_trainer.contract import Curation, ExitCode, Lora, Method, Reason, RunConfig, Stage, Training
from tuneloop_trainer.data import page
from tuneloop_trainer.data.preflight import Preflight, Vocabulary, untrained_tokens
from tuneloop_trainer.data.records import Record
from tuneloop_trainer.data.samples import Piece, Samples
from tuneloop_trainer.data.shards import TokenRow
from tuneloop_trainer.data.tokens import HISTOGRAM_BOUNDS, TokenCounts
from tuneloop_trainer.errors import Invalid

END = 2
VOCABULARY = Vocabulary(stop_ids=frozenset([END]), bos=1, pad=0, tokenizer_size=100, embedding_rows=100)
GOOD = Training(epochs=1, global_batch_size=16, learning_rate=2e-4, max_sequence_length=64)


def make_preflight(tmp_path: Path, vocabulary: Vocabulary = VOCABULARY, **config: Any) -> Preflight:
    run = make_config(tmp_path, tmp_path, [make_source(tmp_path / "x.jsonl")], **({"training": GOOD} | config))
    return Preflight(run, vocabulary)


def see(
    preflight: Preflight, rows: int = 100, ids: tuple[int, ...] = (1, 5, 6, 7, END), whole: int | None = None, **record: Any
) -> TokenCounts:
    counts = TokenCounts()
    for number in range(rows):
        row = TokenRow(list(ids), [-100, -100, *ids[2:]], "d", 2)
        fields = {"completion": "good" if number % 2 else "bad"} | record
        preflight.see(Record(prompt="p", document="d", content="c", row=number + 1, **fields), [row], whole or len(ids))
        counts.add(row, truncated=(whole or 0) > 64)
    return counts


def test_a_sound_run_has_no_warning(tmp_path: Path) -> None:
    preflight = make_preflight(tmp_path)

    assert preflight.judge(see(preflight), steps=500) == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "token beyond the embedding": ({"ids": (1, 5, 100, END)}, "Row 1 has the token 100, and the base model has 100 embedding rows."),
    "two start tokens": ({"ids": (1, 1, 5, 6, END)}, "Row 1 starts with two start tokens"),
    "no end": ({"ids": (1, 5, 6, 7)}, "100 of 100 uncut rows do not end with a token at which the engine stops"),
    "mostly cut": ({"ids": (1, 5, 6, 7), "whole": 80}, "100 of 100 rows are cut at training.maxSequenceLength 64"),
    "one class": ({"completion": "good"}, "All 100 training rows have the completion 'good': there is nothing to learn."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_end_well_is_refused(case: str, tmp_path: Path) -> None:
    seen, message = REFUSED[case]
    preflight = make_preflight(tmp_path)

    with pytest.raises(Invalid) as error:  # some are seen in a row, some in the whole
        preflight.judge(see(preflight, **seen), steps=500)

    assert message in error.value.message
    assert error.value.reason is Reason.DATA_INVALID


def test_padding_that_the_model_has_no_row_for_is_refused(tmp_path: Path) -> None:
    preflight = make_preflight(tmp_path, Vocabulary(frozenset([END]), 1, 100, 101, 100))

    with pytest.raises(Invalid, match="pads with the token 100"):
        preflight.judge(see(preflight), steps=500)


def training(**fields: Any) -> dict[str, Any]:
    return {"training": GOOD.model_copy(update=fields)}


ATTENTION = Method(type="LoRA", lora=Lora(target_modules="Attention"))
WARNED: dict[str, tuple[dict[str, Any], int, str]] = {
    "rate too high": (
        training(learning_rate=2e-3),
        500,
        "training.learningRate 0.002 is outside 0.0001 to 0.0005, usual for SFT with LoRA.",
    ),
    "rate too low": (training(learning_rate=1e-5), 500, "training.learningRate 1e-05 is outside"),
    "rate of adapters for all weights": ({"method": Method(type="Full")}, 500, "is outside 1e-05 to 5e-05, usual for SFT with Full."),
    "few steps": ({}, 20, "The run has 20 steps only"),
    "long warm-up": (training(warmup_steps=200), 500, "training.warmupSteps 200 is more than a fifth"),
    "many epochs over few rows": (training(epochs=10), 500, "10 epochs over 100 rows are likely to be learned by heart"),
    "large batch": (training(global_batch_size=128), 500, "training.globalBatchSize 128: adapters learn worse"),
    "attention only": ({"method": ATTENTION}, 500, "leaves out the MLP layers"),
    "contamination allowed": ({"curation": Curation(decontaminate=False), "validation_fraction": 0.1}, 500, "decontaminate is false"),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_seldom_ends_well_is_warned_of(case: str, tmp_path: Path) -> None:
    config, steps, message = WARNED[case]
    preflight = make_preflight(tmp_path, **config)

    (warning,) = preflight.judge(see(preflight), steps)

    assert message in warning
    assert len(warning) <= 160


def test_a_short_run_may_learn_faster(tmp_path: Path) -> None:
    preflight = make_preflight(tmp_path, **training(learning_rate=9e-4))

    assert preflight.judge(see(preflight), steps=150) == []


def test_imbalance_and_labels_that_nobody_trains_on_are_warned_of(tmp_path: Path) -> None:
    suite = make_gated(tmp_path, tmp_path).evaluation
    preflight = make_preflight(tmp_path, evaluation=suite)
    see(preflight, rows=90, completion="positive")
    counts = see(preflight, rows=2, completion="meh")

    warnings = preflight.judge(counts, steps=500)

    assert "'positive' has 90 rows, 'meh' 2" in warnings[0]
    assert warnings[1] == "No training row has the label 'negative', which a suite asks for."


def test_an_end_that_the_base_never_learned_is_warned_of(tmp_path: Path, base: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][END] = 0
    save_file(weights, tmp_path / "model.safetensors")
    assert (untrained_tokens(base, [0, END]), untrained_tokens(tmp_path, [0, END, 10**6])) == (frozenset(), {END})
    preflight = make_preflight(tmp_path, replace_vocabulary(VOCABULARY, untrained=frozenset([END])))

    (warning,) = preflight.judge(see(preflight), steps=500)

    assert "never learned token 2" in warning
    assert len(warning) < 160


def test_a_tokenizer_larger_than_the_model_is_warned_of(tmp_path: Path) -> None:
    preflight = make_preflight(tmp_path, Vocabulary(frozenset([END]), 1, 0, 120, 100))

    assert preflight.judge(see(preflight), steps=500)[0].startswith("The tokenizer knows 120 tokens, the model 100")


def test_an_objective_without_answers_is_not_asked_for_their_ends_or_classes(tmp_path: Path) -> None:
    preflight = make_preflight(tmp_path)
    for number in range(50):
        preflight.see(Record("p", "", "d", "c", number), [TokenRow([1, 5, 6], [-100] * 3, "d", 3)], 3)

    assert preflight.judge(TokenCounts(rows=50), steps=500) == []


def test_texts_are_no_classes(tmp_path: Path) -> None:
    preflight = make_preflight(tmp_path)
    see(preflight, rows=30, completion="word " * 30)

    assert preflight.classes is None


# --- the page ---


class Letters:
    """A tokenizer of bytes."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


def test_samples_follow_from_the_content_and_show_whole_characters() -> None:
    text = "é<b>"
    row = TokenRow([*text.encode()], [-100, -100, -100, *text.encode()[3:]], "d", 3)
    one, other = Samples(), Samples()
    keys = [bytes([number]) for number in (9, 1, 5, 3, 7)]
    for samples, order in ((one, keys), (other, reversed(keys))):
        for key in order:
            samples.offer(key, key[0], row)

    rendered = one.rendered(Letters())

    assert [sample.row for sample in rendered] == [sample.row for sample in other.rendered(Letters())] == [1, 3, 5]
    assert rendered[0].beginning == (Piece("é", False), Piece("<", False), Piece("b", True), Piece(">", True))
    assert (rendered[0].tokens, rendered[0].learned) == (5, 2)


def test_the_middle_of_a_long_row_is_left_out() -> None:
    samples = Samples()
    samples.offer(b"k", 1, TokenRow([97] * 1000, [97] * 1000, "d", 0))

    (sample,) = samples.rendered(Letters())

    assert (len(sample.beginning), sample.left_out, len(sample.end)) == (200, 600, 200)


class Outline(HTMLParser):
    """Tags and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunConfig:
    root = tmp_path_factory.mktemp("card")
    rows = [*make_rows(60), {"text": "<script>alert(1)</script> & a@example.org", "label": "<b>bold</b>"}, make_rows(1)[0]]
    config = make_config(
        root, base, [make_source(write_jsonl(root / "data" / "train.jsonl", rows))], curation=Curation(personal_data="Redact")
    )
    result = run_stage(replace(config, name="<i>run</i>"), Stage.PREPARE)
    assert result.exit_code == ExitCode.DONE, result.message
    assert result.prepare.warnings, "six steps are few"
    return config


def test_the_page_escapes_what_users_wrote_and_needs_nothing_else(prepared: RunConfig) -> None:
    text = (Path(prepared.paths.work) / "prepare" / page.TEMPLATE).read_text()
    tags = Outline(text).tags

    assert not {tag for tag, _ in tags} & {"script", "img", "link", "iframe", "b" + "old", "svg"}
    assert not any(name in ("src", "href") or name.startswith("on") for _, attributes in tags for name in attributes)
    assert "&lt;i&gt;run&lt;/i&gt;" in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags
    assert sum(attributes.get("class") == "sample" for _, attributes in tags) == 3
    assert sum(attributes.get("class") == "learned" for tag, attributes in tags if tag == "span") > 3
    assert "a@example.org" not in text


def test_the_card_says_what_the_page_shows(prepared: RunConfig) -> None:
    card = json.loads((Path(prepared.paths.work) / "prepare" / "card.json").read_text())

    assert card["dropped"] == {"Duplicate": 1}
    assert card["found"] == {"personalData": {"EMAIL": 1}}
    assert card["classes"] == {"positive": 30, "negative": 30, "<b>bold</b>": 1}
    assert any("steps only" in warning for warning in card["warnings"])


def test_nothing_is_left_beside_the_published_folder(prepared: RunConfig) -> None:
    assert [path.name for path in Path(prepared.paths.work).iterdir()] == ["prepare"]


def test_lengths_are_shown_from_the_first_to_the_last_that_occurs() -> None:
    histogram = [0, 3, 0, 5] + [0] * (len(HISTOGRAM_BOUNDS) - 3)

    assert page.lengths(histogram) == {"33–64": 3, "65–128": 0, "129–256": 5}
    assert page.lengths([0] * len(histogram)) == {}


# --- memory ---

MEASURE = """
import json, resource, sys, time
from pathlib import Path
from tests.unit.trainer.builders import make_config, make_source, run_stage
from tuneloop_trainer.contract import Curation, Stage, Training
root, base, rows, deduplicate = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
source = make_source(root / f"{rows}.jsonl")
training = Training(max_steps=6, global_batch_size=4, max_sequence_length=128, packing=True)
config = make_config(root / f"{rows}-{deduplicate}", base, [source], training=training, validation_fraction=0.01,
    curation=Curation(deduplicate=deduplicate, personal_data="Redact", quality="Gopher"))
started = time.process_time()
result = run_stage(config, Stage.PREPARE)
assert result.exit_code == 0, result.message
peak, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time() - started
told = result.prepare
print(json.dumps({"peak": peak, "seconds": seconds} | ({"kept": told.rows_kept, "rate": told.rows_per_second} if told else {})))
"""


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("pods", [1, 2])
@pytest.mark.parametrize("deduplicate", ["Exact", "Near"])
def test_memory_stays_flat_as_rows_grow_tenfold(deduplicate: str, pods: int, tmp_path: Path, base: Path) -> None:
    measured = {}
    for rows in (6_000, 60_000):
        with (tmp_path / f"{rows}.jsonl").open("w") as file:
            for number in range(rows):
                word = f"{number * 7919 % 1_000_003} and {number * 104_729 % 999_983} or {number * 31_337 % 500_009}"
                file.write(json.dumps({"text": f"{word} people saw number {number}", "label": "good" if number % 2 else "bad"}) + "\n")
        command = [sys.executable, "-c", MEASURE, str(tmp_path), str(base), str(rows), deduplicate]
        places = ({"TUNELOOP_NODES": str(pods), "JOB_COMPLETION_INDEX": str(number)} for number in range(pods))
        running = [subprocess.Popen(command, env=os.environ | place, stdout=subprocess.PIPE, text=True) for place in places]
        told = [json.loads(process.communicate()[0]) for process in running]
        measured[rows] = max(one["peak"] for one in told) / 1024
        seconds = sum(one["seconds"] for one in told)
        print(
            f"{deduplicate}, {pods} pods: {rows} rows, {told[0]['kept']} kept: {measured[rows]:.0f} MiB, "
            f"{told[0]['rate']:.0f} rows a second, {rows / seconds:.0f} for each CPU second"
        )

    # Caches fill up to their bounds on the way; from 60,000 to 240,000 rows it is 16 MiB more, with one pod and with two.
    assert measured[60_000] < 1.1 * measured[6_000] + 20 * pods
