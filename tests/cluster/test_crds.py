"""What a wrong manifest is told, by a real API server: every bound and every rule of the CRDs."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster.harness import MERGE, ROOT, Api, ApiAnswer, wait_for
from tests.cluster.manifests import (
    CLASSES,
    CONVERSATIONS,
    DIGEST,
    FINE_TUNE_JOB,
    FULL,
    JUDGEMENTS,
    LEFT_OUT,
    MODEL_DEPLOYMENT,
    MODEL_VERSION,
    PLURALS,
    PREFERENCES,
    PROMPTED,
    PROMPTS,
    QUANTIZED,
    REWARDS,
    SCRATCH,
    TEXTS,
    TRANSLATIONS,
    WRITING,
    Manifest,
    changed,
)
from tests.cluster.violations import shown, unset_fields, violations

from tuneloop_operator.api.crds import DEFINITIONS, render_crd

SCHEMAS = {d.kind: render_crd(d)["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for d in DEFINITIONS}


class Server:
    """Requests that may be refused: status and body."""

    def __init__(self, api: Api) -> None:
        self.api = api

    def call(self, method: str, path: str, body: object = None, content_type: str = "application/json") -> tuple[int, Manifest]:
        try:
            return 201 if method == "POST" else 200, self.api.call(method, path, body, content_type)
        except ApiAnswer as answer:
            return answer.status, answer.body


@pytest.fixture(scope="module")
def server(api: Api) -> Server:
    return Server(api)


@pytest.fixture(scope="module")
def place(server: Server) -> Iterator[str]:
    """A namespace of this module's own."""
    name = f"crds-{uuid.uuid4().hex[:8]}"
    assert server.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})[0] == 201
    yield name
    server.call("DELETE", f"/api/v1/namespaces/{name}")


def objects(place: str, manifest: Manifest) -> str:
    return f"/apis/tuneloop.dev/v1alpha1/namespaces/{place}/{PLURALS[manifest['kind']]}"


def create(server: Server, place: str, manifest: Manifest, dry: bool = True) -> tuple[int, Manifest]:
    return server.call("POST", objects(place, manifest) + "?fieldValidation=Strict" + ("&dryRun=All" if dry else ""), manifest)


def all_violations() -> list[Any]:
    cases: dict[tuple[str, str, str], Any] = {}
    for manifest in FULL:
        kind = manifest["kind"]
        for violation in violations(SCHEMAS[kind]["properties"]["spec"], manifest["spec"], "spec"):
            key = (kind, re.sub(r"\.\d+", "[]", violation.path), violation.sentence + repr(violation.value)[:20])
            cases.setdefault(key, (manifest, violation))
    return list(cases.values())


def refusal(server: Server, place: str, manifest: Manifest) -> str:
    code, answer = create(server, place, manifest)
    return f"{code}: {answer.get('message', 'accepted')}"


@pytest.mark.parametrize("manifest", FULL, ids=lambda manifest: manifest["kind"])
def test_a_manifest_with_every_field_is_accepted_as_it_is(server: Server, place: str, manifest: Manifest) -> None:
    code, answer = create(server, place, manifest)
    assert code == 201, answer["message"]
    for field, value in manifest["spec"].items():
        if field not in ("data", "evaluation"):  # lists whose items get defaults
            assert answer["spec"][field] == value


def test_the_full_manifests_leave_no_field_out() -> None:
    for kind, schema in SCHEMAS.items():
        samples = [manifest for manifest in FULL if manifest["kind"] == kind]
        missing = [set(unset_fields(schema["properties"]["spec"], sample["spec"], "spec")) for sample in samples]
        assert not set.intersection(*missing)


def test_every_single_value_violation_is_refused_with_its_sentence(server: Server, place: str) -> None:
    cases = all_violations()
    assert len(cases) > 500
    wrong = []
    for manifest, violation in cases:
        said = refusal(server, place, changed(manifest, violation.path, violation.value))
        in_map = re.sub(r"\.([^.]+)$", r"[\1]", shown(violation.path))
        if not said.startswith(("422", "400")) or violation.sentence not in said or not (shown(violation.path) in said or in_map in said):
            wrong.append(f"{manifest['kind']} {violation}\n    said: {said[:400]}")
    assert not wrong, "\n".join(wrong)


WITHOUT_VALIDATION = changed(changed(FINE_TUNE_JOB, "spec.data.validation", ...), "spec.evaluation.suites.2", ...)
TOO_LONG = "a" * 53

