"""The trainer's configuration: a FineTuneJob's spec and what was resolved for it, as the contract wants it."""

from __future__ import annotations

from typing import Any, Literal

from tuneloop_gateway.contract import INTERNAL_PORT
from tuneloop_operator.api import finetunejob as api
from tuneloop_operator.api.methods import LoRA, Method, PromptTuning, Quantization, Vocabulary
from tuneloop_operator.api.objectives import (
    DPO,
    KTO,
    SFT,
    Objective,
    Seq2Seq,
    SequenceClassification,
    default_format,
    feedback_rows,
    prompt_format,
)
from tuneloop_operator.api.rowsources import BUCKET, HUB, RowSource
from tuneloop_operator.api.starting import StartingModel
from tuneloop_operator.api.types import Source
from tuneloop_operator.render import names
from tuneloop_operator.render.rewards import rollouts
from tuneloop_trainer import contract

PUSH_PATH = "/etc/tuneloop/push"
"""Below it, one folder for each place of output.push with its Secret's keys."""
MLFLOW_PATH = "/etc/tuneloop/mlflow"
"""Folder of the keys to MLflow's server."""
SOURCES_PATH = "/etc/tuneloop/sources"
"""Below it, one folder for each Secret of the rows' sources, of its name."""
FEEDBACK_PATH = "/etc/tuneloop/feedback"
"""Below it, one folder per ModelDeployment with its internal token."""
INTERNAL_TOKEN = "internal-token"
VALIDATION_SUITE = "validation"
CHECKPOINT_MINUTES = 10.0


def run_config(job: api.FineTuneJob, resolved: api.Resolved) -> contract.RunConfig:
    """The file that all stages of a run read."""
    spec = job.spec
    return contract.RunConfig(
        namespace=job.metadata.namespace,
        name=job.metadata.name,
        uid=job.metadata.uid,
        paths=paths(job),
        base=starting(spec.base_model),
        scratch=scratch(spec.base_model),
        **_objective(spec.objective),
        prompt_format=prompt_format(spec.objective.type, spec.prompt_format),
        method=_method(spec.method),
        quantization=_quantization(spec.quantization),
        vocabulary=_vocabulary(spec.vocabulary),
        train=tuple(_data_source(job, source) for source in spec.data.train),
        validation_fraction=float(spec.data.validation.fraction) if spec.data.validation is not None else 0.0,
        curation=_curation(spec.data.curation),
        training=_training(spec),
        checkpoint=_checkpoint(spec.checkpoint),
        evaluation=_evaluation(job, resolved),
        model=spec.output.model,
        output_format=output_format(spec),
        push=tuple(_push(target, index) for index, target in enumerate(spec.output.push)),
        image=resolved.image or "",
        reporting=_reporting(spec.training.reporting),
        origins={"learning_rate": "default" if spec.training.learning_rate is None else "spec"},
    )


# --- places ------------------------------------------------------------------


def run_folder(job: api.FineTuneJob) -> str:
    """A job that was deleted and made again under the same name must not find its predecessor's files."""
    return f"{job.metadata.name}-{job.metadata.uid[:8]}"


def artifact_uri(job: api.FineTuneJob) -> str:
    return f"{job.spec.output.store.uri.rstrip('/')}/models/{job.spec.output.model}/{run_folder(job)}"


def paths(job: api.FineTuneJob) -> contract.Paths:
    store = names.pvc_path(job.spec.output.store.uri)
    return contract.Paths(work=f"{store}/runs/{run_folder(job)}", artifact=names.pvc_path(artifact_uri(job)), cache=f"{store}/cache")


def base_snapshot_uri(job: api.FineTuneJob, resolved: api.Resolved) -> str | None:
    """Where prepare keeps a base of the hub at the commit that it found; None for a base that lies on a claim anyway."""
    source = job.spec.base_model.files
    revision = resolved.base_revision or (source.revision if source is not None else None)
    if source is None or job.spec.base_model.uri is None or not source.uri.startswith("hf://") or revision is None:
        return None
    repository = base(source).repository or ""
    return f"{job.spec.output.store.uri.rstrip('/')}/cache/bases/{repository.replace('/', '--')}@{revision}"


