"""Several pods prepare one set: what comes out is what one pod makes of it, whatever their number and whatever happens to them."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests.unit.trainer import objectives
from tests.unit.trainer.builders import make_config, make_gated, make_progress, make_rows, make_source, replace, write_jsonl

from tuneloop_trainer import worker
from tuneloop_trainer.bases import Prepared
from tuneloop_trainer.contract import (
    Curation,
    Evaluation,
    ExitCode,
    FeedbackExport,
    Reason,
    RunConfig,
    Stage,
    StageResult,
    Suite,
    Template,
    Training,
    Vocabulary,
)
from tuneloop_trainer.data import curation
from tuneloop_trainer.data.fetching import Workspace
from tuneloop_trainer.data.formats import Share
from tuneloop_trainer.data.languages import LanguageFilter
from tuneloop_trainer.data.sources import Reading
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.interrupts import Interrupts
from tuneloop_trainer.manifests import MANIFEST
from tuneloop_trainer.objectives.sft import SFT
from tuneloop_trainer.progress import ProgressWriter
from tuneloop_trainer.stages import parts
from tuneloop_trainer.stages import prepare as preparing
from tuneloop_trainer.stages.parts import part_folder

WORDS = [
    f"{first}{second}" for first in ("har", "lan", "mea", "cop", "vio", "thun", "or") for second in ("bour", "tern", "dow", "per", "lin")
]
loaded_once = cache(LanguageFilter)


def text_of(number: int) -> str:
    """Sixteen words; texts of different numbers have few runs of three in common."""
    return " ".join(
        WORDS[(number * number + number * place * 7 + place * place * 3) % len(WORDS)] + str(number % 97) for place in range(16)
    )


def rows_of_all_kinds() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for number in range(160):
        text = text_of(number)
        if number % 10 == 3:
            text = str(rows[number - 2]["text"])  # a duplicate, which another pod reads
        if number % 10 == 5:
            text = f"{rows[number - 4]['text']} more"  # a near duplicate
        if number % 10 == 7:
            text = f"{text} write to anna{number}@mail.example.org"
        if number % 40 == 9:
            text = "lorem ipsum " + text
        rows.append({"text": text, "label": "bad" if number % 4 == 0 else "good", "document": f"d{number // 2}"})
    rows[20] = {"text": None, "label": "good"}
    return rows


def make_set(root: Path) -> tuple[Path, ...]:
    """Two sources and a suite: a folder of two files, a Parquet file, and items that some rows equal."""
    import pyarrow as pa
    import pyarrow.parquet

    rows = rows_of_all_kinds()
    folder = root / "data" / "many"
    write_jsonl(folder / "a.jsonl", rows[:70])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows[70:120]).encode()))
    parquet = root / "data" / "more.parquet"
    whole = [row for row in rows[120:] if row["text"]] + [{"text": rows[2]["text"], "label": "good", "document": "d2"}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(whole), parquet)
    items = [{"text": rows[number]["text"], "label": rows[number]["label"]} for number in (11, 50, 131)]
    return folder, parquet, write_jsonl(root / "data" / "gate.jsonl", [*items, {"text": text_of(900), "label": "bad"}])


def make_run(root: Path, data: tuple[Path, ...], base: Path, **fields: Any) -> RunConfig:
    folder, parquet, gate = data
    suite = Suite(name="gate", type="Dataset", source=make_source(gate), labels=("good", "bad"), metrics=("Loss",))
    values: dict[str, Any] = {
        "train": (make_source(folder), make_source(parquet)),
        "training": Training(max_steps=6, global_batch_size=4, learning_rate=5e-3, max_sequence_length=256, warmup_steps=1),
        "validation_fraction": 0.1,
        "evaluation": Evaluation(suites=(suite,)),
        "curation": Curation(
            deduplicate="Near", decontaminate=True, personal_data="Redact", quality="Gopher", languages=("en", "de"), max_class_ratio=2.0
        ),
    }
    return make_config(root, base, **(values | fields))


def run_pod(config: RunConfig, number: int, of: int, monkeypatch: pytest.MonkeyPatch) -> StageResult:
    """One pod's worker, by its environment."""
    monkeypatch.setenv("TUNELOOP_NODES", str(of))
    monkeypatch.setenv("JOB_COMPLETION_INDEX", str(number))
    root = Path(config.paths.work).parent
    return worker.run(Stage.PREPARE, config, make_progress(root, Stage.PREPARE), Interrupts())


