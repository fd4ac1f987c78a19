"""A vLLM below the security floor is warned about or refused, with the remedy."""

from __future__ import annotations

import pytest
from tests.unit.modeldeployment.world import World, make_version

from tuneloop_operator.settings import Settings

REFUSING = Settings(vulnerable_engines="Refuse")


def served(**changes: object) -> World:
    world = World(**changes)  # type: ignore[arg-type]
    world.settle()
    return world


@pytest.mark.parametrize(
    ("told", "image", "reason"),
    [
        ("0.21.9", "vllm/vllm-openai:v0.32.0", "RuntimeVulnerable"),
        ("0.22.0", "vllm/vllm-openai:v0.19.0", "Healthy"),
        ("0.22.0rc1", "x", "RuntimeVulnerable"),
        ("0.22.1.dev3+g1", "x", "Healthy"),
        ("1.0", "x", "Healthy"),
        ("main", "x", "Healthy"),
        ("", "vllm/vllm-openai:v0.19.0", "RuntimeVulnerable"),
        ("", "mirror.example:5000/vllm-openai-cpu:0.9.1@sha256:" + "0" * 64, "RuntimeVulnerable"),
        ("", "vllm/vllm-openai:latest", "Healthy"),
        ("", "team/engine:0.1.0", "Healthy"),
    ],
)
def test_an_engine_below_the_floor_is_told_by_itself_or_by_the_tag_of_vllms_image(told: str, image: str, reason: str) -> None:
    world = served(engine_versions={1: told}, spec={"engine": {"image": image}})
    assert world.condition("Degraded") == (str(reason != "Healthy"), reason)
    assert world.condition("Ready") == ("True", "Serving")


def test_the_warning_says_what_to_do_and_stays_when_no_gateway_answers() -> None:
    world = served(engine_versions={1: "0.21.9"}, spec={"engine": {"image": "team/engine:7"}})
    assert world.message("Degraded") == (
        "The engine of version 1 is vLLM 0.21.9, below 0.22.0: flaws that are known and mended since let requests past its key, or stop it."
        " Set spec.engine.image to a newer one than team/engine:7 (or the operator's images.engine, and take spec.engine.image out)."
    )
    world.gateway_answers = False
    world.settle()
    assert world.condition("Degraded") == ("True", "RuntimeVulnerable")


def test_a_floor_of_ones_own_is_the_one_that_counts() -> None:
    world = served(engine_versions={1: "0.32.0"}, settings=Settings(engine_version_floor="0.33"))
    assert world.condition("Degraded") == ("True", "RuntimeVulnerable")


def test_refused_no_engine_is_made_of_a_tag_below_the_floor() -> None:
    world = served(settings=REFUSING, spec={"engine": {"image": "vllm/vllm-openai:v0.19.1"}})
    assert world.engines() == []
    assert world.condition("Stalled") == ("True", "RuntimeVulnerable")
    world.spec, world.generation = {}, 2
    world.settle()
    assert world.condition("Ready") == ("True", "Serving")


def test_refused_a_revision_whose_engine_tells_of_one_is_rejected_and_the_one_before_serves_on() -> None:
    world = served(settings=REFUSING, engine_versions={1: "0.32.0", 2: "0.19.1"})
    world.versions.append(make_version(2))
    world.settle()
    assert world.outcomes() == {1: "Promoted", 2: "Rejected"}
    assert world.weights() == {1: 100}
    assert world.condition("Ready") == ("True", "RolledBack")
    assert "vLLM 0.19.1, below 0.22.0" in world.message("Ready")


def test_what_serves_already_serves_on_where_the_floor_rises() -> None:
    world = served(engine_versions={1: "0.32.0"})
    world.settings = Settings(engine_version_floor="0.40.0", vulnerable_engines="Refuse")
    world.settle()
    assert world.condition("Ready") == ("True", "Serving")
    assert world.condition("Degraded") == ("True", "RuntimeVulnerable")
