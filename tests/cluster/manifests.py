"""Manifests with every field of a kind's spec set, for the tests of the schema; a test holds that none is missing."""

from __future__ import annotations

import copy
import json
from typing import Any

Manifest = dict[str, Any]

POD: Manifest = {
    "labels": {"team": "a"},
    "annotations": {"note": "x"},
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule", "tolerationSeconds": 5}],
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "schedulerName": "nobody",
    "imagePullSecrets": [{"name": "pull"}],
    "resources": {"requests": {"cpu": "500m"}, "limits": {"memory": "2Gi"}},
    "env": [{"name": "HF_HOME", "value": "/tmp"}],
}
SOURCE: Manifest = {"uri": "hf://org/name", "revision": "abc", "secretRef": {"name": "hf-token"}}
ROWS = SOURCE | {"uri": "hf://organisation/rows/data/train-*.parquet"}
COLUMNS: Manifest = {"prompt": "p", "completion": "c", "text": "t", "label": "l", "document": "d", "group": "g"}
TEMPLATE: Manifest = {"prompt": "Sentiment of: {{ text }}", "completion": "{{ label }}"}
DIGEST = "sha256:" + "0" * 64

PUSH = {"uri": "oci://registry.test/team/sentiment:v1", "secretRef": {"name": "registry-login"}, "plainHttp": False}
FINE_TUNE_JOB: Manifest = {
    "apiVersion": "tuneloop.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "full"},
    "spec": {
        "baseModel": SOURCE,
        "objective": {"type": "SFT", "sft": {"loss": "CompletionOnly"}},
        "promptFormat": "Chat",
        "method": {"type": "LoRA", "lora": {"rank": 8, "alpha": 16, "dropout": "0.1", "targetModules": "AllLinear", "dora": False}},
        "data": {
            "train": [
                {"source": ROWS, "columns": COLUMNS, "template": TEMPLATE, "weight": "0.5"},
                {"feedback": {"deployment": "sentiment", "epoch": "0"}},
            ],
            "validation": {"fraction": "0.1"},
            "workers": 2,
            "curation": {
                "deduplicate": "Near",
                "personalData": "Redact",
                "quality": "Gopher",
                "languages": ["en", "gsw"],
                "toxicity": {"max": "0.8"},
                "classBalance": {"maxRatio": "3"},
                "decontaminate": True,
            },
        },
        "training": {
            "epochs": "3",
            "maxSteps": 100,
            "globalBatchSize": 16,
            "learningRate": "2e-4",
            "warmupSteps": 5,
            "maxSequenceLength": 512,
            "packing": False,
            "precision": "BF16",
            "seed": 42,
            "earlyStopping": {"patience": 3},
            "lossSpikeRatio": "5",
            "extraArguments": {"weight_decay": "0.01"},
            "reporting": [
                {"type": "TensorBoard"},
                {"type": "MLflow", "mlflow": {"trackingUri": "https://mlflow.test", "experiment": "e", "secretRef": {"name": "mlflow"}}},
            ],
        },
        "compute": {
            "nodes": 2,
            "minNodes": 1,
            "acceleratorsPerNode": 0,
            "acceleratorResource": "nvidia.com/gpu",
            "parallelism": "DataParallel",
            "costPerAcceleratorHour": "2.5",
            "pod": POD,
        },
        "checkpoint": {"everyMinutes": "10", "everySteps": 50, "keep": 2, "publish": "Asynchronous"},
        "evaluation": {
            "suites": [
                {
                    "name": "held-out",
                    "type": "Dataset",
                    "dataset": {"source": ROWS, "columns": COLUMNS, "template": TEMPLATE, "labels": ["good", "bad"]},
                    "metrics": ["Accuracy", "MacroF1"],
                },
                {"name": "new", "type": "Dataset", "dataset": {"feedback": {"deployment": "sentiment", "epoch": "0"}}},
                {"name": "split", "type": "Validation", "metrics": ["Loss"]},
            ],
            "gates": [{"suite": "held-out", "metric": "Accuracy", "rule": "Superior", "margin": "0.03", "alpha": "0.05", "minItems": 400}],
            "baseline": {"type": "ModelVersion", "name": "sentiment-v1"},
        },
        "output": {"model": "sentiment", "store": {"uri": "pvc://models/store"}, "format": "Adapter", "push": [PUSH]},
        "approval": "Automatic",
        "runPolicy": {"suspend": True, "maxRestarts": 3, "activeDeadlineSeconds": 3600, "ttlSecondsAfterFinished": 60},
    },
}

