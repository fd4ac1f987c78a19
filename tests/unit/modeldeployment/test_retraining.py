"""When a better model is trained: every rule in turn, and each job counted before it is made."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from tests.unit.modeldeployment.world import LINEAGE_SPEC, NOW, RETRAINED, World, alarm, make_job, make_version

from tuneloop_gateway.contract import DriftReport, DriftStatus, FeedbackReport
from tuneloop_operator.api.finetunejob import FineTuneJobSpec
from tuneloop_operator.domain.decision import Decision, Key, Refusal
from tuneloop_operator.domain.modeldeployment import Evidence
from tuneloop_operator.render import names

ENOUGH = FeedbackReport(labelled_train=250, labelled_gate=310)


def alarmed(feedback: FeedbackReport = ENOUGH, effect: float = 0.3, **retraining: object) -> World:
    """Version 1 serves, and its users' inputs have changed."""
    world = World(spec=RETRAINED | {"retraining": RETRAINED["retraining"] | retraining})
    world.settle()
    world.drift = alarm(effect=effect)
    world.feedback = feedback
    return world


def retraining(world: World) -> World:
    """The job of the first episode is made, and trains."""
    world.step()
    world.step()
    assert len(world.created) == 2  # the keys, and the job
    world.jobs.append(make_job(world.status["retraining"]["lastJob"]))
    world.step()
    assert world.condition("RetrainingNeeded") == ("True", "Retraining")
    return world


def test_without_an_alarm_nothing_is_retrained() -> None:
    world = World(spec=RETRAINED, feedback=ENOUGH)
    world.settle()
    assert world.condition("DriftDetected") == ("False", "NoDrift")
    assert world.condition("RetrainingNeeded") == ("False", "NotNeeded")


@pytest.mark.parametrize(
    ("feedback", "effect", "spec", "reason", "message"),
    [
        (ENOUGH, 0.05, {}, "EffectTooSmall", "minimumEffect 0.1"),
        (FeedbackReport(labelled_train=199, labelled_gate=999), 0.3, {}, "CollectingData", "199 of 200 curated rows"),
        (FeedbackReport(labelled_train=200, labelled_gate=299), 0.3, {}, "NeedsLabels", "299 of 300 labelled items"),
        (ENOUGH, 0.3, {"maxRunsPerMonth": 0}, "BudgetExhausted", "maxRunsPerMonth is 0"),
    ],
)
def test_an_alarm_alone_trains_nothing(feedback: FeedbackReport, effect: float, spec: dict[str, object], reason: str, message: str) -> None:
    world = alarmed(feedback, effect, **spec)
    world.settle()
    assert world.condition("DriftDetected") == ("True", "DriftAlarm")
    assert world.condition("RetrainingNeeded") == ("True", reason)
    assert message in world.message("RetrainingNeeded")
    assert world.status["retraining"]["blockedBy"] == reason
    assert world.status["retraining"]["episode"] == 0
    assert all(manifest["kind"] == "Secret" for manifest in world.created)


def test_the_job_is_counted_in_one_pass_and_made_in_the_next() -> None:
    world = alarmed()
    first = world.step()
    assert first.create == ()
    assert first.requeue_after == 0.0
    counted = world.status["retraining"]
    assert (counted["episode"], counted["runsThisMonth"], counted["month"], counted["lastTrigger"]) == (1, 1, "2026-01", "Drift")
    second = world.step()
    assert [manifest["metadata"]["name"] for manifest in second.create] == [counted["lastJob"]]
    assert world.status["retraining"]["episode"] == 1


def test_the_same_job_is_asked_for_until_it_is_seen() -> None:
    world = alarmed()
    world.step()
    made = [world.step().create for _ in range(3)]
    assert made[0] == made[1] == made[2] != ()
    world.jobs.append(make_job(world.status["retraining"]["lastJob"]))
    assert world.step().create == ()
    assert world.status["retraining"]["lastJobUid"] == "job-uid"


def test_a_counted_job_is_made_even_if_the_evidence_is_gone_by_then() -> None:
    world = alarmed()
    world.step()
    world.gateway_answers = False
    assert len(world.step().create) == 1


def test_a_job_that_somebody_deleted_is_not_made_again() -> None:
    world = retraining(alarmed())
    world.jobs.clear()
    assert world.step().create == ()
    assert world.condition("RetrainingNeeded") == ("True", "RetrainingFailed")
    assert "was deleted" in world.message("RetrainingNeeded")


