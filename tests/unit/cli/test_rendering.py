"""`tuneloop render`: the operator's own passes, on objects that exist nowhere."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster.manifests import MODEL_VERSION, changed

from tuneloop_operator.cli import main

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "examples" / "quickstart"


def render(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[dict[str, Any]], str]:
    assert main(["render", *arguments]) == 0
    out, err = capsys.readouterr()
    return list(yaml.safe_load_all(out)), err


def named(objects: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(obj["kind"], obj["metadata"]["name"]) for obj in objects}


@pytest.fixture
def version(tmp_path: Path) -> str:
    """An approved version of the quickstart's model, as a file."""
    path = tmp_path / "version.yaml"
    merged = changed(changed(MODEL_VERSION, "spec.artifact.format", "Merged"), "spec.approval", "Approved")
    path.write_text(yaml.safe_dump(merged))
    return str(path)


def test_a_job_becomes_its_configuration_and_its_first_stage(capsys: pytest.CaptureFixture[str]) -> None:
    objects, err = render(capsys, "-f", str(QUICKSTART / "finetunejob.yaml"), "-n", "team")
    assert ("Job", "sentiment-tweets-prepare-1") in named(objects)
    (config,) = [obj for obj in objects if obj["kind"] == "ConfigMap"]
    assert json.loads(config["data"]["config.json"])["model"] == "sentiment"
    assert all(obj["metadata"]["namespace"] == "team" for obj in objects)
    assert "FineTuneJob sentiment-tweets: Reconciling=True Preparing" in err


def test_a_job_with_an_unknown_argument_becomes_nothing_and_the_condition_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    job = yaml.safe_load((QUICKSTART / "finetunejob.yaml").read_text())
    path.write_text(yaml.safe_dump(changed(job, "spec.training.extraArguments", {"wieght_decay": "0.1"})))
    objects, err = render(capsys, "-f", str(path))
    assert objects in ([], [None])
    said = "training.extraArguments has no 'wieght_decay' with SFT; did you mean weight_decay?"
    assert f"Stalled=True InvalidArgument: {said}" in err


def test_the_same_manifest_gives_the_same_objects(capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = render(capsys, "-f", str(QUICKSTART / "finetunejob.yaml"))
    second, _ = render(capsys, "-f", str(QUICKSTART / "finetunejob.yaml"))
    assert first == second


def test_a_deployment_and_a_version_become_engine_and_gateway(capsys: pytest.CaptureFixture[str], version: str) -> None:
    objects, _ = render(capsys, "-f", str(QUICKSTART / "modeldeployment.yaml"), "-f", version)
    kinds = [obj["kind"] for obj in objects]
    assert kinds.count("Deployment") == 2
    assert {"Service", "ConfigMap", "NetworkPolicy", "ControllerRevision", "ServiceAccount", "Role", "RoleBinding", "Secret"} <= set(kinds)
    assert ("Service", "sentiment") in named(objects)


def test_random_values_are_not_shown(capsys: pytest.CaptureFixture[str], version: str) -> None:
    objects, _ = render(capsys, "-f", str(QUICKSTART / "modeldeployment.yaml"), "-f", version)
    (secret,) = [obj for obj in objects if obj["kind"] == "Secret"]
    assert set({**secret.get("data", {}), **secret.get("stringData", {})}.values()) <= {"random", "cmFuZG9t"}


def test_without_a_version_the_condition_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    _, err = render(capsys, "-f", str(QUICKSTART / "modeldeployment.yaml"))
    assert "ModelDeployment sentiment: Available=False NoApprovedVersion" in err


def test_the_operators_settings_count(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELOOP_TRAINER_IMAGE", "registry.example/trainer:7")
    objects, _ = render(capsys, "-f", str(QUICKSTART / "finetunejob.yaml"))
    assert "registry.example/trainer:7" in json.dumps(objects)


def test_stdin_is_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO((QUICKSTART / "finetunejob.yaml").read_text()))
    objects, _ = render(capsys, "-f", "-")
    assert ("Job", "sentiment-tweets-prepare-1") in named(objects)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_example_of_ours_can_be_rendered(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    kinds = {document["kind"] for document in yaml.safe_load_all(path.read_text()) if document}
    if kinds & {"FineTuneJob", "ModelDeployment"}:
        objects, _ = render(capsys, "-f", str(path))
        for obj in objects:
            assert "uid" not in obj["metadata"]
            assert "status" not in obj


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is no YAML"),
        ("- just a list", "is no Kubernetes object with a name"),
        ("{apiVersion: v1, kind: FineTuneJob, metadata: {name: a}}", "v1 FineTuneJob is no kind that the operator knows"),
        ("{apiVersion: v1, kind: ConfigMap, metadata: {name: a}}", "there is no FineTuneJob, ModelVersion, ModelDeployment"),
        ("{apiVersion: tuneloop.dev/v1alpha1, kind: FineTuneJob, metadata: {name: a}, spec: {}}", "spec.baseModel: Field required."),
    ],
)
def test_bad_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert main(["render", "-f", str(path)]) == 1
    assert sentence in capsys.readouterr().err


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "-f", "/nowhere.yaml"]) == 1
    assert "cannot read /nowhere.yaml" in capsys.readouterr().err