MODEL_VERSION: Manifest = {
    "apiVersion": "tuneloop.dev/v1alpha1",
    "kind": "ModelVersion",
    "metadata": {"name": "sentiment-v3"},
    "spec": {
        "model": "sentiment",
        "version": 3,
        "artifact": {"uri": "pvc://models/sentiment/v3", "manifestDigest": DIGEST, "format": "Adapter", "sizeBytes": 100, "rank": 8},
        "base": {"source": SOURCE, "digest": DIGEST, "snapshotUri": "pvc://models/cache/bases/org--name@1"},
        "lineage": {
            "fineTuneJob": "full",
            "fineTuneJobUid": "0-0",
            "spec": {"baseModel": SOURCE, "training": {"epochs": "3"}},
            "configDigest": DIGEST,
            "datasetDigests": {"hf://org/name": DIGEST},
            "image": "trainer:1",
            "parent": "sentiment-v2",
            "baseDigest": DIGEST,
        },
        "evaluation": {
            "verdict": "Pass",
            "message": "held-out: Accuracy of the best and the worst dialect differ by 0.4, the baseline's by 0.1.",
            "artifactDigest": DIGEST,
            "gates": [
                {
                    "suite": "held-out",
                    "metric": "Accuracy",
                    "rule": "Superior",
                    "verdict": "Pass",
                    "candidate": "0.9",
                    "baseline": "0.6",
                    "difference": "0.3",
                    "interval": "[0.2, 0.4]",
                    "n": 600,
                    "p": "1e-9",
                    "detectable": "0.05",
                    "suiteDigest": "0" * 64,
                    "uses": 2,
                }
            ],
            "scores": [
                {
                    "suite": "held-out",
                    "n": 600,
                    "accuracy": "0.9",
                    "baselineAccuracy": "0.6",
                    "macroF1": "0.9",
                    "majorityRate": "0.5",
                    "reward": "0.8",
                    "baselineReward": "0.6",
                    "parseRate": "1",
                    "loss": "0.3",
                    "chrf": "0.6",
                    "baselineChrf": "0.4",
                    "bleu": "0.3",
                }
            ],
            "reportUri": "pvc://models/report",
        },
        "probesUri": "pvc://models/probes",
        "referenceUri": "pvc://models/runs/full/evaluate/reference.json",
        "prompt": {"format": "Chat", "template": "Sentiment of: {{ text }}", "probeSha256": "sha256:" + "0" * 64},
        "approval": "Pending",
    },
}

SCHEDULE: Manifest = {"start": "0 8 * * 1-5", "end": "0 18 * * 1-5", "timezone": "Europe/Berlin", "replicas": 2}