# message -> manifests that it must refuse. A test below holds that no rule is missing.
REFUSED: dict[str, list[Manifest]] = {
    "metadata.name must be at most 52 characters, start with a letter, and have only a-z, 0-9 and '-'": [
        changed(manifest, "metadata.name", name)
        for manifest in (FINE_TUNE_JOB, MODEL_DEPLOYMENT)
        for name in (TOO_LONG, "with.dots", "1-digit-first")
    ],
    "uri must start with oci:// (oci://registry/repository:tag) or s3:// (s3://bucket/prefix); s3:// needs secretRef.": [
        changed(FINE_TUNE_JOB, "spec.output.push.0.uri", "https://registry.test/team/sentiment"),
        changed(FINE_TUNE_JOB, "spec.output.push", [{"uri": "s3://models/sentiment"}]),
    ],
    "type MLflow, and no other, needs mlflow.": [
        changed(FINE_TUNE_JOB, "spec.training.reporting", [{"type": "MLflow"}]),
        changed(FINE_TUNE_JOB, "spec.training.reporting.0.mlflow", {"trackingUri": "https://mlflow.test"}),
    ],
    "plainHttp is for oci:// alone.": [
        changed(changed(FINE_TUNE_JOB, "spec.output.push.0.plainHttp", True), "spec.output.push.0.uri", "s3://models"),
    ],
    "metadata.name must be <spec.model>-v<spec.version>.": [
        changed(MODEL_VERSION, "metadata.name", "sentiment-v4"),
        changed(MODEL_VERSION, "metadata.name", "other-v3"),
        changed(MODEL_VERSION, "spec.version", 30),
    ],
    "uri must start with pvc:// (pvc://claim/path) or hf:// (hf://organisation/name).": [
        changed(FINE_TUNE_JOB, "spec.baseModel.uri", "https://example.com/model"),
        changed(FINE_TUNE_JOB, "spec.baseModel.uri", "s3://bucket/key"),
        changed(MODEL_VERSION, "spec.base.source.uri", "file:///base"),
    ],
    "uri must start with pvc:// (pvc://claim/path), s3:// (s3://bucket/prefix) or hf:// (hf://organisation/name).": [
        changed(FINE_TUNE_JOB, "spec.data.train.0.source.uri", "https://example.com/rows.csv"),
        changed(FINE_TUNE_JOB, "spec.evaluation.suites.0.dataset.source.uri", "/etc/passwd"),
    ],
    "uri must name a bucket: s3://bucket/prefix, or s3://bucket/key.": [
        changed(FINE_TUNE_JOB, "spec.data.train.0.source", {"uri": "s3:///rows.jsonl", "secretRef": {"name": "keys"}}),
        changed(FINE_TUNE_JOB, "spec.evaluation.suites.0.dataset.source", {"uri": "s3://Bucket/rows", "secretRef": {"name": "keys"}}),
    ],
    "uri must name a data set: hf://organisation/name, or hf://organisation/name/path.": [
        changed(FINE_TUNE_JOB, "spec.data.train.0.source.uri", "hf://organisation"),
        changed(FINE_TUNE_JOB, "spec.evaluation.suites.0.dataset.source.uri", "hf://organisation/-name"),
    ],
    "s3:// needs secretRef, with the keys to the bucket.": [
        changed(FINE_TUNE_JOB, "spec.data.train.0.source", {"uri": "s3://bucket/rows"}),
        changed(FINE_TUNE_JOB, "spec.evaluation.suites.0.dataset.source", {"uri": "s3://bucket/rows"}),
    ],
    "secretRef is for s3:// and hf://; a claim needs none.": [
        changed(FINE_TUNE_JOB, "spec.data.train.0.source", {"uri": "pvc://datasets/rows.jsonl", "secretRef": {"name": "keys"}}),
    ],
    "revision is for hf:// alone.": [
        changed(FINE_TUNE_JOB, "spec.data.train.0.source", {"uri": "pvc://datasets/rows.jsonl", "revision": "main"}),
        changed(FINE_TUNE_JOB, "spec.evaluation.suites.0.dataset.source.uri", "s3://bucket/rows"),
    ],
    "uri must not contain '..'.": [
        changed(FINE_TUNE_JOB, "spec.data.train.0.source.uri", "pvc://claim/../other"),
        changed(FINE_TUNE_JOB, "spec.baseModel.uri", "pvc://claim/../other"),
        changed(FINE_TUNE_JOB, "spec.evaluation.suites.0.dataset.source.uri", "pvc://claim/a/../b"),
        changed(MODEL_VERSION, "spec.base.source.uri", "pvc://claim/../other"),
    ],
    "uri must name a claim: pvc://claim/path.": [
        changed(FINE_TUNE_JOB, "spec.data.train.0.source.uri", "pvc:///rows.jsonl"),
        changed(FINE_TUNE_JOB, "spec.baseModel.uri", "pvc://Models/base"),
        changed(FINE_TUNE_JOB, "spec.evaluation.suites.0.dataset.source.uri", "pvc://-/rows.jsonl"),
        changed(MODEL_VERSION, "spec.base.source.uri", "pvc:///base"),
    ],
    "a toleration with operator Exists takes no value.": [
        changed(FINE_TUNE_JOB, "spec.compute.pod.tolerations", [{"key": "gpu", "operator": "Exists", "value": "yes"}]),
        changed(MODEL_DEPLOYMENT, "spec.engine.pod.tolerations", [{"operator": "Exists", "value": "yes"}]),
        changed(MODEL_DEPLOYMENT, "spec.gateway.pod.tolerations", [{"operator": "Exists", "value": "yes"}]),
    ],
    "lora may be set only with type: LoRA.": [
        changed(changed(FINE_TUNE_JOB, "spec.method.type", "Full"), "spec.output.format", "Merged"),
    ],
    "exactly one of source and feedback must be set.": [
        changed(FINE_TUNE_JOB, "spec.data.train.1", {"weight": "1"}),
        changed(FINE_TUNE_JOB, "spec.data.train.0.feedback", {"deployment": "sentiment"}),
        changed(FINE_TUNE_JOB, "spec.evaluation.suites.0.dataset.source", ...),
        changed(FINE_TUNE_JOB, "spec.evaluation.suites.0.dataset.feedback", {"deployment": "sentiment"}),
    ],
    "messages takes the place of prompt and completion.": [
        changed(CONVERSATIONS, f"{path}.columns.{role}", "c")
        for path in ("spec.data.train.0", "spec.evaluation.suites.0.dataset")
        for role in ("prompt", "completion")
    ],
    "columns.messages names conversations, which no template renders: template cannot be set.": [
        changed(CONVERSATIONS, f"{path}.template", {"prompt": "x"}) for path in ("spec.data.train.0", "spec.evaluation.suites.0.dataset")
    ],
    "columns.messages names conversations: it needs promptFormat: Chat, and the objective SFT or Custom.": [
        changed(CONVERSATIONS, "spec.promptFormat", "Text"),
        changed(changed(CONVERSATIONS, "spec.promptFormat", "Text"), "spec.evaluation.suites.0.dataset.columns", {}),
        *(
            changed(manifest, f"{path}.columns", {"messages": "turns"})
            for manifest in (PREFERENCES, JUDGEMENTS, CLASSES, TEXTS, PROMPTS)
            for path in ("spec.data.train.0", "spec.evaluation.suites.0.dataset")
        ),
    ],
    "dataset must be set with type: Dataset, and only then.": [
        changed(FINE_TUNE_JOB, "spec.evaluation.suites.0.dataset", ...),
        changed(FINE_TUNE_JOB, "spec.evaluation.suites.0.type", "Validation"),
    ],
    "name must be set unless type is Base.": [
        changed(FINE_TUNE_JOB, "spec.evaluation.baseline.type", "Base"),
        changed(FINE_TUNE_JOB, "spec.evaluation.baseline", {"type": "Deployment"}),
    ],
    "every gate must name a suite of evaluation.suites.": [
        changed(FINE_TUNE_JOB, "spec.evaluation.gates.0.suite", "unknown"),
        changed(FINE_TUNE_JOB, "spec.evaluation.suites", ...),
    ],
    "method Full has no adapter: output.format must be Merged.": [
        changed(FINE_TUNE_JOB, "spec.method", {"type": "Full"}),
    ],
    "no engine serves an adapter of DoRA on its base: output.format must be Merged.": [
        changed(FINE_TUNE_JOB, "spec.method.lora.dora", True),
    ],
    "promptTuning may be set only with type: PromptTuning.": [changed(FINE_TUNE_JOB, "spec.method.promptTuning", {})],
    "PromptTuning changes no weight of its base: output.format must be Adapter.": [changed(PROMPTED, "spec.output.format", "Merged")],
    "PromptTuning goes with objective SFT only.": [
        changed(changed(manifest, "spec.method", {"type": "PromptTuning"}), "spec.output.format", ...)
        for manifest in (PREFERENCES, CLASSES)
    ],
    "a learned prompt stands before each row: training.packing must be false.": [changed(PROMPTED, "spec.training.packing", True)],
    "PromptTuning trains no row of the vocabulary: leave out vocabulary.": [
        changed(changed(PROMPTED, "spec.vocabulary", {}), "spec.output.format", ...)
    ],
    "quantization keeps a base that is not trained: method.type must be LoRA.": [changed(PROMPTED, "spec.quantization", {})],
    "DoRA measures whole weights: leave out quantization, or lora.dora.": [
        changed(changed(QUANTIZED, "spec.method.lora.dora", True), "spec.output.format", "Merged"),
    ],
    "new tokens are written into the base: leave out quantization, or vocabulary.": [
        changed(changed(QUANTIZED, "spec.vocabulary", {}), "spec.output.format", "Merged"),
    ],
    "weights in few bits are not divided: compute.parallelism must not be FSDP.": [
        changed(QUANTIZED, "spec.compute.parallelism", "FSDP"),
    ],
    "quantization does not go with SequenceClassification, RewardModel, Seq2Seq.": [
        changed(manifest, "spec.quantization", {})
        for manifest in (CLASSES, TRANSLATIONS, changed(PREFERENCES, "spec.objective", {"type": "RewardModel"}))
    ],
    "new tokens make a new base, on which no adapter stands: output.format must be Merged.": [
        changed(FINE_TUNE_JOB, "spec.vocabulary", {}),
    ],
    "a gate's metric must be among the metrics of its suite.": [changed(FINE_TUNE_JOB, "spec.evaluation.gates.0.metric", "Loss")],
    "Preference compares an item's own two answers, Accuracy and MacroF1 its labels: make two suites.": [
        changed(PREFERENCES, "spec.evaluation.suites.0.metrics", ["Preference", "Accuracy"]),
    ],
    "sft may be set only with type: SFT.": [changed(PREFERENCES, "spec.objective.sft", {})],
    "dpo may be set only with type: DPO.": [changed(FINE_TUNE_JOB, "spec.objective.dpo", {})],
    "kto may be set only with type: KTO.": [changed(FINE_TUNE_JOB, "spec.objective.kto", {})],
    "sequenceClassification may be set only with type: SequenceClassification.": [
        changed(TEXTS, "spec.objective.sequenceClassification", {}),
    ],
    "grpo may be set only with type: GRPO.": [changed(LEFT_OUT, "spec.objective.grpo", WRITING | {"rewards": REWARDS})],
    "rloo may be set only with type: RLOO.": [changed(PROMPTS, "spec.objective.rloo", WRITING | {"rewards": REWARDS})],
    "type: GRPO needs grpo.rewards.": [changed(PROMPTS, "spec.objective", {"type": "GRPO"})],
    "type: RLOO needs rloo.rewards.": [changed(PROMPTS, "spec.objective", {"type": "RLOO"})],
    "exactMatch may be set only with type: ExactMatch.": [changed(PROMPTS, "spec.objective.grpo.rewards.1.exactMatch", {})],
    "entryPoint must be set with type: EntryPoint, and only then.": [
        changed(PROMPTS, "spec.objective.grpo.rewards.1.entryPoint", ...),
        changed(PROMPTS, "spec.objective.grpo.rewards.0.entryPoint", {"name": "brief"}),
    ],
    "model must be set with type: Model, and only then.": [
        changed(LEFT_OUT, "spec.objective.rloo.rewards.2.model", ...),
        changed(PROMPTS, "spec.objective.grpo.rewards.0.model", {"uri": "pvc://models/judge", "manifestDigest": DIGEST}),
    ],
    "GRPO counts completions: training.globalBatchSize must be a multiple of objective.grpo.numGenerations.": [
        changed(PROMPTS, "spec.training.globalBatchSize", 18),
    ],
    "RLOO counts completions: training.globalBatchSize must be a multiple of objective.rloo.numGenerations.": [
        changed(LEFT_OUT, "spec.training.globalBatchSize", 18),
    ],
    "training.maxSequenceLength holds prompt and completion: it must be above objective.grpo.maxCompletionLength.": [
        changed(PROMPTS, "spec.training.maxSequenceLength", 64),
    ],
    "training.maxSequenceLength holds prompt and completion: it must be above objective.rloo.maxCompletionLength.": [
        changed(LEFT_OUT, "spec.training.maxSequenceLength", 64),
    ],
    "the loss of GRPO and RLOO says nothing: training.lossSpikeRatio and training.earlyStopping cannot be set.": [
        changed(PROMPTS, "spec.training.lossSpikeRatio", "5"),
        changed(LEFT_OUT, "spec.training.earlyStopping", {"patience": 3}),
    ],
    "GRPO and RLOO learn from what the model writes, and it writes no token that it never learned: vocabulary cannot be set.": [
        changed(PROMPTS, "spec.vocabulary", {"fromCorpus": {}}),
    ],
    "the metric Reward is that of the rewards of GRPO and RLOO: another objective has none.": [
        changed(FINE_TUNE_JOB, "spec.evaluation.suites.2.metrics", ["Reward"]),
    ],
    "the rows that GRPO and RLOO hold out are prompts: the metrics of a suite of type Validation must be [Reward].": [
        changed(PROMPTS, "spec.evaluation.suites.1.metrics", ["Reward", "Loss"]),
    ],
    "exactly one of uri and architecture must be set.": [
        changed(SCRATCH, "spec.baseModel.uri", "pvc://models/base"),
        changed(FINE_TUNE_JOB, "spec.baseModel", {}),
    ],
    "architecture needs a tokenizer, and tokenizer an architecture.": [
        changed(SCRATCH, "spec.baseModel.tokenizer", ...),
        changed(FINE_TUNE_JOB, "spec.baseModel.tokenizer", {"train": {}}),
    ],
    "revision and secretRef belong to uri.": [
        changed(SCRATCH, "spec.baseModel.revision", "abc"),
        changed(SCRATCH, "spec.baseModel.secretRef", {"name": "hf-token"}),
    ],
    "exactly one of tokenizer.source and tokenizer.train must be set.": [
        changed(SCRATCH, "spec.baseModel.tokenizer.train", {}),
        changed(SCRATCH, "spec.baseModel.tokenizer", {}),
    ],
    "hiddenSize must be a multiple of 2 x heads: each head has an even share of it.": [
        changed(SCRATCH, "spec.baseModel.architecture.hiddenSize", 780),
    ],
    "heads must be a multiple of keyValueHeads.": [changed(SCRATCH, "spec.baseModel.architecture.keyValueHeads", 5)],
    "weights that are drawn have to learn texts first: set objective.type: Pretraining.": [
        changed(SCRATCH, "spec.objective", {"type": "Custom", "custom": {"name": "mine"}}),
    ],
    "weights that are drawn are trained whole: set method.type: Full.": [changed(SCRATCH, "spec.method", {"type": "LoRA"})],
    "vocabulary extends a tokenizer that there is: leave it out with baseModel.architecture.": [
        changed(SCRATCH, "spec.vocabulary", {}),
    ],
    "seq2Seq may be set only with type: Seq2Seq.": [changed(FINE_TUNE_JOB, "spec.objective.seq2Seq", {})],
    "Seq2Seq is judged by what it writes: the metrics of its suites must be Loss or ChrF.": [
        changed(TRANSLATIONS, "spec.evaluation.suites.0.metrics", ["ChrF", metric]) for metric in ("Accuracy", "MacroF1", "Preference")
    ],
    "vocabulary gives a decoder new tokens: Seq2Seq cannot have it.": [changed(TRANSLATIONS, "spec.vocabulary", {})],
    "the metric ChrF is measured with Seq2Seq only.": [changed(TEXTS, "spec.evaluation.suites.0.metrics", ["Loss", "ChrF"])],
    "custom may be set only with type: Custom.": [changed(FINE_TUNE_JOB, "spec.objective.custom", {"name": "mine"})],
    "type: Custom needs custom.name.": [changed(FINE_TUNE_JOB, "spec.objective", {"type": "Custom"})],
    "Pretraining, SequenceClassification, Seq2Seq and RewardModel leave no adapter: output.format must be Merged.": [
        changed(manifest, "spec.output.format", "Adapter") for manifest in (TEXTS, CLASSES, TRANSLATIONS)
    ],
    "feedback has labels, corrections and votes on answers, which Pretraining cannot learn from: set data.train.source.": [
        changed(manifest, "spec.data.train.0", {"feedback": {"deployment": "sentiment"}}) for manifest in (TEXTS,)
    ],
    "a template of SFT, Seq2Seq, KTO, GRPO and RLOO can render prompt and completion only.": [
        changed(manifest, f"spec.data.train.0.template.{text}", "x")
        for manifest in (FINE_TUNE_JOB, TRANSLATIONS, JUDGEMENTS, PROMPTS)
        for text in ("chosen", "rejected", "text")
    ],
    "a template of DPO and RewardModel can render prompt, chosen and rejected only.": [
        changed(PREFERENCES, f"spec.data.train.0.template.{text}", "x") for text in ("completion", "text")
    ],
    "a template of Pretraining and SequenceClassification can render text only.": [
        changed(manifest, f"spec.data.train.0.template.{text}", "x") for manifest in (TEXTS, CLASSES) for text in ("prompt", "chosen")
    ],
    "rows of SequenceClassification, Seq2Seq, DPO, KTO, RewardModel, GRPO and RLOO cannot be packed: training.packing must be false.": [
        changed(manifest, "spec.training.packing", True) for manifest in (CLASSES, TRANSLATIONS, PREFERENCES, JUDGEMENTS, PROMPTS, LEFT_OUT)
    ],
    "KTO compares each row with another of its batch: training.globalBatchSize must be at least 2.": [
        changed(JUDGEMENTS, "spec.training.globalBatchSize", 1),
    ],
    "the rows that are held out have two answers with DPO and RewardModel only: the metric Preference needs a suite of type Dataset.": [
        changed(FINE_TUNE_JOB, "spec.evaluation.suites.2.metrics", ["Preference"]),
    ],
    "RewardModel scores answers and writes none: the metrics of its suites must be [Preference].": [
        changed(changed(PREFERENCES, "spec.objective", {"type": "RewardModel"}), "spec.evaluation.suites.0.metrics", ["Loss"]),
    ],
    "SequenceClassification writes no answers: the metric Preference cannot be measured.": [
        changed(changed(CLASSES, "spec.evaluation.suites.0.metrics", ["Preference"]), "spec.evaluation.gates.0.metric", "Preference"),
    ],
    "training.globalBatchSize must be a multiple of compute.nodes x compute.acceleratorsPerNode: each takes an equal share.": [
        changed(changed(FINE_TUNE_JOB, "spec.compute.nodes", 3), "spec.training.globalBatchSize", 16),
        changed(changed(FINE_TUNE_JOB, "spec.compute.acceleratorsPerNode", 3), "spec.training.globalBatchSize", 16),
    ],
    "minNodes must not be above nodes.": [changed(FINE_TUNE_JOB, "spec.compute.minNodes", 9)],
    "compute.parallelism: FSDP divides the model among several processes: set compute.nodes or acceleratorsPerNode above 1.": [
        changed(FINE_TUNE_JOB, "spec.compute", {"parallelism": "FSDP"}),
        changed(FINE_TUNE_JOB, "spec.compute", {"acceleratorsPerNode": 0, "parallelism": "FSDP"}),
    ],
    "compute.parallelism: FSDP is for SFT, Pretraining, SequenceClassification, DPO, KTO, RewardModel and Custom.": [
        changed(changed(FINE_TUNE_JOB, "spec.objective", {"type": "GRPO"}), "spec.compute.parallelism", "FSDP"),
    ],
    "vocabulary trains single rows of a whole matrix: compute.parallelism must not be FSDP.": [
        changed(changed(FINE_TUNE_JOB, "spec.vocabulary", {}), "spec.compute.parallelism", "FSDP"),
    ],
    "training.earlyStopping needs data.validation.": [WITHOUT_VALIDATION],
    "a suite of type Validation needs data.validation.": [changed(FINE_TUNE_JOB, "spec.data.validation", ...)],
    "evaluation.artifactDigest must equal artifact.manifestDigest: what is evaluated is what is shipped.": [
        changed(MODEL_VERSION, "spec.evaluation.artifactDigest", "sha256:" + "1" * 64),
        changed(MODEL_VERSION, "spec.evaluation.artifactDigest", ...),
    ],
    "rank is an adapter's: leave it out, or set format: Adapter.": [changed(MODEL_VERSION, "spec.artifact.format", "Merged")],
    "options takes only async-scheduling, block-size,": [
        changed(MODEL_DEPLOYMENT, "spec.engine.options", {"trust-remote-code": "true"}),
        changed(MODEL_DEPLOYMENT, "spec.engine.options", {"dtype": "auto", "chat-template": "/etc/passwd"}),
    ],
    "secretRef and volume exclude each other.": [
        changed(MODEL_DEPLOYMENT, "spec.gateway.capture.database.secretRef", {"name": "db"}),
    ],
    "more than one gateway replica needs a database: set gateway.capture.database.secretRef.": [
        changed(MODEL_DEPLOYMENT, "spec.gateway.replicas", 2),
        changed(MODEL_DEPLOYMENT, "spec.gateway", {"replicas": 2}),
    ],
    "surge: Never stops the engine before: set allowDowntime: true as well.": [
        changed(MODEL_DEPLOYMENT, "spec.rollout", {"surge": "Never"}),
        changed(MODEL_DEPLOYMENT, "spec.rollout", {"surge": "Never", "allowDowntime": False}),
    ],
    "nodesPerReplica above 1 needs acceleratorsPerReplica of 1 or more: an engine on the CPU has one node.": [
        changed(MODEL_DEPLOYMENT, "spec.engine.nodesPerReplica", 2),
        changed(MODEL_DEPLOYMENT, "spec.engine", {"acceleratorsPerReplica": 0, "nodesPerReplica": 16}),
    ],
    "metadata.name must be at most 38 characters where engine.nodesPerReplica is above 1: its pods are named by it.": [
        changed(changed(MODEL_DEPLOYMENT, "spec.engine", {"nodesPerReplica": 2}), "metadata.name", "x" * 39),
    ],
    "maxReplicas must not be below minReplicas.": [
        changed(MODEL_DEPLOYMENT, "spec.autoscaling", {"minReplicas": 3, "maxReplicas": 2}),
        changed(MODEL_DEPLOYMENT, "spec.autoscaling", {"minReplicas": 2, "maxReplicas": 1}),
    ],
    "schedule.replicas must not be above maxReplicas.": [changed(MODEL_DEPLOYMENT, "spec.autoscaling.maxReplicas", 1)],
    "engine.replicas: 0 needs autoscaling.minReplicas: 0, so that a request starts the engine again.": [
        changed(changed(MODEL_DEPLOYMENT, "spec.autoscaling", ...), "spec.engine.replicas", 0),
        changed(changed(MODEL_DEPLOYMENT, "spec.autoscaling.minReplicas", 1), "spec.engine.replicas", 0),
        changed(changed(MODEL_DEPLOYMENT, "spec.autoscaling.minReplicas", ...), "spec.engine.replicas", 0),
    ],
    "steps must rise in weight.": [
        changed(MODEL_DEPLOYMENT, "spec.rollout.steps", [{"weight": 50}, {"weight": 5}]),
    ],
    "template.spec.evaluation must have gates: a retraining without a gate is refused.": [
        changed(MODEL_DEPLOYMENT, "spec.retraining.template.spec.evaluation", {"suites": []}),
        changed(MODEL_DEPLOYMENT, "spec.retraining.template.spec.evaluation.gates", []),
    ],
    "a Drift trigger needs monitoring.drift.": [changed(MODEL_DEPLOYMENT, "spec.monitoring", {"source": "Direct"})],
}


