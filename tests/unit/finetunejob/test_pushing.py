"""A model is copied to the places of output.push after its evaluation; credentials come as files, to that stage alone."""

from __future__ import annotations

from typing import Any

from tests.unit.finetunejob.builders import World, evaluated, failed, make_job, make_spec

from tuneloop_trainer.contract import Reason, Stage

TARGETS = [
    {"uri": "oci://registry.test/team/sentiment:v1", "secretRef": {"name": "registry-login"}},
    {"uri": "s3://models/sentiment", "secretRef": {"name": "bucket-keys"}},
    {"uri": "oci://registry.default.svc:5000/sentiment", "plainHttp": True},
]
DIGESTS = tuple(f"sha256:{number}" + "0" * 63 for number in range(3))


def make_world() -> World:
    output = {"model": "sentiment", "store": {"uri": "pvc://models"}, "push": TARGETS}
    return World(job=make_job(make_spec(output=output)))


def secrets_of(world: World) -> dict[str, str]:
    """Mount path -> Secret, of the current stage's pod."""
    pod = world.current().manifest["spec"]["template"]["spec"]
    named = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    mounts = pod["containers"][0]["volumeMounts"]
    return {mount["mountPath"]: named[mount["name"]] for mount in mounts if mount["name"] in named}


def test_only_the_evaluating_stage_sees_the_secrets_as_files() -> None:
    for stage in Stage:
        world = make_world().up_to(stage)
        wanted = {"/etc/tuneloop/push/0": "registry-login", "/etc/tuneloop/push/1": "bucket-keys"} if stage is Stage.EVALUATE else {}
        assert secrets_of(world) == wanted
        container = world.current().manifest["spec"]["template"]["spec"]["containers"][0]
        assert "registry-login" not in str(container["env"]) + str(container["args"])


def test_the_configuration_names_places_and_folders_and_no_secret() -> None:
    world = make_world().up_to(Stage.EVALUATE)
    told: list[dict[str, Any]] = world.config(world.current())["push"]
    assert [target["uri"] for target in told] == [target["uri"] for target in TARGETS]
    assert [target["credentials"] for target in told] == ["/etc/tuneloop/push/0", "/etc/tuneloop/push/1", None]
    assert [target["plainHttp"] for target in told] == [False, False, True]
    assert "registry-login" not in str(told)


def test_the_status_tells_each_place_and_its_digest() -> None:
    world = make_world().up_to(Stage.EVALUATE)
    said = evaluated()
    assert said.evaluate is not None
    world.ends(said.model_copy(update={"evaluate": said.evaluate.model_copy(update={"pushed": DIGESTS})}))
    world.settle()
    assert [(copy.uri, copy.digest) for copy in world.job.status.pushed] == [
        (str(target["uri"]), digest) for target, digest in zip(TARGETS, DIGESTS, strict=True)
    ]
    assert world.condition("Succeeded") == ("True", "Completed")


def test_a_rejected_model_was_pushed_nowhere() -> None:
    world = make_world().up_to(Stage.EVALUATE)
    world.ends(evaluated("Fail"))
    world.settle()
    assert world.job.status.pushed == ()


def test_a_refusing_registry_is_the_users_to_change() -> None:
    world = make_world().up_to(Stage.EVALUATE)
    world.ends(failed(Stage.EVALUATE, 10, Reason.ACCESS_DENIED, "Registry registry.test/team/sentiment denies access (status 403)."))
    world.settle()
    assert world.condition("Succeeded") == ("False", "AccessDenied")
    assert "denies access" in world.message()


def test_a_registry_that_is_away_is_tried_again() -> None:
    world = make_world().up_to(Stage.EVALUATE)
    world.ends(failed(Stage.EVALUATE, 69, Reason.STORE_UNAVAILABLE, "Registry registry.test is not available."))
    world.settle()
    world.wait(60)
    world.settle()
    assert (world.current().stage, world.current().number) == (Stage.EVALUATE, 2)