MODEL_DEPLOYMENT: Manifest = {
    "apiVersion": "tuneloop.dev/v1alpha1",
    "kind": "ModelDeployment",
    "metadata": {"name": "sentiment"},
    "spec": {
        "model": {"name": "sentiment", "version": 3},
        "task": "Chat",
        "prompt": {
            "system": "Answer in one word.",
            "template": "Sentiment of: {{ text }}",
            "fewShot": [{"input": "a", "output": "b"}],
            "parameters": {"temperature": "0", "maxTokens": 8},
        },
        "engine": {
            "image": "vllm/vllm-openai:v0.32.0",
            "replicas": 1,
            "acceleratorsPerReplica": 0,
            "nodesPerReplica": 1,
            "acceleratorResource": "nvidia.com/gpu",
            "maxModelLength": 1024,
            "options": {"dtype": "bfloat16"},
            "compileCache": {"uri": "pvc://compiled/engines"},
            "startupTimeoutSeconds": 600,
            "pod": POD,
        },
        "autoscaling": {
            "minReplicas": 0,
            "maxReplicas": 4,
            "waitingRequests": 5,
            "idleSeconds": 600,
            "holdSeconds": 300,
            "schedule": [SCHEDULE],
        },
        "rollout": {
            "strategy": "Canary",
            "steps": [{"weight": 5, "minRequests": 200}, {"weight": 50, "minRequests": 1000}],
            "affinity": "Session",
            "analysis": {
                "falseRollbackProbability": "0.05",
                "maxErrorRatioIncrease": "0.01",
                "maxTimeToFirstTokenIncrease": "0.2",
                "maxInterTokenLatencyIncrease": "0.2",
                "maxHarmIncrease": "0.02",
                "minFeedback": 50,
                "timeoutSeconds": 3600,
            },
            "onInconclusive": "Hold",
            "surge": "Auto",
            "surgeTimeoutSeconds": 300,
            "allowDowntime": True,
            "keepPreviousSeconds": 60,
        },
        "gateway": {
            "replicas": 1,
            "auth": {"apiKeys": {"secretRef": {"name": "keys"}}, "requestsPerMinute": 600, "tokensPerMinute": 100000},
            "capture": {
                "sampleRate": "1",
                "personalData": "Redact",
                "retentionDays": 30,
                "database": {"volume": {"size": "10Gi", "storageClassName": "standard", "retentionPolicy": "Retain"}},
            },
            "feedback": {"maxShareOfOneSubject": "0.02"},
            "tracing": {"endpoint": "http://collector.observability:4318", "sampleRate": "0.1"},
            "pod": POD,
        },
        "monitoring": {
            "source": "Direct",
            "drift": {
                "reference": "Live",
                "size": 2000,
                "falseAlarmEveryRequests": 100000,
                "minimumEffect": "0.1",
                "horizonDays": "30",
                "mixOverSeconds": 86400,
            },
        },
        "retraining": {
            "triggers": [{"type": "Drift"}],
            "minNewExamples": 200,
            "approval": "Automatic",
            "cooldownSeconds": 86400,
            "maxRunsPerMonth": 8,
            "template": {"spec": {"training": {"maxSteps": 40}, "evaluation": {"gates": [{"suite": "new", "rule": "Superior"}]}}},
        },
    },
}
# The other place of the database: secretRef and volume exclude each other.
WITH_DATABASE_SECRET = copy.deepcopy(MODEL_DEPLOYMENT)
WITH_DATABASE_SECRET["spec"]["gateway"]["capture"]["database"] = {"secretRef": {"name": "db", "key": "url"}}


def changed(manifest: Manifest, path: str, value: object) -> Manifest:
    """A copy with one field set; `path` like `spec.data.train.0.weight`; the value `...` removes the field."""
    result: Manifest = json.loads(json.dumps(manifest))  # unlike a deep copy, this parts what the samples share
    *parents, last = path.split(".")
    node: Any = result
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    key: Any = int(last) if isinstance(node, list) else last
    if value is ...:
        del node[key]
    else:
        node[key] = value
    return result


def of_objective(objective: Manifest, columns: Manifest, template: Manifest, suites: list[Manifest], gate: Manifest) -> Manifest:
    """The job with another objective, whose rows have other texts and are judged by other suites."""
    job: Manifest = json.loads(json.dumps(FINE_TUNE_JOB))
    spec = job["spec"]
    spec["objective"], spec["output"]["format"] = objective, "Merged"
    spec["data"]["train"] = [{"source": ROWS, "columns": columns, "template": template}]
    spec["evaluation"] |= {"suites": suites, "gates": [gate]}
    return job


def suite(name: str, metric: str, **dataset: Any) -> Manifest:
    return {"name": name, "type": "Dataset", "dataset": {"source": ROWS, **dataset}, "metrics": [metric]}