@pytest.mark.parametrize(
    ("sentence", "manifest"), [(sentence, manifest) for sentence, cases in REFUSED.items() for manifest in cases], ids=lambda value: None
)
def test_a_rule_over_several_fields_refuses_with_its_sentence(server: Server, place: str, sentence: str, manifest: Manifest) -> None:
    said = refusal(server, place, manifest)
    assert said.startswith("422")
    assert sentence in said


# --- what may not change ---------------------------------------------------------------------------

IMMUTABLE_JOB = "cannot change once training has started; only runPolicy and approval can. Make a new FineTuneJob instead."
IMMUTABLE_VERSION = "cannot change: a ModelVersion is the record of one artifact. Only approval can."
FINAL = "approval cannot change any more: Rejected and Withdrawn are final. Train a new version."

JOB_EDITS: dict[str, Manifest] = {
    "baseModel": {"baseModel": {"revision": "other"}},
    "objective": {"objective": {"sft": {"loss": "FullSequence"}}},
    "promptFormat": {"promptFormat": "Text"},
    "method": {"method": {"lora": {"rank": 64}}},
    "quantization": {"quantization": {}},
    "vocabulary": {"vocabulary": {}, "output": {"format": "Merged"}},
    "data": {"data": {"curation": {"decontaminate": False}}},
    "training": {"training": {"extraArguments": {"weight_decay": "0.02"}}},
    "compute": {"compute": {"pod": {"labels": {"team": "b"}}}},
    "checkpoint": {"checkpoint": {"keep": 3}},
    "evaluation": {"evaluation": {"gates": None}},
    "output": {"output": {"model": "other"}},
}
VERSION_EDITS: dict[str, Manifest] = {
    "model": {"model": "other"},
    "version": {"version": 4},
    "artifact": {"artifact": {"uri": "pvc://models/other"}},
    "base": {"base": None},
    "lineage": {"lineage": {"spec": {"training": {"epochs": "4"}}}},
    "evaluation": {"evaluation": {"verdict": "Fail"}},
    "probesUri": {"probesUri": None},
    "referenceUri": {"referenceUri": None},
    "prompt": {"prompt": {"format": "Text"}},
}