def test_the_jobs_name_follows_from_deployment_and_episode_and_fits() -> None:
    long, short = alarmed(), alarmed()
    long.name = "a" * 52
    long.objects, long.status = {}, {}
    long.drift = None
    long.settle()
    long.drift = alarm()
    long.step()
    short.step()
    names = {long.status["retraining"]["lastJob"], short.status["retraining"]["lastJob"]}
    assert all(len(name) <= 52 for name in names)
    assert len(names) == 2


def test_manual_approval_makes_a_suspended_job() -> None:
    world = alarmed(approval="Manual")
    world.step()
    job = world.step().create[0]
    assert job["spec"]["runPolicy"] == {"maxRestarts": 1, "suspend": True}
    made = make_job(job["metadata"]["name"])
    world.jobs.append(made.model_copy(update={"spec": FineTuneJobSpec.model_validate(job["spec"])}))
    world.step()
    assert world.condition("RetrainingNeeded") == ("True", "AwaitingApproval")
    assert "runPolicy.suspend to false" in world.message("RetrainingNeeded")


def test_a_refused_job_is_told_with_the_api_servers_words_and_made_once_it_is_taken() -> None:
    world = alarmed()
    world.step()
    name = world.status["retraining"]["lastJob"]
    world.refusals = (Refusal(Key("FineTuneJob", "shop", name), "spec.data.train: Invalid value", 1),)
    assert [manifest["metadata"]["name"] for manifest in world.step().create] == [name]
    assert world.condition("RetrainingNeeded") == ("True", "Refused")
    assert "spec.data.train: Invalid value" in world.message("RetrainingNeeded")
    assert world.condition("Ready") == ("True", "Serving"), "what serves is not concerned"


def test_a_job_that_could_not_be_read_is_told_before_it_is_counted() -> None:
    world = alarmed(template={"spec": {"training": {"maxSteps": "many"}}})
    world.settle()
    assert world.condition("RetrainingNeeded") == ("True", "NoTemplate")
    assert "training.maxSteps: " in world.message("RetrainingNeeded")
    assert world.status["retraining"]["blockedBy"] == "NoTemplate"
    assert (world.status["retraining"]["episode"], world.status["retraining"].get("runsThisMonth", 0)) == (0, 0)


# --- what is trained ---------------------------------------------------------


def job_spec(world: World) -> dict[str, object]:
    world.step()
    spec: dict[str, object] = world.step().create[0]["spec"]
    return spec


def test_the_job_is_the_served_versions_own_on_half_old_and_half_new_data() -> None:
    world = alarmed()
    spec = job_spec(world)
    assert spec == {
        "baseModel": {"uri": "pvc://models/base"},
        "method": LINEAGE_SPEC["method"],
        "training": {"maxSteps": 12},
        "data": {
            "train": [
                LINEAGE_SPEC["data"]["train"][0] | {"weight": "0.5"},
                {
                    "feedback": {"deployment": "tweets", "epoch": "0"},
                    "columns": {"text": "text", "label": "label", "document": "document"},
                    "template": LINEAGE_SPEC["data"]["train"][0]["template"],
                    "weight": "0.5",
                },
            ]
        },
        "evaluation": {
            "suites": [
                LINEAGE_SPEC["evaluation"]["suites"][0] | {"name": "old", "metrics": ["Accuracy"]},
                {
                    "name": "new",
                    "type": "Dataset",
                    "dataset": {
                        "feedback": {"deployment": "tweets", "epoch": "0"},
                        "columns": {"text": "text", "label": "label", "document": "document"},
                        "template": LINEAGE_SPEC["data"]["train"][0]["template"],
                        "labels": ["good", "bad"],
                    },
                    "metrics": ["Accuracy"],
                },
            ],
            "gates": [
                {"suite": "old", "metric": "Accuracy", "rule": "NonInferior", "minItems": 300},
                {"suite": "new", "metric": "Accuracy", "rule": "Superior", "minItems": 300},
            ],
            "baseline": {"type": "ModelVersion", "name": "sentiment-v1"},
        },
        "output": {"model": "sentiment", "store": {"uri": "pvc://models/store"}, "format": "Merged"},
        "runPolicy": {"maxRestarts": 1, "suspend": False},
    }
    FineTuneJobSpec.model_validate(spec)