def output_format(spec: api.FineTuneJobSpec) -> Literal["Adapter", "Merged"]:
    if spec.output.format is not None:
        return spec.output.format
    return default_format(spec.objective.type, spec.method.leaves_adapter and spec.vocabulary is None)


def starting(asked: StartingModel) -> contract.Base:
    """Where files are read of a model that there is; of one whose weights are drawn, at most its tokenizer."""
    return base(asked.files) if asked.files is not None else contract.Base(uri="the training rows")


def scratch(asked: StartingModel) -> contract.Scratch | None:
    """The architecture, its defaults filled in; None where there is a model to start from."""
    wanted = asked.architecture
    if wanted is None:
        return None
    trained = asked.tokenizer.train if asked.tokenizer is not None else None
    return contract.Scratch(
        family=wanted.family,
        layers=wanted.layers,
        hidden_size=wanted.hidden_size,
        heads=wanted.heads,
        key_value_heads=wanted.key_value_heads or wanted.heads,
        intermediate_size=wanted.intermediate_size or -(-8 * wanted.hidden_size // 192) * 64,
        tie_embeddings=wanted.tie_embeddings,
        vocabulary_size=trained.vocabulary_size if trained is not None else None,
    )


def base(source: Source) -> contract.Base:
    if source.uri.startswith("hf://"):
        return contract.Base(uri=source.uri, repository=source.uri.removeprefix("hf://").strip("/"), revision=source.revision)
    return contract.Base(uri=source.uri, path=names.pvc_path(source.uri), revision=source.revision)


def _push(target: api.PushTarget, index: int) -> contract.Push:
    credentials = f"{PUSH_PATH}/{index}" if target.secret_ref is not None else None
    return contract.Push(uri=target.uri, credentials=credentials, plain_http=target.plain_http)


# --- parts -------------------------------------------------------------------


def _objective(asked: Objective) -> dict[str, Any]:
    """The fields of the configuration that say what is optimised."""
    parts: dict[str, Any] = {"objective": asked.type, "loss": (asked.sft or SFT()).loss}
    match asked.type:
        case "DPO":
            dpo = asked.dpo or DPO()
            parts["dpo"] = contract.Dpo(beta=float(dpo.beta), loss=dpo.loss)
        case "KTO":
            kto = asked.kto or KTO()
            weights = {"desirable_weight": float(kto.desirable_weight), "undesirable_weight": float(kto.undesirable_weight)}
            parts["kto"] = contract.Kto(beta=float(kto.beta), **weights)
        case "SequenceClassification":
            classes = asked.sequence_classification or SequenceClassification()
            parts["classification"] = contract.Classification(labels=classes.labels, class_weights=classes.class_weights)
        case "GRPO" | "RLOO":
            parts["rollouts"] = rollouts(asked)
        case "Seq2Seq":
            writing = asked.seq2seq or Seq2Seq()
            parts["seq2seq"] = contract.Seq2Seq(max_answer_tokens=writing.max_answer_tokens, beams=writing.beams)
        case "Custom" if asked.custom is not None:
            parts["custom"] = contract.Custom(name=asked.custom.name, settings=dict(asked.custom.settings))
    return parts


def _method(method: Method) -> contract.Method:
    if method.type == "Full":
        return contract.Method(type="Full")
    if method.type == "PromptTuning":
        rows = (method.prompt_tuning or PromptTuning()).virtual_tokens
        return contract.Method(type="PromptTuning", prompt_tuning=contract.PromptTuning(virtual_tokens=rows))
    lora = method.lora or LoRA()
    settings = contract.Lora(
        rank=lora.rank, alpha=lora.alpha, dropout=float(lora.dropout), target_modules=lora.target_modules, dora=lora.dora
    )
    return contract.Method(type="LoRA", lora=settings)


def _quantization(asked: Quantization | None) -> contract.Quantization | None:
    return contract.Quantization(bits=asked.bits, type=asked.type) if asked is not None else None


def _vocabulary(asked: Vocabulary | None) -> contract.Vocabulary | None:
    if asked is None:
        return None
    found = asked.from_corpus
    return contract.Vocabulary(
        min_count=found.min_count, min_fertility=found.min_fertility, max_tokens=found.max_tokens, initialization=asked.initialization
    )


def _training(spec: api.FineTuneJobSpec) -> contract.Training:
    asked = spec.training
    drawn = spec.base_model.architecture is not None
    default_rate = (contract.FROM_SCRATCH if drawn else contract.DEFAULTS[spec.objective.type, spec.method.type]).learning_rate
    return contract.Training(
        epochs=float(asked.epochs),
        max_steps=asked.max_steps,
        global_batch_size=asked.global_batch_size,
        learning_rate=float(asked.learning_rate) if asked.learning_rate is not None else default_rate,
        warmup_steps=asked.warmup_steps,
        max_sequence_length=asked.max_sequence_length,
        packing=asked.packing,
        precision=asked.precision,
        seed=asked.seed,
        early_stopping_patience=asked.early_stopping.patience if asked.early_stopping is not None else None,
        loss_spike_ratio=float(asked.loss_spike_ratio) if asked.loss_spike_ratio is not None else None,
        extra_arguments=dict(asked.extra_arguments),
    )


def _reporting(asked: tuple[api.Reporting, ...]) -> contract.Reporting | None:
    if not asked:
        return None
    server = next((place.mlflow for place in asked if place.mlflow is not None), None)
    mlflow = None
    if server is not None:
        credentials = MLFLOW_PATH if server.secret_ref is not None else None
        mlflow = contract.Mlflow(tracking_uri=server.tracking_uri, experiment=server.experiment, credentials=credentials)
    return contract.Reporting(tensorboard=any(place.type == "TensorBoard" for place in asked), mlflow=mlflow)


def _checkpoint(asked: api.Checkpoint) -> contract.Checkpoint:
    minutes = float(asked.every_minutes) if asked.every_minutes is not None else None
    if minutes is None and asked.every_steps is None:
        minutes = CHECKPOINT_MINUTES
    publish: Literal["Asynchronous"] | None = "Asynchronous" if asked.publish == "Asynchronous" else None
    return contract.Checkpoint(every_minutes=minutes, every_steps=asked.every_steps, keep=asked.keep, publish=publish)


def _rows(
    job: api.FineTuneJob, source: RowSource | None, feedback: api.FeedbackRef | None, split: Literal["train", "gate"]
) -> contract.DataSource:
    """Where rows come from, without how they are read."""
    if source is not None:
        return _files(source)
    if feedback is None:
        raise ValueError("exactly one of source and feedback must be set")
    name = feedback.deployment
    export = contract.FeedbackExport(
        deployment=name,
        url=f"{names.gateway_url(name, job.metadata.namespace)}:{INTERNAL_PORT}/internal/export",
        token_file=f"{FEEDBACK_PATH}/{name}/{INTERNAL_TOKEN}",
        split=split,
        epoch=feedback.epoch,
        rows=(feedback_rows(job.spec.objective.type) if split == "train" else None) or "Labels",
    )
    epoch = f"?epoch={feedback.epoch}" if feedback.epoch is not None else ""
    return contract.DataSource(uri=f"feedback://{name}/{split}{epoch}", feedback=export)


def _files(source: RowSource) -> contract.DataSource:
    if source.uri.startswith(BUCKET):
        bucket = contract.Bucket(path=source.uri.removeprefix(BUCKET), credentials=credentials_folder(source))
        return contract.DataSource(uri=source.uri, bucket=bucket)
    if source.uri.startswith(HUB):
        return contract.DataSource(uri=source.uri, repository=_repository(source))
    return contract.DataSource(uri=source.uri, path=names.pvc_path(source.uri))


def _repository(source: RowSource) -> contract.Repository:
    """`hf://datasets/…`, as the hub's own tools write it, is the same as without `datasets`."""
    parts = [part for part in source.uri.removeprefix(HUB).split("/") if part]
    parts = parts[1:] if len(parts) > 2 and parts[0] == "datasets" else parts
    place = {"name": "/".join(parts[:2]), "path": "/".join(parts[2:])}
    return contract.Repository(**place, revision=source.revision, credentials=credentials_folder(source))


def row_sources(spec: api.FineTuneJobSpec) -> list[RowSource]:
    """Everything that rows are read from but feedback."""
    asked = [item.source for item in spec.data.train]
    asked += [suite.dataset.source for suite in spec.evaluation.suites if suite.dataset is not None]
    return [source for source in asked if source is not None]


def credentials_folder(source: RowSource) -> str | None:
    return f"{SOURCES_PATH}/{source.secret_ref.name}" if source.secret_ref is not None else None


def _template(template: api.RowTemplate | None) -> contract.Template | None:
    return None if template is None else contract.Template(**template.model_dump(exclude_none=True))


def _columns(columns: api.Columns) -> dict[str, str]:
    return columns.model_dump(exclude_none=True)


def _curation(asked: api.Curation) -> contract.Curation:
    return contract.Curation(
        deduplicate=asked.deduplicate,
        decontaminate=asked.decontaminate,
        personal_data=asked.personal_data,
        quality=asked.quality,
        languages=asked.languages,
        max_toxicity=float(asked.toxicity.max) if asked.toxicity is not None else None,
        max_class_ratio=float(asked.class_balance.max_ratio) if asked.class_balance is not None else None,
    )


def _data_source(job: api.FineTuneJob, source: api.DataSource) -> contract.DataSource:
    rows = _rows(job, source.source, source.feedback, "train")
    asked = {"prompt": "text"} if rows.feedback is not None and rows.feedback.rows != "Labels" else {}
    read = {"columns": asked | _columns(source.columns), "template": _template(source.template), "weight": float(source.weight)}
    return rows.model_copy(update=read)


# --- evaluation --------------------------------------------------------------


def _evaluation(job: api.FineTuneJob, resolved: api.Resolved) -> contract.Evaluation:
    plan = job.spec.evaluation
    suites = tuple(_suite(job, suite) for suite in plan.suites)
    gates = tuple(map(_gate, plan.gates))
    if not gates and job.spec.data.validation is not None:
        # A validation split without gates gets the default one: better than the baseline at what the objective improves.
        measured = contract.HELD_OUT_METRICS[job.spec.objective.type]
        held_out = next((suite for suite in suites if suite.type == "Validation"), None)
        if held_out is None:
            held_out = contract.Suite(name=VALIDATION_SUITE, type="Validation", metrics=measured)
            suites = (*suites, held_out)
        if measured[0] in held_out.metrics:
            gates = (contract.Gate(suite=held_out.name, metric=measured[0], rule="Superior"),)
    return contract.Evaluation(suites=suites, gates=gates, baseline=_baseline(resolved.baseline))


def _suite(job: api.FineTuneJob, suite: api.Suite) -> contract.Suite:
    if suite.dataset is None:
        return contract.Suite(name=suite.name, type=suite.type, metrics=suite.metrics)
    dataset = suite.dataset
    rows = _rows(job, dataset.source, dataset.feedback, "gate")
    source = rows.model_copy(update={"columns": _columns(dataset.columns), "template": _template(dataset.template)})
    return contract.Suite(name=suite.name, type=suite.type, source=source, labels=dataset.labels, metrics=suite.metrics)


def _gate(gate: api.Gate) -> contract.Gate:
    return contract.Gate(
        suite=gate.suite,
        metric=gate.metric,
        rule=gate.rule,
        margin=float(gate.margin),
        alpha=float(gate.alpha),
        min_items=gate.min_items,
    )


def _baseline(pinned: api.PinnedBaseline | None) -> contract.Baseline:
    if pinned is None or pinned.artifact_uri is None:
        return contract.Baseline(type="Base", name="base")
    of = Source(uri=pinned.base_uri, revision=pinned.base_revision) if pinned.base_uri is not None else None
    artifact = contract.Artifact(
        path=names.pvc_path(pinned.artifact_uri),
        manifest_digest=pinned.manifest_digest or "",
        format="Adapter" if pinned.format == "Adapter" else "Merged",
        base=base(of) if of is not None else None,
    )
    return contract.Baseline(type="ModelVersion", name=pinned.name, artifact=artifact)