def edit(server: Server, place: str, manifest: Manifest, spec: Manifest, dry: bool = True) -> tuple[int, Manifest]:
    path = f"{objects(place, manifest)}/{manifest['metadata']['name']}" + ("?dryRun=All" if dry else "")
    return server.call("PATCH", path, {"spec": spec}, MERGE)


def set_status(server: Server, place: str, manifest: Manifest, status: Manifest) -> tuple[int, Manifest]:
    return server.call("PATCH", f"{objects(place, manifest)}/{manifest['metadata']['name']}/status", {"status": status}, MERGE)


@pytest.fixture(scope="module")
def waiting_job(server: Server, place: str) -> Manifest:
    manifest = changed(FINE_TUNE_JOB, "metadata.name", "waiting")
    assert create(server, place, manifest, dry=False)[0] == 201
    assert set_status(server, place, manifest, {"observedGeneration": 1})[0] == 200
    return manifest


@pytest.fixture(scope="module")
def started_job(server: Server, place: str) -> Manifest:
    manifest = changed(FINE_TUNE_JOB, "metadata.name", "started")
    assert create(server, place, manifest, dry=False)[0] == 201
    assert set_status(server, place, manifest, {"startedAt": "2026-01-01T00:00:00Z"})[0] == 200
    return manifest