def run_pods(config: RunConfig, of: int, monkeypatch: pytest.MonkeyPatch) -> StageResult:
    """All pods, the first one last; its result."""
    for number in reversed(range(1, of)):
        made = run_pod(config, number, of, monkeypatch)
        assert (made.exit_code, made.prepare) == (0, None), made.message
    return run_pod(config, 0, of, monkeypatch)


def output(config: RunConfig) -> dict[str, bytes]:
    """All that was published but what says how long it took."""
    folder = Path(config.paths.work) / "prepare"
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return {name: (folder / name).read_bytes() for name in names if name not in ("result.json", MANIFEST)}


def make_part(config: RunConfig, share: Share, progress: ProgressWriter) -> None:
    start = preparing._begin(config, progress)
    parts.make_part(config, start.objective, start.tokenizer, share, progress)


def told(result: StageResult) -> dict[str, Any]:
    assert result.prepare is not None, result.message
    return result.prepare.model_dump(exclude={"rows_per_second", "peak_memory_bytes"})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return make_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: tuple[Path, ...], base: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What one pod makes of the set, and tells."""
    config = make_run(tmp_path_factory.mktemp("alone"), data, base)
    with pytest.MonkeyPatch.context() as patch:
        result = run_pods(config, 1, patch)
    return output(config), told(result)


@pytest.fixture(autouse=True)
def languages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of the languages takes half a second to load."""
    monkeypatch.setattr("tuneloop_trainer.data.filters.LanguageFilter", loaded_once)


@pytest.mark.parametrize("of", [2, 3])
def test_shards_card_and_counts_are_those_of_one_pod(of: int, tmp_path: Path, data: Any, alone: Any, base: Path, monkeypatch: Any) -> None:
    config = make_run(tmp_path, data, base)

    result = run_pods(config, of, monkeypatch)

    assert told(result) == alone[1]
    assert output(config) == alone[0]
    dropped = alone[1]["dropped"]
    assert {"Duplicate", "NearDuplicate", "LowQuality", "MissingValue", "ClassBalance"} <= dropped.keys()
    assert {"ContaminatedHash", "ContaminatedJaccard", "ContaminatedNgram"} & dropped.keys()
    assert alone[1]["validation_rows"] > 0
    assert not list((tmp_path / "work" / "prepare-parts").iterdir()), "the parts are gone once they were used"