def test_the_job_is_labelled_and_has_no_owner() -> None:
    world = alarmed()
    world.step()
    metadata = world.step().create[0]["metadata"]
    assert metadata["ownerReferences"] == []
    assert metadata["labels"]["tuneloop.dev/modeldeployment"] == "tweets"
    assert metadata["labels"]["tuneloop.dev/episode"] == "1"


def test_weights_of_several_old_sources_keep_their_ratio() -> None:
    world = alarmed()
    old = LINEAGE_SPEC["data"]["train"][0]
    lineage = LINEAGE_SPEC | {"data": {"train": [old | {"weight": "1"}, old | {"weight": "3"}]}}
    world.versions = [with_lineage(1, lineage)]
    train = job_spec(world)["data"]["train"]  # type: ignore[index]
    assert [source["weight"] for source in train] == ["0.125", "0.375", "0.5"]


def with_lineage(number: int, spec: dict[str, object]) -> object:
    version = make_version(number)
    assert version.spec.lineage is not None
    lineage = version.spec.lineage.model_copy(update={"spec": spec})
    return version.model_copy(update={"spec": version.spec.model_copy(update={"lineage": lineage})})


def test_a_retrained_model_is_retrained_from_its_original_data_and_suite() -> None:
    first = alarmed()
    spec = job_spec(first)
    world = alarmed()
    world.versions = [with_lineage(1, spec)]
    again = job_spec(world)
    assert again["data"] == spec["data"]
    assert again["evaluation"]["suites"] == spec["evaluation"]["suites"]  # type: ignore[index]
    assert again["evaluation"]["gates"] == spec["evaluation"]["gates"]  # type: ignore[index]


def test_what_an_earlier_epoch_taught_stays_in_the_old_half() -> None:
    first = job_spec(alarmed())
    world = alarmed()
    world.versions = [with_lineage(1, first)]  # type: ignore[list-item]
    world.annotations = {names.REARM_ANNOTATION: "1"}  # another epoch
    world.settle()
    world.drift = alarm(epoch="1")
    spec = job_spec(world)
    old = first["data"]["train"]  # type: ignore[index]
    train = spec["data"]["train"]  # type: ignore[index]
    assert [source.get("feedback") for source in train] == [
        None,
        {"deployment": "tweets", "epoch": "0"},
        {"deployment": "tweets", "epoch": "1"},
    ]
    assert [source["weight"] for source in train] == ["0.25", "0.25", "0.5"]
    assert train[1]["template"] == old[1]["template"]
    assert spec["evaluation"]["suites"][1]["dataset"]["feedback"] == {"deployment": "tweets", "epoch": "1"}  # type: ignore[index]


def test_the_template_is_laid_over_what_is_derived_but_not_over_the_baseline() -> None:
    gates = [{"suite": "old", "rule": "NonInferior", "minItems": 200}, {"suite": "new", "rule": "Superior", "minItems": 150}]
    template = {"training": {"maxSteps": 40}, "evaluation": {"gates": gates, "baseline": {"type": "Base"}}, "output": {"model": "other"}}
    world = alarmed(template={"spec": template})
    spec = job_spec(world)
    assert spec["training"] == {"maxSteps": 40}
    assert spec["evaluation"]["gates"] == gates  # type: ignore[index]
    assert spec["evaluation"]["baseline"] == {"type": "ModelVersion", "name": "sentiment-v1"}  # type: ignore[index]
    assert spec["output"]["model"] == "sentiment"  # type: ignore[index]


def test_the_templates_gates_say_how_many_labels_are_needed() -> None:
    gates = [{"suite": "old", "rule": "NonInferior"}, {"suite": "new", "rule": "Superior", "minItems": 320}]
    world = alarmed(template={"spec": {"evaluation": {"gates": gates}}})
    world.settle()
    assert "310 of 320 labelled items" in world.message("RetrainingNeeded")


