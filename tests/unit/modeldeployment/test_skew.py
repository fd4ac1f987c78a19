"""Live inputs that are unlike those of the training are told, and nothing is retrained for them."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.modeldeployment.world import MONITORED, RETRAINED, World, make_version

from tuneloop_gateway.contract import SkewReport

SAMPLE = {"referenceUri": "pvc://models/runs/1/reference.json"}
DIFFER = SkewReport(version=1, status="Differ", log_evidence=14.0, log_threshold=11.5, effect=0.3, pairs=400, reference_rows=1000)


def served(spec: Any = MONITORED, skew: SkewReport | None = None, **version: Any) -> World:
    world = World(spec=spec, versions=[make_version(1, **(SAMPLE | version))], skew=skew)
    world.settle()
    return world


@pytest.mark.parametrize(
    ("world", "says"),
    [
        (lambda: served({}), ("Unknown", "NotMonitored")),
        (lambda: served(referenceUri=None), ("Unknown", "NoReference")),
        (lambda: served(), ("Unknown", "NoData")),
        (lambda: served(skew=DIFFER.model_copy(update={"status": "Comparing"})), ("Unknown", "Comparing")),
        (lambda: served(skew=DIFFER), ("True", "InputsDiffer")),
        (lambda: served(skew=DIFFER.model_copy(update={"effect": 0.05})), ("False", "InputsAlike")),
        (lambda: served(skew=DIFFER.model_copy(update={"status": "Alike"})), ("False", "InputsAlike")),
        (lambda: served(skew=DIFFER.model_copy(update={"version": 2})), ("Unknown", "NoData")),
    ],
)
def test_the_condition_says_what_was_found_of_the_version_that_serves(world: Any, says: tuple[str, str]) -> None:
    assert world().condition("TrainingServingSkew") == says


def test_the_engine_hands_the_sample_out_and_the_gateway_is_told_so() -> None:
    world = served()
    assert world.config.revisions[0].reference
    container = world.objects["Deployment", f"tweets-{world.engine_of(1)}"]["spec"]["template"]["spec"]["containers"][0]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert variables["TUNELOOP_REFERENCE_FILE"] == "/volumes/models/runs/1/reference.json"
    assert not served(referenceUri=None).config.revisions[0].reference


def test_what_was_found_stands_while_no_gateway_answers_and_not_for_another_version() -> None:
    world = served(skew=DIFFER)
    world.gateway_answers = False
    world.settle()
    assert world.condition("TrainingServingSkew") == ("True", "InputsDiffer")
    world.gateway_answers = True
    world.versions.append(make_version(2, **SAMPLE))
    world.settle()
    assert world.status["stable"]["version"] == 2
    assert world.condition("TrainingServingSkew") == ("Unknown", "NoData")


def test_inputs_unlike_those_of_the_training_are_told_and_retrain_nothing() -> None:
    world = served(RETRAINED)
    world.skew = DIFFER
    decision = world.step()
    assert [(event.type, event.reason) for event in decision.events] == [("Warning", "InputsDiffer")]
    world.settle()
    assert "train on rows like them" in world.message("TrainingServingSkew")
    assert world.condition("DriftDetected") == ("False", "NoDrift")
    assert world.condition("RetrainingNeeded") == ("False", "NotNeeded")
    assert world.condition("Degraded") == ("False", "Healthy")
    assert not [manifest for manifest in world.created if manifest["kind"] == "FineTuneJob"]
