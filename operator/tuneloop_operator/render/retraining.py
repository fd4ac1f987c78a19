"""The FineTuneJob of a retraining: the served version's job again, from its original base, half on new data, gated on old and new."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from tuneloop_operator.api import API_VERSION
from tuneloop_operator.api.finetunejob import FineTuneJobSpec
from tuneloop_operator.api.modeldeployment import ModelDeployment, RetrainingStatus
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.api.objectives import feedback_rows
from tuneloop_operator.render import names

Json = dict[str, Any]
OLD, NEW = "old", "new"
"""Names of the two suites."""
OLD_SHARE = NEW_SHARE = 0.5
DEFAULT_MIN_ITEMS = 400
EXPORT_COLUMNS = {"text": "text", "label": "label", "document": "document"}
"""The gateway's export has its own columns, whatever the old files call theirs."""
PLAIN_COLUMNS = {"prompt": "text", "completion": "label", "document": "document"}
"""The same, where the old data has no template: the roles are used as they are."""


class NoTemplate(Exception):
    """What to train cannot be derived; the message says what to set."""


def render_retraining(deployment: ModelDeployment, version: ModelVersion, job: str, status: RetrainingStatus) -> Json:
    """Raises NoTemplate. The manifest has no owner: the job and its version outlive the deployment."""
    return {
        "apiVersion": API_VERSION,
        "kind": "FineTuneJob",
        "metadata": {
            "name": job,
            "namespace": deployment.metadata.namespace,
            "labels": names.labels(
                "retraining",
                deployment.metadata.name,
                **{names.DEPLOYMENT_LABEL: deployment.metadata.name, names.EPISODE_LABEL: str(status.episode)},
            ),
            "ownerReferences": [],
        },
        "spec": retraining_spec(deployment, version, str(status.epoch)),
    }


def retraining_spec(deployment: ModelDeployment, version: ModelVersion, epoch: str) -> Json:
    """lineage.spec, then what is derived for new data (of this epoch), then the user's template, then what nobody may change.

    Raises NoTemplate.
    """
    assert deployment.spec.retraining is not None  # asked for by whoever renders a retraining
    lineage = version.spec.lineage.spec if version.spec.lineage is not None else {}
    template = deployment.spec.retraining.template.spec
    base = {"baseModel": version.spec.base.source.model_dump(mode="json", by_alias=True, exclude_none=True)} if version.spec.base else {}
    derived = (
        {"data": {"train": _train(deployment, lineage, epoch)}, "evaluation": _evaluation(deployment, lineage, epoch)} if lineage else {}
    )
    spec = deep_merged(deep_merged(deep_merged(base, lineage), derived), template)
    if "objective" in template:
        spec["objective"] = template["objective"]  # whole: the settings of another objective would be refused beside it
    _check(spec, has_lineage=bool(lineage))
    suspended = deployment.spec.retraining.approval == "Manual"
    forced: Json = {
        "evaluation": {"baseline": {"type": "ModelVersion", "name": version.metadata.name}},
        "output": {"model": version.spec.model},
        "runPolicy": {"suspend": suspended},
    }
    return _valid(deep_merged(spec | {"evaluation": {**spec["evaluation"], "baseline": {}}}, forced))


def _valid(spec: Json) -> Json:
    """As the API would read it: what it would refuse is told here, before a job is counted."""
    try:
        FineTuneJobSpec.model_validate(spec)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise NoTemplate(f"The job would be refused: {field}: {first['msg']}. Correct retraining.template.spec.") from None
    return spec


def deep_merged(under: Json, over: Json) -> Json:
    """`over` laid on `under`: maps merge by key, everything else is replaced."""
    merged = dict(under)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = deep_merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def new_domain_items(spec: Json, deployment: str) -> int:
    """Items that the strictest gate on this deployment's labelled traffic needs; 0 where no gate rests on it."""
    evaluation = spec.get("evaluation") or {}
    suites = {suite.get("name") for suite in evaluation.get("suites") or () if _is_feedback((suite.get("dataset") or {}), deployment)}
    needed = (gate.get("minItems", DEFAULT_MIN_ITEMS) for gate in evaluation.get("gates") or () if gate.get("suite") in suites)
    return max(needed, default=0)