@pytest.mark.parametrize("field", JOB_EDITS)
def test_a_job_that_has_not_started_may_change(server: Server, place: str, waiting_job: Manifest, field: str) -> None:
    assert edit(server, place, waiting_job, JOB_EDITS[field])[0] == 200


@pytest.mark.parametrize("field", JOB_EDITS)
def test_a_started_job_may_not_change(server: Server, place: str, started_job: Manifest, field: str) -> None:
    code, answer = edit(server, place, started_job, JOB_EDITS[field])
    assert code == 422
    assert f"{field} {IMMUTABLE_JOB}" in answer["message"]
    assert f"spec.{field}" in [cause["field"] for cause in answer["details"]["causes"]]


@pytest.mark.parametrize("spec", [{"runPolicy": {"suspend": False}}, {"runPolicy": None}, {"approval": "Manual"}])
def test_run_policy_and_approval_of_a_started_job_may_change(server: Server, place: str, started_job: Manifest, spec: Manifest) -> None:
    code, answer = edit(server, place, started_job, spec)
    assert code == 200, answer["message"]


@pytest.fixture(scope="module")
def version(server: Server, place: str) -> Manifest:
    assert create(server, place, MODEL_VERSION, dry=False)[0] == 201
    return MODEL_VERSION


@pytest.mark.parametrize("field", VERSION_EDITS)
def test_a_version_may_not_change(server: Server, place: str, version: Manifest, field: str) -> None:
    code, answer = edit(server, place, version, VERSION_EDITS[field])
    assert code == 422
    assert f"{field} {IMMUTABLE_VERSION}" in answer["message"]