PREFERENCES = of_objective(
    {"type": "DPO", "dpo": {"beta": "0.2", "loss": "IPO"}},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": "{{ q }}", "chosen": "{{ a }}", "rejected": "{{ b }}"},
    [
        suite("pairs", "Preference", columns={"prompt": "q", "chosen": "a", "rejected": "b"}, template={"chosen": "x", "rejected": "y"}),
        {"name": "split", "type": "Validation", "metrics": ["Preference", "Loss"]},
    ],
    {"suite": "pairs", "metric": "Preference", "rule": "Superior"},
)
JUDGEMENTS = of_objective(
    {"type": "KTO", "kto": {"beta": "0.2", "desirableWeight": "1", "undesirableWeight": "1.5"}},
    {"prompt": "q", "completion": "a", "desirable": "liked"},
    {"prompt": "{{ q }}"},
    [suite("answers", "Loss", columns={"desirable": "liked"})],
    {"suite": "answers", "metric": "Loss", "rule": "Superior"},
)
CLASSES = of_objective(
    {"type": "SequenceClassification", "sequenceClassification": {"labels": ["good", "bad"], "classWeights": "Balanced"}},
    {"text": "t", "label": "l"},
    {"text": "{{ title }} {{ t }}"},
    [suite("texts", "Accuracy", template={"text": "{{ t }}"})],
    {"suite": "texts", "metric": "Accuracy", "rule": "Superior"},
)
TRANSLATIONS = of_objective(
    {"type": "Seq2Seq", "seq2Seq": {"maxAnswerTokens": 64, "beams": 4}},
    {"prompt": "de", "completion": "en"},
    {"prompt": "{{ de }}", "completion": "{{ en }}"},
    [{"name": "split", "type": "Validation", "metrics": ["ChrF", "Loss"]}],
    {"suite": "split", "metric": "ChrF", "rule": "Superior"},
)
TEXTS = of_objective(
    {"type": "Pretraining"},
    {"text": "t"},
    {"text": "{{ t }}"},
    [suite("texts", "Loss")],
    {"suite": "texts", "metric": "Loss", "rule": "Superior"},
)
TEXTS = changed(
    TEXTS,
    "spec.vocabulary",
    {"fromCorpus": {"minCount": 50, "minFertility": 4, "maxTokens": 100}, "initialization": "SubtokenMean"},
)
QUANTIZED = changed(FINE_TUNE_JOB, "spec.quantization", {"bits": 4, "type": "NF4"})
PROMPTED = changed(FINE_TUNE_JOB, "spec.method", {"type": "PromptTuning", "promptTuning": {"virtualTokens": 8}})
WRITING: Manifest = {"numGenerations": 4, "maxCompletionLength": 64, "temperature": "0.9", "beta": "0.01"}
REWARDS: list[Manifest] = [
    {"type": "ExactMatch", "exactMatch": {"match": "Contains"}, "weight": "2"},
    {"type": "EntryPoint", "entryPoint": {"name": "brief", "settings": {"characters": "60"}, "timeoutSeconds": 5}, "weight": "1"},
    {"type": "Model", "model": {"uri": "pvc://models/judge", "manifestDigest": DIGEST}, "weight": "0.5"},
]
PROMPTS = of_objective(
    {"type": "GRPO", "grpo": WRITING | {"rewards": REWARDS}},
    {"prompt": "q", "completion": "a"},
    {"prompt": "{{ q }}"},
    [suite("questions", "Reward"), {"name": "split", "type": "Validation", "metrics": ["Reward"]}],
    {"suite": "questions", "metric": "Reward", "rule": "Superior"},
)
for field in ("earlyStopping", "lossSpikeRatio"):
    del PROMPTS["spec"]["training"][field]
LEFT_OUT = changed(PROMPTS, "spec.objective", {"type": "RLOO", "rloo": WRITING | {"rewards": REWARDS}})
SCRATCH = changed(
    changed(changed(TEXTS, "spec.method", {"type": "Full"}), "spec.vocabulary", ...),
    "spec.baseModel",
    {
        "architecture": {
            "family": "Qwen3",
            "layers": 12,
            "hiddenSize": 768,
            "heads": 12,
            "keyValueHeads": 4,
            "intermediateSize": 2048,
            "tieEmbeddings": True,
        },
        "tokenizer": {"source": SOURCE},
    },
)
# The other tokenizer: one of the corpus's own.
SCRATCH_TRAINED = changed(SCRATCH, "spec.baseModel.tokenizer", {"train": {"vocabularySize": 32000}})
OWN = changed(FINE_TUNE_JOB, "spec.objective", {"type": "Custom", "custom": {"name": "mine", "settings": {"strict": "yes"}}})
CONVERSATIONS = of_objective(
    {"type": "SFT"},
    {"messages": "turns", "document": "d"},
    {},
    [suite("talks", "Loss", columns={"messages": "turns"})],
    {"suite": "talks", "metric": "Loss", "rule": "Superior"},
)
CONVERSATIONS = changed(CONVERSATIONS, "spec.data.train.0.template", ...)
FULL = (
    FINE_TUNE_JOB, CONVERSATIONS, PROMPTED, QUANTIZED, OWN, PREFERENCES, JUDGEMENTS, CLASSES, TRANSLATIONS, TEXTS, PROMPTS, LEFT_OUT,
    SCRATCH, SCRATCH_TRAINED, MODEL_VERSION, MODEL_DEPLOYMENT, WITH_DATABASE_SECRET
)  # fmt: skip
PLURALS = {"FineTuneJob": "finetunejobs", "ModelVersion": "modelversions", "ModelDeployment": "modeldeployments"}