def test_a_model_trained_elsewhere_needs_a_template() -> None:
    world = alarmed()
    world.versions = [make_version(1, lineage=None)]
    world.settle()
    assert world.condition("RetrainingNeeded") == ("True", "NoTemplate")
    assert world.message("RetrainingNeeded") == (
        "The served version was trained elsewhere and has no lineage: set data, evaluation, output in retraining.template.spec."
    )
    template = {key: LINEAGE_SPEC[key] for key in ("data", "evaluation", "output")}
    world.spec = world.spec | {"retraining": world.spec["retraining"] | {"template": {"spec": template}}}
    assert job_spec(world)["baseModel"] == {"uri": "pvc://models/base"}


def test_a_model_without_a_gate_needs_one_in_the_template() -> None:
    world = alarmed()
    world.versions = [with_lineage(1, LINEAGE_SPEC | {"evaluation": {"suites": [{"name": "split", "type": "Validation"}]}})]  # type: ignore[list-item]
    world.settle()
    assert world.condition("RetrainingNeeded") == ("True", "NoTemplate")


@pytest.mark.parametrize("objective", ["DPO", "KTO", "Pretraining"])
def test_a_model_that_does_not_learn_from_corrections_needs_rows_in_the_template(objective: str) -> None:
    world = alarmed()
    lineage = LINEAGE_SPEC | {"objective": {"type": objective, objective.lower(): {}}}
    world.versions = [with_lineage(1, lineage)]  # type: ignore[list-item]
    world.settle()
    assert world.condition("RetrainingNeeded") == ("True", "NoTemplate")
    assert world.message("RetrainingNeeded") == (
        f"{objective} does not learn from labels and corrections: set objective, data and evaluation in retraining.template.spec."
    )
    world.spec = world.spec | {"retraining": world.spec["retraining"] | {"template": {"spec": {"objective": {"type": "SFT"}}}}}
    assert job_spec(world)["objective"] == {"type": "SFT"}, "the settings of the other objective do not stay"


# --- how it ends -------------------------------------------------------------


@pytest.mark.parametrize(("reason", "said"), [("GateFailed", "GateFailed"), ("GateInconclusive", "GateFailed")])
def test_a_failed_gate_is_told_until_the_cooldown_is_over(reason: str, said: str) -> None:
    world = retraining(alarmed())
    name = world.status["retraining"]["lastJob"]
    world.jobs = [make_job(name, succeeded="True", reason=reason)]
    world.step()
    assert world.condition("RetrainingNeeded") == ("True", said)
    assert name in world.message("RetrainingNeeded")
    assert "after 2026-01-15T13:00:" in world.message("RetrainingNeeded")
    world.feedback = FeedbackReport(labelled_train=251, labelled_gate=310)
    world.step(seconds=3600)
    assert world.status["retraining"]["episode"] == 2
    assert world.status["retraining"]["runsThisMonth"] == 2
    assert world.status["retraining"]["lastJob"] != name
    assert [manifest["metadata"]["name"] for manifest in world.step().create] == [world.status["retraining"]["lastJob"]]


def test_a_failed_job_is_told_with_its_sentence() -> None:
    world = retraining(alarmed())
    world.jobs = [make_job(world.status["retraining"]["lastJob"], succeeded="False", reason="OutOfMemory", phase="Failed")]
    world.step()
    assert world.condition("RetrainingNeeded") == ("True", "RetrainingFailed")
    assert "failed: Numbers." in world.message("RetrainingNeeded")


def test_the_better_model_takes_over_and_the_detector_starts_afresh_on_what_came_since_the_alarm() -> None:
    world = retraining(alarmed())
    name = world.status["retraining"]["lastJob"]
    world.jobs = [make_job(name, succeeded="True", reason="GatePassed", modelVersion=2)]
    world.versions.append(make_version(2))
    world.step()
    assert world.message("RetrainingNeeded") == f"Version 2 of FineTuneJob {name} passed its gates and is being rolled out."
    for _ in range(4):
        world.step()
    config = world.config
    assert world.weights()[2] == 100
    assert config.drift is not None
    assert (config.drift.epoch, config.drift.seed) == ("1", "SinceAlarm")
    world.drift = DriftReport(status=DriftStatus.COLLECTING, epoch="1")
    world.settle()
    assert world.condition("DriftDetected") == ("Unknown", "CollectingReference")
    assert world.condition("RetrainingNeeded") == ("False", "NotNeeded")
    assert world.status["retraining"]["epoch"] == 1
    assert "drift" not in world.status or world.status["drift"]["logEvidence"] == "0"