@pytest.mark.parametrize("approval", ["Approved", "Rejected", "Withdrawn"])
def test_the_approval_of_a_pending_version_may_change(server: Server, place: str, version: Manifest, approval: str) -> None:
    assert edit(server, place, version, {"approval": approval})[0] == 200


@pytest.mark.parametrize("approval", ["Rejected", "Withdrawn"])
def test_rejected_and_withdrawn_are_final(server: Server, place: str, approval: str) -> None:
    manifest = changed(changed(MODEL_VERSION, "spec.model", approval.lower()), "metadata.name", f"{approval.lower()}-v3")
    assert create(server, place, manifest, dry=False)[0] == 201
    assert edit(server, place, manifest, {"approval": approval}, dry=False)[0] == 200
    code, answer = edit(server, place, manifest, {"approval": "Approved"})
    assert code == 422
    assert FINAL in answer["message"]


def test_every_rule_of_the_schemas_is_tested_here() -> None:
    found = {rule["message"] for schema in SCHEMAS.values() for rule in _rules_below(schema)}
    by_value = {violation.sentence for _, violation in all_violations()}
    immutable = {f"{field} {IMMUTABLE_JOB}" for field in JOB_EDITS} | {f"{field} {IMMUTABLE_VERSION}" for field in VERSION_EDITS}
    tested = by_value | immutable | {FINAL}
    assert [message for message in found - tested if not any(message.startswith(sentence) for sentence in REFUSED)] == []


