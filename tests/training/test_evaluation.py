"""What is scored is what is shipped; scores are what their definition says; the baseline is scored once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.trainer.builders import (
    copy_work,
    make_config,
    make_gated,
    make_progress,
    make_rows,
    make_source,
    replace,
    run_stage,
    write_jsonl,
)

from tuneloop_trainer import models
from tuneloop_trainer.chat import Encoded, Formatter
from tuneloop_trainer.contract import Baseline, Checkpoint, Evaluation, ExitCode, Method, RunConfig, Stage, Suite
from tuneloop_trainer.evaluation import scoring
from tuneloop_trainer.evaluation.suites import prepare_suite
from tuneloop_trainer.manifests import verify
from tuneloop_trainer.objectives import objective_of
from tuneloop_trainer.stages.evaluate import BaselineModel, gates_of, packaged, score_baseline
from tuneloop_trainer.stages.outputs import MODEL_CARD, require_stage, told_again
from tuneloop_trainer.stages.package import write_merged


def ignore(_: int) -> None: ...


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return models.load_model(base, "tiny", "float32")


SHARED = [[3, 4, *prompt] for prompt in ([5, 6, 7], [9, 10, 11, 12, 13], [9, 8])]
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33]]
LABELS = [[40, 2], [41, 42, 43, 2], [2]]


def naive_score(model: Any, prompt: list[int], label: list[int]) -> float:
    import torch

    with torch.inference_mode():
        chances = torch.log_softmax(model(input_ids=torch.tensor([prompt + label])).logits[0], dim=-1)
    return sum(float(chances[len(prompt) + place - 1, token]) for place, token in enumerate(label))


@pytest.mark.parametrize("prompts", [PROMPTS, SHARED, [PROMPTS[0]] * 2], ids=["nothing in common", "one beginning", "all equal"])
def test_label_scores_are_summed_log_probabilities(prompts: list[list[int]], model: Any) -> None:
    scores = scoring.label_scores(model, prompts, [LABELS] * len(prompts), ignore)

    for prompt, row in zip(prompts, scores, strict=True):
        assert row == pytest.approx([naive_score(model, prompt, label) for label in LABELS], abs=1e-4)


def test_scores_do_not_depend_on_the_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together = scoring.label_scores(model, PROMPTS, [LABELS] * len(PROMPTS), ignore)
    monkeypatch.setitem(scoring.TOKENS_PER_BATCH, "cpu", 1)

    alone = scoring.label_scores(model, PROMPTS, [LABELS] * len(PROMPTS), ignore)

    for left, right in zip(together, alone, strict=True):
        assert left == pytest.approx(right, abs=1e-4)


def test_common_prefix_leaves_each_prompt_a_token() -> None:
    assert scoring.common_prefix(SHARED) == 2
    assert scoring.common_prefix(PROMPTS) == 0
    assert scoring.common_prefix([[1, 2, 3], [1, 2]]) == 1


def test_held_out_loss_is_the_completions_negative_log_probability(model: Any) -> None:
    items = [Encoded(prompt, label) for prompt, label in zip(PROMPTS, [*LABELS, [7, 8]], strict=True)]

    losses = scoring.held_out_losses(model, items, 100, ignore)

    for item, (loss, count) in zip(items, losses, strict=True):
        assert loss == pytest.approx(-naive_score(model, item.prompt, item.completion), abs=1e-4)
        assert count == len(item.completion)


def test_held_out_rows_are_cut_as_training_rows_are(model: Any) -> None:
    losses = scoring.held_out_losses(model, [Encoded([5, 6, 7], [40, 41, 42, 2]), Encoded([5] * 9, [2])], 5, ignore)

    assert losses[0] == (pytest.approx(-naive_score(model, [5, 6, 7], [40, 41]), abs=1e-4), 2)
    assert losses[1] == (0.0, 0)


def test_greedy_answers_follow_the_most_likely_tokens(model: Any) -> None:
    import torch

    answers = scoring.greedy_answers(model, PROMPTS, 3, frozenset([2]), ignore)

    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids, leads = list(prompt), []
        for _ in range(3):
            with torch.inference_mode():
                best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
            ids.append(int(best.indices[0]))
            leads.append(float(best.values[0] - best.values[1]))
            if ids[-1] == 2:
                break
        assert answer.tokens == [token for token in ids[len(prompt) :] if token != 2]
        assert answer.leads == pytest.approx(leads, abs=1e-4)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunConfig:
    """A run that learns which words are good, of all weights, up to its package."""
    root = tmp_path_factory.mktemp("learned")
    train = make_source(write_jsonl(root / "data" / "train.jsonl", make_rows(200)))
    config = make_gated(root, base, items=60, train=(train,), method=Method(type="Full"), output_format="Merged")
    written = [row | {"site": "north" if number < 40 else "south"} for number, row in enumerate(make_rows(60, offset=1000))]
    suite = config.evaluation.suites[0]
    source = make_source(write_jsonl(root / "data" / "gate.jsonl", written), columns={"group": "site"})
    evaluation = config.evaluation.model_copy(update={"suites": (suite.model_copy(update={"source": source}),)})
    config = replace(config, evaluation=evaluation)
    training = config.training.model_copy(update={"max_steps": 48, "global_batch_size": 16, "learning_rate": 1e-2})
    config = replace(config, training=training, checkpoint=Checkpoint(every_minutes=None, every_steps=None))
    for stage in (Stage.PREPARE, Stage.TRAIN, Stage.PACKAGE):
        result = run_stage(config, stage)
        assert result.exit_code == ExitCode.DONE, result.message
    return config


@pytest.fixture(scope="module")
def judged(learned: RunConfig) -> Any:
    result = run_stage(learned, Stage.EVALUATE)
    assert result.exit_code == ExitCode.DONE, result.message
    return result


def test_better_model_passes_its_gate(judged: Any) -> None:
    gate = judged.evaluate.gates[0]

    assert judged.evaluate.verdict == "Pass"
    assert gate.candidate > 0.75 > gate.baseline
    assert gate.p < 0.01
    assert judged.evaluate.scores["gate"].macro_f1 > 0.75
    assert judged.evaluate.scores["gate"].majority_rate == 0.5


def test_verdict_names_the_packaged_manifest(judged: Any, learned: RunConfig) -> None:
    assert judged.evaluate.artifact_digest == verify(Path(learned.paths.artifact)).digest()


def test_probes_are_the_greedy_answers_to_gate_items(judged: Any) -> None:
    probes = json.loads(Path(judged.evaluate.probes).read_text())

    assert 40 <= len(probes) <= 50
    assert {probe["answer"] for probe in probes} <= {"positive", "negative"}
    assert not probes[0]["prompt"].startswith("Sentiment of: "), "a user sends the text alone; the gateway applies the template"
    assert judged.evaluate.scores["gate"].parse_rate == 1.0


def test_near_ties_are_no_probes(judged: Any) -> None:
    full = json.loads(Path(judged.uri).read_text())["suites"]["gate"]
    asked = {probe["prompt"] for probe in json.loads(Path(judged.evaluate.probes).read_text())}

    assert full["answered"] == list(range(60)), "more are answered than are needed"
    assert len(asked) <= sum(abs(left - right) >= 0.5 for left, right in full["candidate"]["label_scores"])


def test_full_results_hold_every_item(judged: Any) -> None:
    full = json.loads(Path(judged.uri).read_text())["suites"]["gate"]

    assert len(full["candidate"]["label_scores"]) == len(full["baseline"]["losses"]) == len(full["documents"]) == 60


def test_report_of_the_run_lies_beside_the_results(judged: Any, learned: RunConfig) -> None:
    page = Path(judged.uri).with_name(judged.evaluate.page).read_text()

    assert "Gates passed" in page
    assert page.count("<polyline") >= 4, "loss, learning rate, gradient norm, tokens per second"
    assert "Newly right" in page
    assert learned.train[0].uri in page
    assert judged.evaluate.artifact_digest in page
    assert str(Path(learned.paths.work).parent) not in page, "no path of the store"


def test_labels_are_compared_with_the_baseline_one_by_one(judged: Any) -> None:
    (by_label,) = (told for told in json.loads(Path(judged.uri).read_text())["groups"]["gate"] if told["kind"] == "label")
    gate = judged.evaluate.gates[0]

    assert {group["name"]: group["n"] for group in by_label["groups"]} == {"positive": 30, "negative": 30}
    for who in ("candidate", "baseline"):
        means = [group[who] for group in by_label["groups"]]
        assert sum(means) / 2 == pytest.approx(getattr(gate, who), abs=1e-4)
    assert all(group["lower"] <= group["candidate"] - group["baseline"] <= group["upper"] for group in by_label["groups"])
    assert "gate: Accuracy by label" in Path(judged.uri).with_name(judged.evaluate.page).read_text()


def test_items_are_compared_by_who_wrote_them(judged: Any) -> None:
    (by_site,) = (told for told in json.loads(Path(judged.uri).read_text())["groups"]["gate"] if told["kind"] == "site")
    gap = by_site["gap"]
    north, south = by_site["groups"]

    assert [(group["name"], group["n"]) for group in by_site["groups"]] == [("north", 40), ("south", 20)]
    for who in ("candidate", "baseline"):
        assert gap[who] == pytest.approx(abs(north[who] - south[who]), abs=1e-4)
    assert gap["lower"] <= gap["candidate"] <= gap["upper"]
    assert gap["growth_lower"] <= gap["candidate"] - gap["baseline"] <= gap["growth_upper"]
    page = Path(judged.uri).with_name(judged.evaluate.page).read_text()
    assert "gate: Accuracy by site" in page
    assert page.count("Gap between the best and the worst: ") >= 2, "of sites and of labels"


def test_card_with_the_figures_lies_beside_the_results(judged: Any, learned: RunConfig) -> None:
    card = Path(judged.uri).with_name(MODEL_CARD).read_text()
    gate = judged.evaluate.gates[0]

    assert "| rows trained on | 200 |" in card
    assert f"| gate | Accuracy | Superior | Pass | {gate.candidate:.4g} | {gate.baseline:.4g} |" in card
    assert "## Accuracy of gate by site" in card
    assert judged.evaluate.artifact_digest in card
    assert MODEL_CARD not in {path.name for path in Path(learned.paths.artifact).iterdir()}, "the artifact is what was evaluated"


def test_evaluation_tells_its_result_again(judged: Any, learned: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_model", None)

    assert run_stage(learned, Stage.EVALUATE) == judged


def test_moved_baseline_repeats_the_evaluation_alone(judged: Any, learned: RunConfig) -> None:
    moved = Baseline(type="ModelVersion", name="sentiment-v7")
    config = learned.model_copy(update={"evaluation": learned.evaluation.model_copy(update={"baseline": moved})})
    assert told_again(config, Stage.EVALUATE) is None
    assert require_stage(config, Stage.PREPARE)


def test_baseline_is_scored_once_for_all_runs(judged: Any, learned: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = copy_work(learned, tmp_path)
    again = replace(again, paths=again.paths.model_copy(update={"artifact": learned.paths.artifact}))
    (tmp_path / "work" / "evaluate" / "manifest.json").unlink()
    loaded: list[str] = []
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda folder, uri, dtype: loaded.append(uri) or load(folder, uri, dtype))

    result = run_stage(again, Stage.EVALUATE)

    assert result.evaluate.gates == judged.evaluate.gates
    assert loaded == [learned.paths.artifact], "the candidate alone is loaded"


def test_tampered_artifact_is_not_evaluated(learned: RunConfig, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(learned.paths.artifact, tmp_path / "models" / "tiny"))
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    config = replace(learned, paths=learned.paths.model_copy(update={"artifact": str(folder)}))

    result = run_stage(config, Stage.EVALUATE)

    assert result.exit_code == ExitCode.BUG
    assert "verifies" in result.message


def test_pinned_version_is_the_baseline_instead_of_the_base(learned: RunConfig, judged: Any, base: Path, tmp_path: Path) -> None:
    evaluation = learned.evaluation.model_copy(
        update={"baseline": Baseline(type="ModelVersion", name="tiny-v1", artifact=packaged(learned))}
    )
    config = replace(learned, evaluation=evaluation, paths=learned.paths.model_copy(update={"cache": str(tmp_path)}))
    formatter = Formatter(models.load_tokenizer(base, "tiny"), frozenset([2]), "Chat")
    suite = config.evaluation.suites[0]
    objective = objective_of(config)
    prepared = prepare_suite(config, objective, suite, "digest", Path(learned.paths.work) / "prepare" / "suites", formatter)

    progress = make_progress(tmp_path, Stage.EVALUATE)
    scores = score_baseline(BaselineModel(config, objective, base, "base digest", progress), {"gate": prepared})

    own = json.loads(Path(judged.uri).read_text())["suites"]["gate"]["candidate"]
    assert scores["gate"].model_dump(mode="json") == own, "the version itself scores as it did when it was the candidate"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunConfig:
    """A short LoRA run with a validation split, up to its package."""
    config = make_config(tmp_path_factory.mktemp("adapted"), base, validation_fraction=0.25)
    for stage in (Stage.PREPARE, Stage.TRAIN, Stage.PACKAGE):
        result = run_stage(config, stage)
        assert result.exit_code == ExitCode.DONE, result.message
    return config


def test_adapter_and_merged_package_score_alike(adapted: RunConfig, tmp_path: Path, base: Path) -> None:
    write_merged(adapted, base, Path(adapted.paths.work) / "train" / "final", tmp_path)
    plain = models.load_model(base, "tiny", "float32")
    before = scoring.label_scores(plain, PROMPTS, [LABELS] * len(PROMPTS), ignore)
    merged = models.load_model(tmp_path, "merged", "float32")
    applied = models.load_adapter(plain, Path(adapted.paths.artifact))

    left, right = (scoring.label_scores(one, PROMPTS, [LABELS] * len(PROMPTS), ignore) for one in (merged, applied))

    assert flat(left) == pytest.approx(flat(right), rel=0.01)
    assert flat(right) != pytest.approx(flat(before), rel=1e-4), "the adapter makes a difference"


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def test_package_holds_a_card_and_no_path_of_the_store(adapted: RunConfig) -> None:
    folder = Path(adapted.paths.artifact)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    assert files.keys() == {"adapter_model.safetensors", "adapter_config.json", "README.md", "manifest.json"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "pvc://models/base"
    assert b"rows trained on | 30" in files["README.md"]
    assert not [name for name, content in files.items() if str(folder.parent.parent).encode() in content]
    assert run_stage(adapted, Stage.PACKAGE).package.manifest_digest == verify(folder).digest()


def test_validation_split_without_gates_is_tested_for_a_lower_loss(adapted: RunConfig) -> None:
    result = run_stage(adapted, Stage.EVALUATE)

    gate = result.evaluate.gates[0]
    assert (gate.suite, gate.metric, gate.rule, gate.verdict, gate.n) == ("validation", "Loss", "Superior", "Inconclusive", 10)
    assert gate.difference < 0, "a lower loss"
    assert "has 10 items and needs 400" in result.evaluate.message
    full = json.loads(Path(result.uri).read_text())["suites"]["validation"]
    assert len(full["answers"]) == 10
    page = Path(result.uri).with_name(result.evaluate.page).read_text()
    assert page.count("<dt>before</dt>") == 4, "both models answer the first four items in words"
    assert "not asked" not in page
    assert result.evaluate.scores["validation"].parse_rate is None, "there are no labels to be among"
    for probe in json.loads(Path(result.evaluate.probes).read_text()):
        assert 1 <= probe["maxTokens"] <= 16
        assert any(answer.startswith(probe["answer"]) for answer in full["answers"])


def test_baselines_words_are_asked_for_once(adapted: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_stage(adapted, Stage.EVALUATE)
    again = copy_work(adapted, tmp_path)
    again = replace(again, paths=again.paths.model_copy(update={"artifact": adapted.paths.artifact}))
    (tmp_path / "work" / "evaluate" / "manifest.json").unlink()
    asked: list[int] = []
    answer = scoring.greedy_answers
    monkeypatch.setattr(
        scoring, "greedy_answers", lambda model, prompts, *rest: asked.append(len(prompts)) or answer(model, prompts, *rest)
    )

    second = run_stage(again, Stage.EVALUATE)

    assert asked == [10, 4], "the candidate alone: for the probes, and for the report"
    pages = [Path(result.uri).with_name(result.evaluate.page).read_text() for result in (first, second)]
    assert pages[0] == pages[1]


def test_suite_without_the_default_gates_metric_is_scored_and_not_gated(tmp_path: Path, base: Path) -> None:
    suite = Suite(name="held-out", type="Validation", metrics=("Accuracy",))
    config = make_config(tmp_path, base, validation_fraction=0.25, evaluation=Evaluation(suites=(suite,)))
    config = replace(config, training=config.training.model_copy(update={"max_steps": 1}))

    for stage in (Stage.PREPARE, Stage.TRAIN, Stage.PACKAGE, Stage.EVALUATE):
        result = run_stage(config, stage)
        assert result.exit_code == ExitCode.DONE, result.message

    assert (result.evaluate.verdict, result.evaluate.gates) == ("NoGates", ())
    assert result.evaluate.scores["held-out"].n == 10
    assert result.evaluate.scores["held-out"].accuracy is not None


def test_run_without_gates_has_none(tmp_path: Path) -> None:
    config = make_gated(tmp_path, tmp_path)
    without = replace(config, evaluation=Evaluation(suites=config.evaluation.suites))

    assert gates_of(without) == ()
    assert gates_of(replace(config, validation_fraction=0.1)) == config.evaluation.gates