def test_a_later_alarm_waits_for_the_cooldown() -> None:
    world = retraining(alarmed())
    world.jobs = [make_job(world.status["retraining"]["lastJob"], succeeded="True", reason="GatePassed", modelVersion=2)]
    world.versions.append(make_version(2))
    for _ in range(6):
        world.step()
    world.drift = alarm(epoch="1")
    world.settle()
    assert world.condition("RetrainingNeeded") == ("True", "Cooldown")
    world.step(seconds=3600)
    assert world.status["retraining"]["episode"] == 2


def test_an_approved_version_that_was_rejected_here_is_told() -> None:
    world = retraining(alarmed())
    world.jobs = [make_job(world.status["retraining"]["lastJob"], succeeded="True", reason="GatePassed", modelVersion=2)]
    world.versions.append(make_version(2))
    world.probe = world.probe.model_copy(update={"agreed": 1})
    world.settle()
    assert world.condition("RetrainingNeeded") == ("True", "RetrainingFailed")
    assert "was rejected here (ServingMismatch)" in world.message("RetrainingNeeded")


@pytest.mark.parametrize(("approval", "reason"), [("Pending", "AwaitingApproval"), ("Rejected", "RetrainingFailed")])
def test_the_new_versions_approval_decides(approval: str, reason: str) -> None:
    world = retraining(alarmed())
    world.jobs = [make_job(world.status["retraining"]["lastJob"], succeeded="True", reason="GatePassed", modelVersion=2)]
    world.versions.append(make_version(2, approval=approval))
    world.settle()
    assert world.condition("RetrainingNeeded") == ("True", reason)


def test_a_pin_keeps_the_new_version_out() -> None:
    world = alarmed()
    world.spec = world.spec | {"model": {"name": "sentiment", "version": 1}}
    retraining(world)
    world.jobs = [make_job(world.status["retraining"]["lastJob"], succeeded="True", reason="GatePassed", modelVersion=2)]
    world.versions.append(make_version(2))
    world.settle()
    assert world.condition("RetrainingNeeded") == ("True", "AwaitingApproval")
    assert "spec.model.version is 1" in world.message("RetrainingNeeded")


def test_a_stalled_job_is_told_and_no_other_is_made() -> None:
    world = retraining(alarmed())
    job = make_job(world.status["retraining"]["lastJob"])
    stalled = {"type": "Stalled", "status": "True", "reason": "DataInvalid", "message": "No column label."}
    world.jobs = [type(job).model_validate(job.model_dump() | {"status": {"conditions": [stalled]}})]
    decision = world.step(seconds=10_000)
    assert world.message("RetrainingNeeded").endswith("is stalled (DataInvalid): No column label.")
    assert decision.create == ()
    assert world.status["retraining"]["episode"] == 1


def test_the_budget_starts_again_with_the_month() -> None:
    world = alarmed(cooldownSeconds=0, maxRunsPerMonth=2)
    for episode in (1, 2):
        world.step()
        world.step()
        world.jobs = [make_job(world.status["retraining"]["lastJob"], succeeded="True", reason="GateFailed", uid=f"uid-{episode}")]
        world.feedback = FeedbackReport(labelled_train=250 + episode, labelled_gate=310)
    world.settle()
    assert world.condition("RetrainingNeeded") == ("True", "BudgetExhausted")
    until = next_look(world.step())
    assert until <= 5.0
    world.now = datetime(2026, 2, 1, tzinfo=NOW.tzinfo)
    world.step()
    assert (world.status["retraining"]["runsThisMonth"], world.status["retraining"]["month"]) == (1, "2026-02")


def next_look(decision: Decision) -> float:
    assert decision.requeue_after is not None
    return decision.requeue_after


# --- evidence ----------------------------------------------------------------


def test_the_alarm_stands_while_nobody_answers() -> None:
    world = alarmed(FeedbackReport())
    world.step()
    since = next(c["lastTransitionTime"] for c in world.status["conditions"] if c["type"] == "DriftDetected")
    world.gateway_answers = False
    world.step(seconds=500)
    assert world.condition("DriftDetected") == ("True", "DriftAlarm")
    assert world.condition("RetrainingNeeded") == ("True", "NoData")
    assert next(c["lastTransitionTime"] for c in world.status["conditions"] if c["type"] == "DriftDetected") == since