def _rules_below(schema: Manifest) -> Iterator[Manifest]:
    yield from schema.get("x-kubernetes-validations", ())
    parts = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    for part in parts:
        if part is not None:
            yield from _rules_below(part)


# --- old objects -------------------------------------------------------------------------------------


def test_an_object_from_before_a_rule_can_still_be_reported_on_edited_and_deleted(server: Server, place: str) -> None:
    group = f"{place}.tuneloop.dev"
    crd = render_crd(DEFINITIONS[0])
    crd["spec"]["group"], crd["metadata"]["name"] = group, f"finetunejobs.{group}"
    crd["spec"]["names"] = {"kind": "FineTuneJob", "plural": "finetunejobs"}
    old = copy.deepcopy(crd)
    _without_rules(old["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    name = crd["metadata"]["name"]
    crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    assert server.call("POST", crds, old)[0] == 201
    try:
        path = f"/apis/{group}/v1alpha1/namespaces/{place}/finetunejobs"
        bad = changed(changed(FINE_TUNE_JOB, "apiVersion", f"{group}/v1alpha1"), "spec.training.learningRate", "fast")
        wait_for(lambda: server.call("POST", path, bad)[0] == 201)
        assert server.call("PATCH", f"{crds}/{name}", {"spec": crd["spec"]}, MERGE)[0] == 200
        wait_for(lambda: server.call("POST", path + "?dryRun=All", changed(bad, "metadata.name", "fresh"))[0] == 422)
        # The handler of a changed definition is made anew, for each subresource when it is first asked for.
        wait_for(lambda: server.call("PATCH", f"{path}/full/status", {"status": {"phase": "Pending"}}, MERGE)[0] == 200)
        wait_for(lambda: server.call("PATCH", f"{path}/full", {"spec": {"training": {"seed": 7}}}, MERGE)[0] == 200)
        assert server.call("PATCH", f"{path}/full", {"spec": {"training": {"learningRate": "slow"}}}, MERGE)[0] == 422
        assert server.call("DELETE", f"{path}/full")[0] == 200
    finally:
        server.call("DELETE", f"{crds}/{name}")


def _without_rules(schema: Manifest) -> None:
    schema.pop("x-kubernetes-validations", None)
    for part in [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]:
        if part is not None:
            _without_rules(part)


# --- what kubectl shows ------------------------------------------------------------------------------


def kubectl(*arguments: str) -> str:
    return subprocess.run(["kubectl", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("kind", PLURALS)
def test_kubectl_explain_describes_every_field(server: Server, kind: str) -> None:
    """What explain prints is the API server's OpenAPI: all of that is compared, and what kubectl makes of it once."""
    document = wait_for(lambda: server.api.call("GET", "/openapi/v3/apis/tuneloop.dev/v1alpha1"))
    published = document["components"]["schemas"][f"dev.tuneloop.v1alpha1.{kind}"]
    fields, shown = list(_fields(SCHEMAS[kind])), dict(_fields(published))
    assert len(fields) > 50
    for path, field in fields:
        assert field["description"], path
        assert shown[path]["description"] == field["description"], path
    path, field = fields[-1]
    assert field["description"] in " ".join(kubectl("explain", f"{PLURALS[kind]}.tuneloop.dev.{path}").split())


def _fields(schema: Manifest, path: str = "") -> Iterator[tuple[str, Manifest]]:
    for name, field in schema.get("properties", {}).items():
        if path or name in ("spec", "status"):
            here = f"{path}.{name}".lstrip(".")
            yield here, field
            yield from _fields(field, here)
            yield from _fields(field.get("items", {}), here)


@pytest.mark.usefixtures("waiting_job", "version")
def test_short_names_columns_and_the_category_work(server: Server, place: str) -> None:
    assert create(server, place, MODEL_DEPLOYMENT, dry=False)[0] == 201
    assert kubectl("get", "ftj", "-n", place).split("\n")[0].split() == ["NAME", "PHASE", "STEP", "LOSS", "DONE", "VERSION", "AGE"]
    assert "sentiment-v3   sentiment   3         Pending    Pass" in kubectl("get", "mv", "sentiment-v3", "-n", place)
    header = "NAME AVAILABLE READY VERSION CANARY WEIGHT REPLICAS DRIFT URL AGE"
    assert kubectl("get", "mdep", "-n", place).split("\n")[0].split() == header.split()
    assert {line.split("/")[0] for line in kubectl("get", "tuneloop", "-n", place, "-o", "name").split()} == {
        f"{plural[:-1]}.tuneloop.dev" for plural in PLURALS.values()
    }
    assert "tuneloop.dev" not in kubectl("get", "all", "-n", place, "-o", "name")


def test_scale_reads_and_writes_the_engine_replicas(server: Server, place: str) -> None:
    manifest = changed(MODEL_DEPLOYMENT, "metadata.name", "scaled")
    assert create(server, place, manifest, dry=False)[0] == 201
    set_status(server, place, manifest, {"replicas": 1, "selector": "a=b"})
    kubectl("scale", "mdep/scaled", "--replicas=0", "-n", place)
    kubectl("scale", "mdep/scaled", "--replicas=3", "-n", place)
    scale = json.loads(kubectl("get", "--raw", f"{objects(place, manifest)}/scaled/scale"))
    assert scale["spec"]["replicas"] == 3
    assert scale["status"] == {"replicas": 1, "selector": "a=b"}


def test_the_smallest_manifests_are_accepted_with_their_defaults(server: Server, place: str) -> None:
    minimal = {
        **{key: FINE_TUNE_JOB[key] for key in ("apiVersion", "kind")},
        "metadata": {"name": "minimal"},
        "spec": {
            "baseModel": {"uri": "hf://org/name"},
            "data": {"train": [{"source": {"uri": "pvc://data/train.jsonl"}}]},
            "output": {"model": "sentiment", "store": {"uri": "pvc://models"}},
        },
    }
    code, answer = create(server, place, minimal)
    assert code == 201, answer["message"]
    assert answer["spec"]["method"] == {"type": "LoRA"}
    assert answer["spec"]["training"]["globalBatchSize"] == 16
    assert "status" not in answer
    assert "image" not in answer["spec"]["compute"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_accepted(server: Server, place: str, path: Path) -> None:
    for manifest in yaml.safe_load_all(path.read_text()):
        if manifest and manifest.get("kind") in PLURALS:
            renamed = manifest["metadata"]["name"] + ("" if manifest["kind"] == "ModelVersion" else "-example")
            code, answer = create(server, place, {**manifest, "metadata": {"name": renamed}})
            assert code == 201, answer["message"]