def _check(spec: Json, *, has_lineage: bool) -> None:
    where = "" if has_lineage else "The served version was trained elsewhere and has no lineage: "
    broken = [path for path in ("data", "evaluation", "output") if path in spec and not isinstance(spec[path], dict)]
    if broken:
        raise NoTemplate(f"{', '.join(broken)} in retraining.template.spec must be an object.")
    missing = [path for path in ("baseModel", "data", "evaluation", "output") if not spec.get(path)]
    if missing:
        raise NoTemplate(f"{where}set {', '.join(missing)} in retraining.template.spec.")
    if not spec["evaluation"].get("gates"):
        message = "set evaluation.suites and evaluation.gates in retraining.template.spec: nothing is retrained without a gate."
        raise NoTemplate(f"{where}{message}")
    objective = (spec.get("objective") or {}).get("type", "SFT")
    if feedback_rows(objective) != "Labels" and any("feedback" in source for source in _list(spec, "data", "train")):
        message = f"{objective} does not learn from labels and corrections: set objective, data and evaluation in retraining.template.spec."
        raise NoTemplate(message)


# --- data --------------------------------------------------------------------


def _train(deployment: ModelDeployment, lineage: Json, epoch: str) -> list[Json]:
    """Half old, half new. Feedback of earlier epochs is old: what the model learnt of the domain before is not forgotten for the next."""
    sources = [source for source in _list(lineage, "data", "train") if not _is_new(source, deployment.metadata.name, epoch)]
    weights = [float(source.get("weight", "1")) for source in sources]
    total = sum(weights)
    old = [source | {"weight": _number(OLD_SHARE * weight / total)} for source, weight in zip(sources, weights, strict=True)]
    new = _feedback(deployment, epoch, next((source.get("template") for source in sources if source.get("template")), None))
    return [*old, new | {"weight": _number(NEW_SHARE)}]


def _is_new(source: Json, deployment: str, epoch: str) -> bool:
    """Feedback without an epoch is read of the current one, whatever it was once trained on."""
    return _is_feedback(source, deployment) and source["feedback"].get("epoch") in (None, epoch)


def _feedback(deployment: ModelDeployment, epoch: str, template: Json | None) -> Json:
    source: Json = {"feedback": {"deployment": deployment.metadata.name, "epoch": epoch}}
    return source | ({"columns": EXPORT_COLUMNS, "template": template} if template else {"columns": PLAIN_COLUMNS})


def _number(value: float) -> str:
    return f"{value:.6g}"


# --- evaluation --------------------------------------------------------------


def _evaluation(deployment: ModelDeployment, lineage: Json, epoch: str) -> Json:
    """Two suites: the model must not get worse on what it was gated on, and must get better on the new traffic."""
    gate, suite = _old_gate(deployment, lineage)
    if suite is None:
        return {}
    dataset = suite.get("dataset") or {}
    templates = [dataset.get("template"), *(source.get("template") for source in _list(lineage, "data", "train"))]
    new = _feedback(deployment, epoch, next((template for template in templates if template), None))
    if dataset.get("labels"):
        new["labels"] = dataset["labels"]
    levels = {field: gate[field] for field in ("alpha", "minItems") if field in gate}
    margin = {"margin": gate["margin"]} if "margin" in gate else {}
    return {
        "suites": [
            suite | {"name": OLD, "metrics": ["Accuracy"]},
            {"name": NEW, "type": "Dataset", "dataset": new, "metrics": ["Accuracy"]},
        ],
        "gates": [
            {"suite": OLD, "metric": "Accuracy", "rule": "NonInferior", **margin, **levels},
            {"suite": NEW, "metric": "Accuracy", "rule": "Superior", **levels},
        ],
    }


def _old_gate(deployment: ModelDeployment, lineage: Json) -> tuple[Json, Json | None]:
    """The original gate and its suite: of a retrained version the one named `old`, else the first on a dataset of its own."""
    suites = {
        suite.get("name"): suite
        for suite in _list(lineage, "evaluation", "suites")
        if suite.get("type", "Dataset") == "Dataset" and not _is_feedback(suite.get("dataset") or {}, deployment.metadata.name)
    }
    gates = [gate for gate in _list(lineage, "evaluation", "gates") if gate.get("suite") in suites]
    if gates:
        gate = next((gate for gate in gates if gate["suite"] == OLD), gates[0])
        return gate, suites[gate["suite"]]
    return {}, next(iter(suites.values()), None)


def _is_feedback(holder: Json, deployment: str) -> bool:
    return (holder.get("feedback") or {}).get("deployment") == deployment


def _list(spec: Json, *path: str) -> list[Json]:
    """The list of maps at a path of an untyped spec; empty where there is none."""
    value: Any = spec
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