def test_prometheus_is_believed_where_it_is_asked() -> None:
    world = alarmed(ENOUGH)
    world.settle()
    (spoken,) = [world.status["drift"]]
    quiet = World(spec=RETRAINED, reads_prometheus=True)
    quiet.drift, quiet.feedback = alarm(), ENOUGH
    quiet.settle()
    assert quiet.condition("DriftDetected") == ("Unknown", "NoData")
    quiet.prometheus = Evidence(True, False, False, 15.2, 11.5, 0.3, 321, 250, 10)
    quiet.step()
    assert quiet.condition("RetrainingNeeded") == ("True", "NeedsLabels")
    assert quiet.status["drift"] == spoken
    assert quiet.status["feedback"]["gate"] == 310


def test_no_data_is_never_drift() -> None:
    world = World(spec=RETRAINED)
    world.gateway_answers = False
    world.settle()
    assert world.condition("DriftDetected") == ("Unknown", "NoData")
    assert world.condition("RetrainingNeeded") == ("Unknown", "NoData")


@pytest.mark.parametrize(
    ("status", "condition"),
    [
        (DriftStatus.COLLECTING, ("Unknown", "CollectingReference")),
        (DriftStatus.OFF, ("Unknown", "CollectingReference")),
        (DriftStatus.EXHAUSTED, ("Unknown", "ReferenceExhausted")),
        (DriftStatus.MONITORING, ("False", "NoDrift")),
        (DriftStatus.ALARM, ("True", "DriftAlarm")),
    ],
)
def test_what_the_detector_says(status: DriftStatus, condition: tuple[str, str]) -> None:
    world = World(spec=RETRAINED)
    world.settle()
    world.drift = DriftReport(status=status, epoch="0")
    world.step()
    assert world.condition("DriftDetected") == condition


def test_evidence_of_an_epoch_that_is_over_is_not_believed() -> None:
    world = World(spec=RETRAINED, annotations={})
    world.settle()
    world.drift = alarm(epoch="7")
    world.step()
    assert world.condition("DriftDetected") == ("Unknown", "NoData")


def test_an_alarm_is_re_armed_by_the_annotation_once() -> None:
    world = alarmed(FeedbackReport())
    world.settle()
    world.annotations = {"tuneloop.dev/rearm": "looked at it"}
    world.step()
    config = world.config
    assert config.drift is not None
    assert (config.drift.epoch, config.drift.seed) == ("1", "Fresh")
    assert world.condition("DriftDetected") == ("Unknown", "CollectingReference")
    world.drift = None
    world.settle()
    assert world.config.drift.epoch == "1"  # type: ignore[union-attr]


def test_an_annotation_from_the_beginning_is_no_wish() -> None:
    world = World(spec=RETRAINED, annotations={"tuneloop.dev/rearm": "x"})
    world.settle()
    assert world.config.drift.epoch == "0"  # type: ignore[union-attr]


def test_a_new_version_without_an_alarm_keeps_the_reference() -> None:
    world = World(spec=RETRAINED)
    world.settle()
    world.versions.append(make_version(2))
    world.settle()
    assert world.weights()[2] == 100
    assert world.config.drift.epoch == "0"  # type: ignore[union-attr]


def test_a_crash_between_promotion_and_configuration_still_starts_the_new_epoch() -> None:
    world = alarmed(FeedbackReport())
    world.settle()
    world.versions.append(make_version(2))
    world.step()
    world.step()
    before = dict(world.objects)
    world.step()  # promotes
    assert world.config.drift.epoch == "1"  # type: ignore[union-attr]
    for key, manifest in before.items():
        if key[0] != "ControllerRevision":
            world.objects[key] = manifest  # only the record was written
    world.apply_config()
    world.step()
    assert (world.config.drift.epoch, world.config.drift.seed) == ("1", "SinceAlarm")  # type: ignore[union-attr]


def test_nothing_is_sampled_before_a_version_takes_full_traffic() -> None:
    world = World(spec=RETRAINED)
    world.step()
    assert world.config.drift.collect is False  # type: ignore[union-attr]
    world.settle()
    assert world.config.drift.collect is True  # type: ignore[union-attr]