@pytest.mark.parametrize(
    "objective", ["SFT", "Pretraining", "SequenceClassification", "DPO", "KTO", "RewardModel", "GRPO", "Scratch", "words"]
)
def test_every_objective_has_the_rows_of_one_pod(objective: Any, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(root: Path, of: int) -> tuple[dict[str, Any], dict[str, bytes]]:
        shared: dict[str, Any] = {"validation_fraction": 0.1}
        if objective == "words":
            config = make_config(root, base, vocabulary=Vocabulary(min_count=5, min_fertility=3), **shared)
        elif objective == "Scratch":
            config = objectives.make_scratch(root, **shared)
        else:
            config = objectives.make_run(root, base, objective, **shared)
        return told(run_pods(config, of, monkeypatch)), output(config)

    one, two = run(tmp_path / "one", 1), run(tmp_path / "two", 2)

    assert one[0] == two[0]
    assert one[1].keys() == two[1].keys()
    assert [name for name in one[1] if one[1][name] != two[1][name]] == []


def test_rows_are_tokenised_by_the_pods_that_read_them_on_all_their_cpus(
    tmp_path: Path, data: Any, alone: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(make_run(tmp_path, data, base), threads=2)
    for number in (0, 1):
        make_part(config, Share(number, 2), make_progress(tmp_path, Stage.PREPARE))
    asked: list[int] = []
    real = SFT.tokens
    monkeypatch.setattr(SFT, "tokens", lambda self, form, record: asked.append(record.row) or real(self, form, record))

    result = run_pod(config, 0, 2, monkeypatch)

    assert (told(result), output(config)) == (alone[1], alone[0])
    assert len(asked) == told(result)["validation_rows"], "those alone were left to the first pod"


def test_a_row_that_cannot_be_tokenised_is_refused_only_where_it_is_kept(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens(self: SFT, formatter: Any, record: Any) -> Any:
        if "odd" in record.content:
            raise Invalid(f"row {record.row} is odd")
        return real(self, formatter, record)

    real = SFT.tokens
    monkeypatch.setattr(SFT, "tokens", tokens)
    rows = [*make_rows(40), {"text": "the odd row out of all others", "label": "positive"}]
    item = write_jsonl(tmp_path / "gate.jsonl", [{"text": rows[-1]["text"], "label": "negative"}])
    suite = Suite(name="gate", type="Dataset", source=make_source(item), metrics=("Loss",))
    config = make_config(tmp_path, base, [make_source(write_jsonl(tmp_path / "train.jsonl", rows))])

    refused = run_pods(config, 2, monkeypatch)
    kept = run_pods(replace(config, evaluation=Evaluation(suites=(suite,))), 2, monkeypatch)

    assert (refused.exit_code, refused.message) == (ExitCode.INVALID, "row 41 is odd")
    assert told(kept)["dropped"] == {"ContaminatedHash": 1}


def test_tokens_of_another_commit_of_the_base_are_not_taken(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, base)
    commits = iter("aaab")

    def found(*_: Any) -> Prepared:
        return Prepared(base, next(commits))

    monkeypatch.setattr(preparing.bases, "prepare_base", found)
    make_part(config, Share(0, 2), make_progress(tmp_path, Stage.PREPARE))
    make_part(config, Share(1, 2), make_progress(tmp_path, Stage.PREPARE))
    part = (part_folder(config, Share(1, 2)) / "part.json").read_text()
    assert '"base":"a"' in part
    assert run_pod(config, 1, 2, monkeypatch).exit_code == 0

    failed = run_pod(config, 0, 2, monkeypatch)

    assert failed.exit_code == ExitCode.UNAVAILABLE
    assert failed.message.startswith("Model pvc://models/base changed while several pods read it")


# --- what happens to pods -----------------------------------------------------


def test_a_pod_that_was_killed_and_runs_again_changes_nothing(
    tmp_path: Path, data: Any, alone: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(tmp_path, data, base)
    folder = tmp_path / "work" / "prepare-parts"
    for killed in (1, 0):
        die_in(config, killed, parts if killed == 1 else preparing, monkeypatch)
    assert [path.name.split(".tmp")[0] for path in folder.glob(".*")] == [".1-of-2"], "the killed pod left what it was writing"
    made = (folder / "0-of-2" / MANIFEST).stat().st_ino

    assert run_pod(config, 1, 2, monkeypatch).exit_code == 0
    assert (folder / "0-of-2" / MANIFEST).stat().st_ino == made, "what the first pod made is taken up again"
    result = run_pod(config, 0, 2, monkeypatch)

    assert (told(result), output(config)) == (alone[1], alone[0])
    assert not list(folder.iterdir())


def die_in(config: RunConfig, number: int, stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod is killed as it publishes what it wrote."""
    if (pid := os.fork()) == 0:
        monkeypatch.setattr(stage, "publish" if stage is parts else "all_parts", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        run_pod(config, number, 2, monkeypatch)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def test_the_first_pod_waits_for_the_others(tmp_path: Path, data: Any, base: Path) -> None:
    config, progress, waited = make_run(tmp_path, data, base), make_progress(tmp_path, Stage.PREPARE), []

    def pause(seconds: float) -> None:
        waited.append(progress.current.phase)
        make_part(config, Share(len(waited), 3), make_progress(tmp_path / "other", Stage.PREPARE))

    make_part(config, Share(0, 3), progress)
    folders = parts.all_parts(config, Share(0, 3), progress, pause)

    assert [folder.name for folder in folders] == ["0-of-3", "1-of-3", "2-of-3"]
    assert waited == ["WaitingForParts"] * 2


def test_parts_of_another_configuration_are_not_taken(
    tmp_path: Path, data: Any, alone: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(tmp_path, data, base)
    other = replace(config, curation=config.curation.model_copy(update={"personal_data": "Keep", "quality": "None"}))
    for number in (0, 1):
        make_part(other, Share(number, 2), make_progress(tmp_path, Stage.PREPARE))

    result = run_pods(config, 2, monkeypatch)

    assert (told(result), output(config)) == (alone[1], alone[0])


def test_parts_of_data_that_was_replaced_between_attempts_are_not_taken(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(write_jsonl(tmp_path / "train.jsonl", make_rows(40)))
    config = make_config(tmp_path, base, [source])
    for number in (0, 1):  # and then the pods were killed
        make_part(config, Share(number, 2), make_progress(tmp_path, Stage.PREPARE))
    write_jsonl(tmp_path / "train.jsonl", make_rows(30))

    assert told(run_pods(config, 2, monkeypatch))["rows_in"] == 30


def test_parts_of_another_tokenizer_on_a_claim_are_not_taken(tmp_path: Path, base: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model)
    config, progress = make_config(tmp_path, model), make_progress(tmp_path, Stage.PREPARE)
    made = []
    for attempt in range(3):
        if attempt == 1:
            (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text() + " ")
        make_part(config, Share(0, 2), progress)
        made.append((part_folder(config, Share(0, 2)) / MANIFEST).stat().st_ino)
    assert made[0] != made[1]
    assert made[1] == made[2]


def test_parts_of_another_image_are_not_taken(tmp_path: Path, data: Any, base: Path) -> None:
    config, progress = make_run(tmp_path, data, base), make_progress(tmp_path, Stage.PREPARE)
    made = []
    for image in ("one", "two", "two"):
        make_part(replace(config, image=image), Share(0, 2), progress)
        made.append((part_folder(config, Share(0, 2)) / MANIFEST).stat().st_ino)
    assert made[0] != made[1]
    assert made[1] == made[2]


def test_a_part_that_is_damaged_is_made_again(tmp_path: Path, data: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(tmp_path, data, base)
    assert run_pod(config, 1, 2, monkeypatch).exit_code == 0
    (part_folder(config, Share(1, 2)) / "records-00.arrow").write_bytes(b"x")

    failed = run_pod(config, 0, 2, monkeypatch)

    assert (failed.exit_code, failed.reason) == (ExitCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE)
    assert run_pods(config, 2, monkeypatch).exit_code == 0


def test_a_part_that_goes_as_it_is_joined_loses_no_rows(tmp_path: Path, data: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(tmp_path, data, base)
    assert run_pod(config, 1, 2, monkeypatch).exit_code == 0
    joined = curation.Curating.take

    def take(self: Any, judged: Any) -> None:
        joined(self, judged)
        for path in part_folder(config, Share(1, 2)).glob("*-01.arrow"):
            path.unlink()

    monkeypatch.setattr(curation.Curating, "take", take)
    failed = run_pod(config, 0, 2, monkeypatch)

    assert (failed.exit_code, failed.message) == (ExitCode.UNAVAILABLE, "A part of the rows is gone; it is made again.")


# --- what is wrong with the data ----------------------------------------------


@pytest.mark.parametrize("changed", ["train.jsonl", "gate.jsonl"])
def test_data_that_changes_meanwhile_is_read_again_by_all(
    changed: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_gated(tmp_path, base)
    assert run_pod(config, 1, 2, monkeypatch).exit_code == 0
    write_jsonl(tmp_path / "data" / changed, make_rows(60, offset=0 if changed == "train.jsonl" else 2000))

    failed = run_pod(config, 0, 2, monkeypatch)

    assert (failed.exit_code, failed.reason) == (ExitCode.UNAVAILABLE, Reason.SOURCE_UNAVAILABLE)
    assert "changed while several pods read it" in failed.message
    assert run_pods(config, 2, monkeypatch).exit_code == 0


def test_rows_that_are_mostly_unusable_are_refused_as_by_one_pod_until_they_are_corrected(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(40)
    for number in range(3, 40, 4):  # all of them are the last pod's
        rows[number] = {"text": None, "label": "x"}
    config = make_config(tmp_path / "one", base, [make_source(write_jsonl(tmp_path / "train.jsonl", rows))])
    first = run_pods(config, 1, monkeypatch)
    config = replace(config, paths=make_config(tmp_path / "many", base).paths)

    refused = run_pods(config, 4, monkeypatch)

    assert (refused.exit_code, refused.message) == (ExitCode.INVALID, first.message)
    assert "10 of 40 rows cannot be used; row 4: column 'text'" in refused.message
    write_jsonl(tmp_path / "train.jsonl", make_rows(40))
    assert run_pods(config, 4, monkeypatch).exit_code == 0


def test_what_one_pod_refuses_is_made_anew_by_all(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = Template(prompt="{{ text.missing.part if label == 'positive' else text }}", completion="{{ label }}")
    source = make_source(write_jsonl(tmp_path / "train.jsonl", make_rows(40)), template=template, columns={"label": "kind"})
    config = make_config(tmp_path, base, [source])

    results = [run_pod(config, number, 2, monkeypatch) for number in (1, 0)]

    assert {result.message for result in results} == {
        "Dataset pvc://data/train.jsonl has no column 'kind'; it has id, text, label. Set data.train[0].columns."
    }
    assert not list((tmp_path / "work").glob("prepare-parts/*"))


# --- which rows a pod takes ---------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows.arrow"])
def test_every_row_is_taken_by_one_pod_and_every_byte_is_read_by_all(name: str, tmp_path: Path) -> None:
    source = make_source(write_as(tmp_path / name, make_rows(30)))
    whole = Reading(source)
    rows = [(row.number, row.values) for row in whole.rows()]
    taken = []
    for number in range(3):
        reading = Reading(source, Workspace(share=Share(number, 3)))
        shown = list(reading.rows())
        assert shown[0].number == 1, "all look at the first row's columns"
        assert (reading.digest, reading.count) == (whole.digest, 30)
        taken += [(row.number, row.values) for row in shown if reading.takes(row)]
        assert len(shown) <= 11
    assert sorted(taken, key=lambda row: row[0]) == rows


def write_as(path: Path, rows: list[dict[str, object]]) -> Path:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    table = pa.Table.from_pylist(rows)
    match path.suffix:
        case ".jsonl":
            write_jsonl(path, rows)
        case ".csv":
            pyarrow.csv.write_csv(table, path)
        case ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=7)
        case ".arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
    return path


def test_several_pods_may_read_more_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloop_trainer.data.sources.MAX_ROWS", 20)
    source = make_source(write_jsonl(tmp_path / "rows.jsonl", make_rows(30)))
    with pytest.raises(Invalid, match="more than 20 rows"):
        list(Reading(source).rows())

    reading = Reading(source, Workspace(share=Share(0, 2)))
    assert [row.number for row in reading.rows() if reading.takes(row)] == list(range(2, 31, 2))


def test_feedback_is_read_by_one_pod_because_it_grows_meanwhile(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    @contextmanager
    def export(feedback: FeedbackExport, uri: str) -> Iterator[Any]:
        asked.append(uri)
        content = "".join(json.dumps(row) + "\n" for row in make_rows(30 + len(asked))).encode()
        yield SimpleNamespace(readline=io.BytesIO(content).readline, length=0)

    monkeypatch.setattr("tuneloop_trainer.data.sources.open_export", export)
    feedback = FeedbackExport(deployment="d", url="http://127.0.0.1:1", token_file="t")
    source = make_source(Path("x")).model_copy(update={"path": None, "feedback": feedback, "uri": "feedback://d"})
    config = make_config(tmp_path, base, [source])

    result = run_pods(config, 3, monkeypatch)

    assert asked == ["feedback://d"]
    assert told(result)["rows_kept"] == 31
