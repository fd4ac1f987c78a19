"""What a FineTuneJob's children look like: golden files, reviewed like code. `UPDATE_GOLDEN=1` writes them anew."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.finetunejob.builders import SETTINGS, World, evaluated, make_job, make_spec

from tuneloop_operator.api.finetunejob import FineTuneJobSpec, Resolved
from tuneloop_operator.render import names, training
from tuneloop_operator.render.run_config import run_config
from tuneloop_trainer.contract import (
    MLFLOW_KEYS,
    Checkpoint,
    Classification,
    Custom,
    Dpo,
    EntryPoint,
    ExactMatch,
    Kto,
    Lora,
    Mlflow,
    PromptTuning,
    Quantization,
    Reporting,
    Reward,
    Rollouts,
    RunConfig,
    Scorer,
    Scratch,
    Seq2Seq,
    Stage,
    Vocabulary,
)
from tuneloop_trainer.stages.evaluate import gates_of

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parents[2] / "golden" / "finetunejob"
FULL = make_spec(
    baseModel={"uri": "hf://org/base", "revision": "abc", "secretRef": {"name": "hf-token"}},
    method={"type": "LoRA", "lora": {"rank": 16, "dropout": "0.1"}},
    data={
        "train": [
            {
                "source": {"uri": "pvc://datasets/tweets/train.jsonl"},
                "columns": {"text": "tweet"},
                "template": {"prompt": "Sentiment of: {{ text }}", "completion": "{{ label }}"},
                "weight": "0.5",
            },
            {"feedback": {"deployment": "live"}, "weight": "0.5"},
        ],
        "validation": {"fraction": "0.1"},
    },
    evaluation={
        "suites": [
            {"name": "old", "dataset": {"source": {"uri": "pvc://gates/old.jsonl"}, "labels": ["good", "bad"]}},
            {"name": "new", "dataset": {"feedback": {"deployment": "live"}}},
        ],
        "gates": [{"suite": "old", "rule": "NonInferior", "margin": "0.03"}, {"suite": "new", "rule": "Superior"}],
    },
    training={
        "maxSteps": 40,
        "learningRate": "1e-3",
        "earlyStopping": {"patience": 2},
        "lossSpikeRatio": "5",
        "extraArguments": {"weight_decay": "0.01"},
    },
    compute={
        "acceleratorsPerNode": 2,
        "pod": {
            "labels": {"team": "a", "tuneloop.dev/finetunejob": "mine"},
            "annotations": {"note": "x"},
            "nodeSelector": {"disk": "fast"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "priorityClassName": "high",
            "schedulerName": "nobody",
            "imagePullSecrets": [{"name": "pull"}],
            "resources": {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"memory": "32Gi"}},
            "env": [{"name": "HOME", "value": "/root"}, {"name": "NCCL_DEBUG", "value": "INFO"}],
        },
    },
)


def check(name: str, content: Any) -> None:
    """Compares with the golden file, or writes it."""
    text = yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text, f"{path.name} differs; look at the difference, then UPDATE_GOLDEN=1"


def full_world() -> World:
    return World(job=make_job(FULL)).up_to(Stage.EVALUATE)


def test_children_of_a_full_job_are_as_in_the_golden_files() -> None:
    world = full_world()
    for stage in Stage:
        check(stage.value, world.runs[f"tweets-{stage.value}-1"].manifest)
    check("networkpolicy", next(child for place, child in world.others.items() if place.startswith("NetworkPolicy")))
    config = next(child for place, child in world.others.items() if place.startswith("ConfigMap"))
    check("configmap", config | {"data": {key: json.loads(text) for key, text in config["data"].items()}})
    world.ends(evaluated())
    world.step()
    check("modelversion", world.decide().create[0])


def test_the_smallest_job_is_as_in_the_golden_file() -> None:
    smallest = {
        "baseModel": {"uri": "pvc://models/base"},
        "data": {"train": [{"source": {"uri": "pvc://models/rows.jsonl"}}]},
        "output": {"model": "m", "store": {"uri": "pvc://models"}},
    }
    world = World(job=make_job(smallest)).up_to(Stage.TRAIN)
    check("smallest-train", world.current().manifest)
    check("smallest-config", world.config(world.current()))


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("stage", list(Stage))
def test_pods_are_restricted(stage: Stage) -> None:
    pod = pod_of(full_world().runs[f"tweets-{stage.value}-1"].manifest)
    container = pod["containers"][0]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert all("readOnly" not in volume.get("persistentVolumeClaim", {}) for volume in pod["volumes"])
    assert all(set(volume) & {"configMap", "secret", "emptyDir", "persistentVolumeClaim"} for volume in pod["volumes"])


@pytest.mark.parametrize("stage", list(Stage))
def test_devices_and_the_users_sizes_are_for_the_stages_that_load_the_model(stage: Stage) -> None:
    limits = pod_of(full_world().runs[f"tweets-{stage.value}-1"].manifest)["containers"][0]["resources"].get("limits", {})
    expected = {"memory": "32Gi", "nvidia.com/gpu": "2"} if stage in (Stage.TRAIN, Stage.EVALUATE) else {}
    assert limits == expected


@pytest.mark.parametrize("stage", list(Stage))
def test_all_stages_share_the_nodes_constraints(stage: Stage) -> None:
    pod = pod_of(full_world().runs[f"tweets-{stage.value}-1"].manifest)
    assert pod["nodeSelector"] == {"disk": "fast"}
    assert pod["schedulerName"] == "nobody"
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_the_hubs_token_goes_to_prepare_alone_and_by_reference() -> None:
    for run in full_world().runs.values():
        env = {variable["name"]: variable for variable in pod_of(run.manifest)["containers"][0]["env"]}
        assert ("HF_TOKEN" in env) == (run.stage is Stage.PREPARE)
        if run.stage is Stage.PREPARE:
            assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hf-token", "key": "token", "optional": False}


def test_overrides_never_replace_what_is_ours() -> None:
    run = full_world().runs["tweets-train-1"]
    template = run.manifest["spec"]["template"]
    assert template["metadata"]["labels"][names.JOB_LABEL] == "tweets"
    assert template["metadata"]["labels"]["team"] == "a"
    env = [(variable["name"], variable.get("value")) for variable in template["spec"]["containers"][0]["env"]]
    assert ("HOME", "/home/tuneloop") in env
    assert ("HOME", "/root") not in env
    assert ("NCCL_DEBUG", "INFO") in env


def test_a_claim_that_is_written_is_mounted_once() -> None:
    for run in World().up_to(Stage.TRAIN).runs.values():
        pod = pod_of(run.manifest)
        paths = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
        assert len(paths) == len(set(paths))
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        store = next(mount for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == "/volumes/models")
        assert "readOnly" not in store


def test_late_attempts_of_long_names_fit_into_a_label() -> None:
    name = "a" * 52
    assert names.stage_job(name, "evaluate", 1) == f"{name}-evaluate-1"
    late = {names.stage_job(name, "prepare", number) for number in (999, 1000, 10_000)}
    assert all(len(job) <= 63 for job in late)
    assert len(late | {names.stage_job("a" * 51 + "b", "prepare", 10_000)}) == 4


def test_the_policy_admits_the_operators_namespace_to_the_progress_port_alone() -> None:
    policy = training.progress_policy(make_job(), SETTINGS)
    rule = policy["spec"]["ingress"][0]
    assert rule["from"][0] == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": SETTINGS.namespace}}}
    assert rule["ports"] == [{"protocol": "TCP", "port": 8080}]
    assert policy["spec"]["podSelector"] == {"matchLabels": {names.JOB_LABEL: "tweets"}}


def test_a_validation_split_without_gates_gets_the_default_gate() -> None:
    spec = make_spec(data={"train": [{"source": {"uri": "pvc://d/x"}}], "validation": {"fraction": "0.2"}}, evaluation={})
    evaluation = run_config(make_job(spec), Resolved()).evaluation
    assert [(gate.suite, gate.metric, gate.rule) for gate in evaluation.gates] == [("validation", "Loss", "Superior")]
    assert [(suite.name, suite.type, suite.metrics) for suite in evaluation.suites] == [("validation", "Validation", ("Loss",))]
    assert evaluation.baseline.type == "Base"


@pytest.mark.parametrize(("method", "rate", "output"), [("LoRA", 2e-4, "Adapter"), ("Full", 2e-5, "Merged")])
def test_defaults_follow_the_method(method: str, rate: float, output: str) -> None:
    config = run_config(make_job(make_spec(method={"type": method})), Resolved())
    assert (config.training.learning_rate, config.output_format) == (rate, output)
    assert (config.checkpoint.every_minutes, config.checkpoint.every_steps) == (10, None)


def test_what_is_said_of_checkpoints_is_what_the_trainer_does() -> None:
    said = make_spec(checkpoint={"everySteps": 7, "keep": 3, "publish": "Asynchronous"})
    assert run_config(make_job(said), Resolved()).checkpoint == Checkpoint(
        every_minutes=None, every_steps=7, keep=3, publish="Asynchronous"
    )
    assert run_config(make_job(make_spec(checkpoint={"publish": "Synchronous"})), Resolved()).checkpoint.publish is None


OBJECTIVES = [
    ("SFT", "LoRA", 2e-4, "Adapter", "Loss"),
    ("DPO", "LoRA", 5e-6, "Adapter", "Preference"),
    ("DPO", "Full", 5e-7, "Merged", "Preference"),
    ("KTO", "LoRA", 5e-6, "Adapter", "Loss"),
    ("Pretraining", "LoRA", 2e-4, "Merged", "Loss"),
    ("SequenceClassification", "LoRA", 2e-4, "Merged", "Accuracy"),
    ("Seq2Seq", "LoRA", 5e-4, "Merged", "Loss"),
    ("Seq2Seq", "Full", 5e-5, "Merged", "Loss"),
    ("RewardModel", "LoRA", 1e-4, "Merged", "Preference"),
]


@pytest.mark.parametrize(("objective", "method", "rate", "output", "metric"), OBJECTIVES)
def test_defaults_follow_objective_and_method(objective: str, method: str, rate: float, output: str, metric: str) -> None:
    data = {"train": [{"source": {"uri": "pvc://d/x"}}], "validation": {"fraction": "0.2"}}
    spec = make_spec(objective={"type": objective}, method={"type": method}, data=data, evaluation={})
    config = run_config(make_job(spec), Resolved())

    assert (config.objective, config.training.learning_rate, config.output_format) == (objective, rate, output)
    assert config.origins == {"learning_rate": "default"}
    assert [(gate.metric, gate.rule) for gate in config.evaluation.gates] == [(metric, "Superior")]


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "objectives").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_of_an_objective_is_rendered(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    config = run_config(make_job(manifest["spec"]), Resolved())
    assert config.objective.lower().endswith(path.stem.rpartition("-")[2])
    assert config.evaluation.gates, "the model is judged by rows that are held out"


@pytest.mark.parametrize("name", ["custom", "reward"])
def test_every_example_of_an_extension_is_rendered(name: str) -> None:
    folder = ROOT / "examples" / "objectives" / name
    config = run_config(make_job(yaml.safe_load((folder / "finetunejob.yaml").read_text())["spec"]), Resolved())
    asked = [reward.entry_point.name for reward in config.rollouts.rewards if reward.entry_point] if config.rollouts else []
    brought = (folder / "pyproject.toml").read_text()
    assert all(f"\n{point} = " in brought for point in [*asked, *([config.custom.name] if config.custom else [])])


METHODS: dict[str, Callable[[RunConfig], object]] = {
    "dora": lambda config: config.method.lora is not None and config.method.lora.dora,
    "qlora": lambda config: (config.quantization, config.output_format) == (Quantization(), "Adapter"),
    "prompttuning": lambda config: (config.method.prompt_tuning, config.output_format) == (PromptTuning(), "Adapter"),
    "vocabulary": lambda config: config.vocabulary == Vocabulary() and config.output_format == "Merged",
}


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "methods").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_of_a_method_is_rendered(path: Path) -> None:
    config = run_config(make_job(yaml.safe_load(path.read_text())["spec"]), Resolved())
    assert METHODS[path.stem](config), "what it is an example of reaches the trainer"
    assert config.evaluation.gates, "the model is judged by rows that are held out"


def test_keys_of_mlflow_go_to_the_training_alone_and_by_reference() -> None:
    job = make_job(yaml.safe_load((ROOT / "examples" / "reporting" / "mlflow.yaml").read_text())["spec"])
    config = run_config(job, Resolved())
    server = Mlflow(tracking_uri="https://mlflow.example.org", experiment="answers", credentials="/etc/tuneloop/mlflow")
    assert config.reporting == Reporting(tensorboard=True, mlflow=server)

    world = World(job=job).up_to(Stage.EVALUATE)
    pods = {stage: pod_of(world.runs[f"tweets-{stage.value}-1"].manifest) for stage in Stage}
    mounting = {stage for stage, pod in pods.items() if any(volume["name"] == "mlflow" for volume in pod["volumes"])}
    assert mounting == {Stage.TRAIN}
    (volume,) = (volume["secret"] for volume in pods[Stage.TRAIN]["volumes"] if volume["name"] == "mlflow")
    assert (volume["secretName"], volume["optional"]) == ("mlflow", True), "a Secret that is missing keeps no training from starting"
    assert {item["key"] for item in volume["items"]} == set(MLFLOW_KEYS)
    (mount,) = (mount for mount in pods[Stage.TRAIN]["containers"][0]["volumeMounts"] if mount["name"] == "mlflow")
    assert (mount["mountPath"], mount["readOnly"]) == (server.credentials, True)


def test_dora_is_merged_where_nothing_is_said() -> None:
    method = {"type": "LoRA", "lora": {"rank": 4, "dora": True}}
    config = run_config(make_job(make_spec(method=method)), Resolved())
    assert (config.method.lora, config.output_format) == (Lora(rank=4, alpha=32, dora=True), "Merged")


def test_rewards_reach_the_trainer_and_their_models_are_mounted() -> None:
    judge = {"uri": "pvc://judges/models/judge", "manifestDigest": "sha256:" + "1" * 64}
    rewards = [
        {"type": "ExactMatch"},
        {"type": "EntryPoint", "entryPoint": {"name": "brief", "settings": {"a": "b"}, "timeoutSeconds": 3}, "weight": "0.5"},
        {"type": "Model", "model": judge},
    ]
    job = make_job(make_spec(objective={"type": "RLOO", "rloo": {"rewards": rewards, "temperature": "0.9"}}, evaluation={}))
    config = run_config(job, Resolved())

    assert config.rollouts == Rollouts(
        rewards=(
            Reward(exact_match=ExactMatch()),
            Reward(entry_point=EntryPoint(name="brief", settings={"a": "b"}, timeout_seconds=3), weight=0.5),
            Reward(model=Scorer(uri=judge["uri"], path=names.pvc_path(judge["uri"]), manifest_digest=judge["manifestDigest"])),
        ),
        num_generations=4,
        max_completion_length=256,
        temperature=0.9,
        beta=0.05,
    )
    mounted = {stage for stage in Stage if "judges" in training.read_claims(job, config, stage)}
    assert mounted == {Stage.PREPARE, Stage.TRAIN, Stage.EVALUATE}


def test_an_architecture_reaches_the_trainer_with_its_defaults() -> None:
    architecture = {"layers": 12, "hiddenSize": 768, "heads": 12}
    trained = {"architecture": architecture, "tokenizer": {"train": {"vocabularySize": 8000}}}
    asked = {"objective": {"type": "Pretraining"}, "method": {"type": "Full"}}
    job = make_job(make_spec(baseModel=trained, **asked))
    config = run_config(job, Resolved())

    assert config.scratch == Scratch(
        family="Llama",
        layers=12,
        hidden_size=768,
        heads=12,
        key_value_heads=12,
        intermediate_size=2048,
        tie_embeddings=True,
        vocabulary_size=8000,
    )
    assert (config.base.path, config.base.repository, config.training.learning_rate) == (None, None, 6e-4)
    assert training.read_claims(job, config, Stage.TRAIN) == []

    given = {"architecture": architecture, "tokenizer": {"source": {"uri": "pvc://bases/llama"}}}
    job = make_job(make_spec(baseModel=given, **asked))
    config = run_config(job, Resolved())
    assert config.scratch is not None
    assert config.scratch.vocabulary_size is None
    assert config.base.uri == "pvc://bases/llama"
    assert "bases" in training.read_claims(job, config, Stage.PREPARE)


def test_settings_of_an_objective_reach_the_trainer() -> None:
    own = run_config(make_job(make_spec(objective={"type": "Custom", "custom": {"name": "mine", "settings": {"a": "b"}}})), Resolved())
    assert own.custom == Custom(name="mine", settings={"a": "b"})
    kto = run_config(make_job(make_spec(objective={"type": "KTO", "kto": {"undesirableWeight": "1.5"}})), Resolved())
    dpo = run_config(make_job(make_spec(objective={"type": "DPO", "dpo": {"beta": "0.3", "loss": "IPO"}})), Resolved())
    classes = {"type": "SequenceClassification", "sequenceClassification": {"labels": ["a", "b"], "classWeights": "Balanced"}}
    classification = run_config(make_job(make_spec(objective=classes)), Resolved())

    assert kto.kto == Kto(beta=0.1, desirable_weight=1.0, undesirable_weight=1.5)
    assert dpo.dpo == Dpo(beta=0.3, loss="IPO")
    assert classification.classification == Classification(labels=("a", "b"), class_weights="Balanced")
    assert classification.prompt_format == "Text", "a text is not asked in turns of a chat"
    writing = {"type": "Seq2Seq", "seq2Seq": {"maxAnswerTokens": 64, "beams": 4}}
    translation = run_config(make_job(make_spec(objective=writing)), Resolved())
    assert translation.seq2seq == Seq2Seq(max_answer_tokens=64, beams=4)
    assert translation.prompt_format == "Text", "an encoder reads no turns"


SPECS = st.builds(
    lambda **fields: make_spec(**fields),
    training=st.fixed_dictionaries({}, optional={"maxSteps": st.integers(1, 9), "epochs": st.just("0.5"), "packing": st.booleans()}),
    checkpoint=st.fixed_dictionaries(
        {}, optional={"everySteps": st.integers(1, 9), "everyMinutes": st.just("2.5"), "publish": st.just("Asynchronous")}
    ),
    method=st.sampled_from([{}, {"type": "Full"}, {"type": "LoRA", "lora": {}}]),
    compute=st.fixed_dictionaries({}, optional={"acceleratorsPerNode": st.integers(0, 16)}),
    promptFormat=st.sampled_from(["Chat", "Text"]),
)


@settings(max_examples=50, deadline=None)
@given(SPECS)
def test_rendering_is_total_and_the_same_each_time(spec: dict[str, Any]) -> None:
    assert FineTuneJobSpec.model_validate(spec)
    job, resolved = make_job(spec), Resolved(image="i")
    config = run_config(job, resolved)
    text = training.config_map(job, training.config_text(config))["data"]["config.json"]
    assert RunConfig.model_validate_json(text) == config  # what the trainer reads is what was meant
    for stage in Stage:
        more = {"stage": stage, "number": 1, "input_hash": "x", "text": text}
        first, second = (json.dumps(training.stage_job(job, resolved, config, SETTINGS, **more)) for _ in range(2))
        assert first == second


def test_a_suite_over_the_validation_split_is_not_tested_for_what_it_does_not_measure() -> None:
    data = {"train": [{"source": {"uri": "pvc://d/x"}}], "validation": {"fraction": "0.2"}}
    suites = [{"name": "held-out", "type": "Validation"}]
    config = run_config(make_job(make_spec(data=data, evaluation={"suites": suites})), Resolved())

    assert [(suite.name, suite.metrics) for suite in config.evaluation.suites] == [("held-out", ("Accuracy",))]
    assert config.evaluation.gates == gates_of(config) == (), "the suite has no Loss, which SFT would be tested for"


@pytest.mark.parametrize(
    ("objective", "rows"), [("SFT", "Labels"), ("KTO", "Ratings"), ("DPO", "Preferences"), ("RewardModel", "Preferences")]
)
def test_an_objective_reads_the_feedback_that_it_learns_from(objective: str, rows: str) -> None:
    spec = make_spec(
        objective={"type": objective},
        data={"train": [{"feedback": {"deployment": "live"}}]},
        evaluation={"suites": [{"name": "labelled", "dataset": {"feedback": {"deployment": "live"}}, "metrics": ["Accuracy"]}]},
    )
    config = run_config(make_job(spec), Resolved())
    (source,) = config.train
    assert source.feedback is not None
    assert source.feedback.rows == rows
    assert source.columns == ({} if rows == "Labels" else {"prompt": "text"})
    suite = config.evaluation.suites[0].source
    assert suite is not None
    assert suite.feedback is not None
    assert (suite.feedback.rows, suite.feedback.split) == ("Labels", "gate"), "no vote has a say in a gate"


def test_columns_are_named_to_training_and_evaluation() -> None:
    rows = {"source": {"uri": "pvc://datasets/talks.jsonl"}, "columns": {"messages": "turns", "document": "ticket", "group": "site"}}
    spec = make_spec(data={"train": [rows]}, evaluation={"suites": [{"name": "talks", "dataset": rows, "metrics": ["Loss"]}]})

    config = run_config(make_job(spec), Resolved())

    suite = config.evaluation.suites[0].source
    assert suite is not None
    assert config.train[0].columns == suite.columns == {"messages": "turns", "document": "ticket", "group": "site"}