def test_traffic_alone_does_not_write_the_status() -> None:
    world = World(spec=RETRAINED)
    world.settle()
    world.drift = DriftReport(status=DriftStatus.MONITORING, epoch="0", pairs=1201, log_evidence=0.51, effect=0.011)
    world.step()
    before = world.status
    world.drift = DriftReport(status=DriftStatus.MONITORING, epoch="0", pairs=1250, log_evidence=0.72, effect=0.012)
    world.step(seconds=5)
    assert world.status == before


def test_the_time_of_the_next_attempt_is_when_the_operator_looks_again() -> None:
    world = alarmed(cooldownSeconds=60)
    retraining(world)
    world.jobs = [make_job(world.status["retraining"]["lastJob"], succeeded="True", reason="GateFailed")]
    world.feedback = FeedbackReport(labelled_train=251, labelled_gate=310)
    assert next_look(world.step()) <= 5.0
    world.now += timedelta(seconds=57)
    assert next_look(world.step()) <= 3.0


# --- an alarm outlives its gateway -------------------------------------------


def test_an_alarm_stands_while_a_gateway_has_not_read_its_database() -> None:
    world = alarmed()
    world.settle()
    world.drift_is_read = False
    world.settle()
    assert world.condition("DriftDetected") == ("True", "DriftAlarm")
    assert world.condition("RetrainingNeeded") == ("True", "Retraining")
    assert world.status["drift"]["detectedAt"] == "2026-01-15T12:30:00Z"


def test_a_version_that_takes_over_meanwhile_starts_the_next_epoch_and_is_not_followed_by_a_second_retraining() -> None:
    world = retraining(alarmed())
    world.jobs = [make_job(world.status["retraining"]["lastJob"], succeeded="True", reason="GatePassed", modelVersion=2)]
    world.drift_is_read = False
    world.versions.append(make_version(2))
    for _ in range(6):
        world.step()
    assert world.weights()[2] == 100
    assert world.config.drift is not None
    assert world.config.drift.epoch == "1"
    world.drift_is_read = True  # and what it has read is of the epoch before
    world.step(seconds=7200)
    assert world.status["retraining"]["episode"] == 1


# --- which rows are new ------------------------------------------------------


def test_a_failed_gate_is_not_tried_again_with_the_same_rows() -> None:
    world = retraining(alarmed())
    name = world.status["retraining"]["lastJob"]
    world.jobs = [make_job(name, succeeded="True", reason="GateFailed")]
    world.step(seconds=7200)
    assert world.condition("RetrainingNeeded") == ("True", "CollectingData")
    assert world.message("RetrainingNeeded").startswith(f"FineTuneJob {name} did not pass its gates with the same 250 curated rows.")
    assert (world.status["retraining"]["episode"], world.status["retraining"]["blockedBy"]) == (1, "CollectingData")
    world.feedback = FeedbackReport(labelled_train=251, labelled_gate=310)
    world.step()
    assert world.status["retraining"]["episode"] == 2


def test_a_job_that_failed_by_accident_is_tried_again_with_the_same_rows() -> None:
    world = retraining(alarmed())
    world.jobs = [make_job(world.status["retraining"]["lastJob"], succeeded="False", reason="OutOfMemory", phase="Failed")]
    world.step(seconds=7200)
    assert world.status["retraining"]["episode"] == 2


def test_rows_from_before_a_version_that_took_over_without_an_alarm_are_not_new() -> None:
    world = World(spec=RETRAINED, feedback=FeedbackReport(labelled_train=240, labelled_gate=400))
    world.settle()
    world.versions.append(make_version(2))
    world.settle()
    assert world.weights()[2] == 100
    assert world.status["retraining"]["promotedRows"] == 240
    world.drift, world.feedback = alarm(), FeedbackReport(labelled_train=250, labelled_gate=400)
    world.settle()
    assert world.condition("RetrainingNeeded") == ("True", "CollectingData")
    assert "10 of 200 curated rows" in world.message("RetrainingNeeded")


def test_an_epoch_begins_without_rows_that_were_used() -> None:
    world = retraining(alarmed())
    assert world.status["retraining"]["lastRows"] == 250
    world.jobs = [make_job(world.status["retraining"]["lastJob"], succeeded="True", reason="GatePassed", modelVersion=2)]
    world.versions.append(make_version(2))
    for _ in range(6):
        world.step()
    counted = world.status["retraining"]
    assert (counted["epoch"], counted["lastRows"], counted["promotedRows"]) == (1, 0, 0)
