"""The manifests of a deployment's children; whole, as golden files, and where it matters most, by what they must say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.modeldeployment.world import DIGEST, LINEAGE_SPEC, World, digest, make_adapter, make_version

from tuneloop_gateway import engine_guard
from tuneloop_gateway.contract import GatewayConfig, Tracing
from tuneloop_operator.api.engineoptions import ENGINE_OPTIONS, option_arguments, option_problem
from tuneloop_operator.domain.modeldeployment.revisions import engine_hash, revision_name
from tuneloop_operator.render.engine import claims_of, model_id
from tuneloop_operator.render.revisions import decoded, encoded
from tuneloop_operator.settings import Settings

GOLDEN = Path(__file__).parents[2] / "golden" / "modeldeployment"
ADAPTER = {"artifact": {"uri": "pvc://adapters/v1", "manifestDigest": DIGEST, "format": "Adapter", "sizeBytes": 5}}
FULL: dict[str, Any] = {
    "engine": {
        "image": "vllm:1",
        "replicas": 2,
        "acceleratorsPerReplica": 2,
        "maxModelLength": 512,
        "options": {"dtype": "bfloat16", "enforce-eager": "true", "enable-prefix-caching": "false"},
        "startupTimeoutSeconds": 600,
        "pod": {
            "nodeSelector": {"gpu": "a"},
            "labels": {"team": "x", "tuneloop.dev/engine": "mine"},
            "resources": {"limits": {"memory": "8Gi"}},
        },
    },
    "gateway": {
        "replicas": 2,
        "auth": {"apiKeys": {"secretRef": {"name": "api-keys"}}, "requestsPerMinute": 60, "tokensPerMinute": 9000},
        "capture": {
            "sampleRate": "0.5",
            "personalData": "Keep",
            "retentionDays": 7,
            "database": {"secretRef": {"name": "db", "key": "dsn"}},
        },
        "feedback": {"maxShareOfOneSubject": "0.1"},
        "tracing": {"endpoint": "https://traces.example/otlp", "sampleRate": "0.25"},
        "pod": {"tolerations": [{"key": "k", "operator": "Exists"}]},
    },
    "monitoring": {"drift": {"size": 500, "falseAlarmEveryRequests": 1000, "horizonDays": "2", "mixOverSeconds": 60}},
}


def smallest() -> World:
    return World(spec={"engine": {"acceleratorsPerReplica": 0}}, settings=Settings(engine_cpu_image="vllm-cpu:1"))


def fullest() -> World:
    return World(spec=FULL, gateways=2)


def adapters() -> World:
    """Version 1 served, version 2 takes its place on the same engine."""
    world = World(versions=[make_adapter(1)], settings=Settings(engine_image="vllm:1"))
    world.settle()
    world.versions.append(make_adapter(2))
    return world


def grouped() -> World:
    return World(spec={"engine": {"acceleratorsPerReplica": 8, "nodesPerReplica": 2, "replicas": 2}}, has_groups=True)


MADE = [("smallest", smallest), ("fullest", fullest), ("adapters", adapters), ("grouped", grouped)]


@pytest.mark.parametrize(("name", "make"), MADE)
def test_the_manifests_are_those_of_the_golden_file(name: str, make: Any) -> None:
    """UPDATE_GOLDEN=1 writes the files anew."""
    world = make()
    world.settle()
    shown = [_readable(manifest) for _, manifest in sorted(world.objects.items())]
    text = yaml.safe_dump_all(shown, width=140)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text


def _readable(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a record pins, readable: it must not change by chance either."""
    shown = json.loads(json.dumps(manifest))
    if shown["kind"] == "ControllerRevision":
        pinned = decoded(shown["data"])
        assert pinned is not None
        shown["data"]["pinned"] = pinned.model_dump(mode="json", by_alias=True, exclude={"template", "group"})
    return dict(shown)


def engine_of(world: World) -> dict[str, Any]:
    world.step()
    deployment = next(m for (kind, name), m in world.objects.items() if kind == "Deployment" and name != "tweets-gateway")
    return dict(deployment["spec"]["template"]["spec"])


def arguments(world: World) -> list[str]:
    return list(engine_of(world)["containers"][0]["args"])


def test_the_engine_of_an_adapter_serves_its_base_with_room_for_adapters_of_a_rank_that_vllm_takes() -> None:
    engine = engine_of(World(versions=[make_version(1, **ADAPTER)]))["containers"][0]
    assert engine["args"][:11] == [
        "--model", "/volumes/models/base", "--served-model-name", "sentiment-base", "--enable-lora", "--max-lora-rank", "16",
        "--max-loras", "2", "--max-cpu-loras", "4",
    ]  # fmt: skip
    assert not [argument for argument in engine["args"] if "/volumes/adapters" in argument]
    environment = {variable["name"]: variable.get("value") for variable in engine["env"]}
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert not {"TUNELOOP_PROBES_FILE", "TUNELOOP_REFERENCE_FILE"} & environment.keys()


def test_only_an_adapters_engine_may_load_while_it_runs() -> None:
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in {variable["name"] for variable in engine_of(World())["containers"][0]["env"]}


def test_versions_share_an_engine_unless_it_would_have_to_start_otherwise_for_one() -> None:
    deployment, first = World().deployment, make_adapter(1)
    shared = engine_hash(deployment, first)
    assert engine_hash(deployment, make_adapter(2)) == engine_hash(deployment, make_adapter(2, rank=9)) == shared
    others = {
        "a rank for which it has no room": make_adapter(2, rank=17),
        "files on a claim that is not mounted": make_adapter(2, uri="pvc://elsewhere/v2"),
        "another base": make_adapter(2, base={"source": {"uri": "pvc://models/other"}, "digest": DIGEST}),
        "another base in the same place": make_adapter(2, base={"source": {"uri": "pvc://models/base"}, "digest": digest(7)}),
    }
    assert [why for why, version in others.items() if engine_hash(deployment, version) == shared] == []
    assert engine_hash(World(spec={"engine": {"maxModelLength": 99}}).deployment, first) != shared
    assert engine_hash(World(spec={"engine": {"replicas": 7}}).deployment, first) == shared


def test_claims_are_named_in_one_order_in_every_process() -> None:
    base = {"source": {"uri": "pvc://a/base"}, "digest": DIGEST}
    assert claims_of(make_adapter(1, uri="pvc://d/v1", base=base, probesUri="pvc://c/p", referenceUri="pvc://b/r")) == ["a", "b", "c", "d"]


def test_other_bytes_of_an_adapter_have_another_name_in_the_engine_and_are_another_revision() -> None:
    deployment, first = World().deployment, make_adapter(1)
    artifact = first.spec.artifact.model_dump(by_alias=True)
    again = make_version(1, artifact=artifact | {"manifestDigest": DIGEST})
    assert (model_id(first), model_id(again)) == ("sentiment-v1-000000000000", "sentiment-v1-0123456789ab")
    assert revision_name(deployment, first) != revision_name(deployment, again)
    assert engine_hash(deployment, first) == engine_hash(deployment, again)


@pytest.mark.parametrize(("rank", "served"), [(1, "8"), (8, "8"), (9, "16"), (300, "320"), (512, "512")])
def test_the_rank_is_rounded_up(rank: int, served: str) -> None:
    lineage = {
        "fineTuneJob": "t",
        "fineTuneJobUid": "1",
        "configDigest": DIGEST,
        "spec": LINEAGE_SPEC | {"method": {"lora": {"rank": rank}}},
    }
    args = arguments(World(versions=[make_version(1, lineage=lineage, **ADAPTER)]))
    assert args[args.index("--max-lora-rank") + 1] == served


def test_a_version_that_names_its_rank_needs_no_lineage() -> None:
    artifact = ADAPTER["artifact"] | {"rank": 40}
    args = arguments(World(versions=[make_version(1, lineage=None, artifact=artifact)]))
    assert args[args.index("--max-lora-rank") + 1] == "64"


def test_a_record_that_corrects_the_rank_is_another_engine_of_the_same_bytes() -> None:
    wrong, right = (make_version(number, artifact=ADAPTER["artifact"] | {"rank": rank}) for number, rank in ((1, 8), (2, 40)))
    deployment = World().deployment
    assert engine_hash(deployment, wrong) != engine_hash(deployment, right)
    assert engine_hash(deployment, make_version(3, **ADAPTER)) == engine_hash(deployment, make_version(4, **ADAPTER))


def test_the_base_of_an_adapter_is_verified_before_the_engine_starts_and_the_store_is_mounted_to_be_read() -> None:
    spec = engine_of(World(versions=[make_version(1, **ADAPTER)]))
    assert spec["initContainers"][0]["command"][2:] == ["verify-base", "/volumes/models/base", DIGEST]
    mounted = {mount["mountPath"]: mount.get("readOnly") for mount in spec["containers"][0]["volumeMounts"]}
    assert (mounted["/volumes/adapters"], mounted["/volumes/models"]) == (True, True)


def test_a_base_whose_digest_nobody_knows_is_not_verified() -> None:
    assert "initContainers" not in engine_of(
        World(versions=[make_adapter(1, base={"source": {"uri": "hf://org/base", "revision": "abc"}})])
    )


def test_the_token_of_a_gated_base_reaches_the_engine_by_reference_alone() -> None:
    base = {"source": {"uri": "hf://org/base", "revision": "abc", "secretRef": {"name": "hf-token"}}, "digest": DIGEST}
    engine = engine_of(World(versions=[make_version(1, base=base, **ADAPTER)]))["containers"][0]
    token = next(variable for variable in engine["env"] if variable["name"] == "HF_TOKEN")
    assert token["valueFrom"] == {"secretKeyRef": {"name": "hf-token", "key": "token", "optional": False}}
    assert "value" not in token
    assert not any("token" in argument for argument in engine["args"])


def test_a_base_of_the_hub_is_read_where_the_training_kept_it() -> None:
    base = {"source": {"uri": "hf://org/base", "revision": "abc"}, "digest": DIGEST, "snapshotUri": "pvc://store/cache/bases/org--base@abc"}
    spec = engine_of(World(versions=[make_version(1, base=base, **ADAPTER)]))
    assert spec["containers"][0]["args"][:3] == ["--model", "/volumes/store/cache/bases/org--base@abc", "--served-model-name"]
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in spec["containers"][0]["env"]
    assert spec["initContainers"][0]["command"][-2:] == ["/volumes/store/cache/bases/org--base@abc", DIGEST]
    assert "/volumes/store" in {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}


def test_a_base_on_the_hub_is_pinned_to_its_commit_and_may_be_fetched() -> None:
    base = {"source": {"uri": "hf://org/base", "revision": "abc"}}
    spec = engine_of(World(versions=[make_version(1, base=base, **ADAPTER)]))
    assert spec["containers"][0]["args"][:4] == ["--model", "org/base", "--revision", "abc"]
    assert "HF_HUB_OFFLINE" not in {variable["name"] for variable in spec["containers"][0]["env"]}


@pytest.mark.parametrize(("devices", "eager", "is_off"), [(0, "true", True), (0, "false", False), (1, "true", False)])
def test_an_eager_engine_on_the_cpu_compiles_nothing_at_all(devices: int, eager: str, is_off: bool) -> None:
    spec = {"engine": {"acceleratorsPerReplica": devices, "options": {"enforce-eager": eager}}}
    names = {variable["name"] for variable in engine_of(World(spec=spec))["containers"][0]["env"]}
    assert ("TORCHDYNAMO_DISABLE" in names) is is_off


def test_the_model_is_verified_before_the_engine_may_read_it() -> None:
    spec = engine_of(World())
    assert spec["initContainers"][0]["command"] == [
        "python3", "/etc/tuneloop/guard/engine_guard.py", "verify", "/volumes/models/sentiment/v1", "sha256:" + f"{1:064x}",
    ]  # fmt: skip
    assert spec["initContainers"][0]["image"] == spec["containers"][0]["image"]


def test_the_engine_gets_its_own_key_alone_and_no_secret_stands_in_a_manifest() -> None:
    world = World()
    world.step()
    spec = engine_of(world)
    secret = next(volume["secret"] for volume in spec["volumes"] if volume["name"] == "secrets")
    assert secret["items"] == [{"key": "engine-key", "path": "engine-key"}]
    (made,) = world.created
    assert made["stringData"] == {"engine-key": "a", "internal-token": "b", "feedback-key": "c"}
    assert made["metadata"]["ownerReferences"][0]["uid"] == "mdep-uid"
    world.settle()
    assert world.created == [made]


def test_requests_may_end_before_the_engine_does() -> None:
    spec = engine_of(World())
    args, container = spec["containers"][0]["args"], spec["containers"][0]
    drain = int(args[args.index("--shutdown-timeout") + 1])
    assert spec["terminationGracePeriodSeconds"] > drain + container["lifecycle"]["preStop"]["sleep"]["seconds"]


def test_an_engine_that_stands_still_for_45_seconds_is_ended_within_90_after_its_last_step_and_a_silent_one_after_100() -> None:
    container = engine_of(World())["containers"][0]
    live, ready = container["livenessProbe"], container["readinessProbe"]
    assert live["httpGet"]["path"] == ready["httpGet"]["path"] == "/health"
    # The guard sees the last step, and that none followed, up to one look and one question late.
    noticed = engine_guard.STILL_SECONDS + 2 * (engine_guard.LOOK_SECONDS + ready["periodSeconds"])
    assert noticed + live["periodSeconds"] * live["failureThreshold"] + live["terminationGracePeriodSeconds"] <= 90
    assert live["timeoutSeconds"] * live["failureThreshold"] >= 100
    assert live["terminationGracePeriodSeconds"] > container["lifecycle"]["preStop"]["sleep"]["seconds"]


def test_the_startup_probe_allows_what_the_spec_allows() -> None:
    probe = engine_of(World(spec={"engine": {"startupTimeoutSeconds": 90}}))["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 90


def test_a_users_label_cannot_take_a_pod_out_of_its_policy() -> None:
    world = fullest()
    world.step()
    engine = next(m for (kind, name), m in world.objects.items() if kind == "Deployment" and name != "tweets-gateway")
    labels = engine["spec"]["template"]["metadata"]["labels"]
    assert labels["team"] == "x"
    assert labels["tuneloop.dev/engine"] != "mine"


def test_sqlite_has_one_writer_and_a_retained_claim_has_no_owner() -> None:
    world = World()
    world.step()
    assert world.objects["Deployment", "tweets-gateway"]["spec"]["strategy"] == {"type": "Recreate"}
    assert world.objects["PersistentVolumeClaim", "tweets-data"]["metadata"]["ownerReferences"] == []
    world = World(spec={"gateway": {"capture": {"database": {"volume": {"retentionPolicy": "Delete"}}}}})
    world.step()
    assert "ownerReferences" not in world.objects["PersistentVolumeClaim", "tweets-data"]["metadata"]


def test_a_claim_is_never_pruned() -> None:
    world = World()
    world.settle()
    world.spec = {"gateway": {"capture": {"database": {"secretRef": {"name": "db"}}}}}
    world.settle()
    assert ("PersistentVolumeClaim", "tweets-data") in world.objects


def test_budgets_go_with_the_second_replica() -> None:
    world = fullest()
    world.settle()
    world.spec = FULL | {"engine": FULL["engine"] | {"replicas": 1}, "gateway": FULL["gateway"] | {"replicas": 1}}
    world.settle()
    assert not [name for kind, name in world.objects if kind == "PodDisruptionBudget"]


# --- configuration -----------------------------------------------------------


def test_the_generation_grows_with_the_content_and_only_then() -> None:
    world = World()
    world.settle()
    generation = world.config.generation
    world.settle()
    assert world.config.generation == generation == world.status["configGeneration"]
    world.spec = {"gateway": {"capture": {"retentionDays": 3}}}
    world.settle()
    assert world.config.generation == generation + 1


def test_a_lost_configuration_is_written_again_with_a_higher_generation() -> None:
    world = World()
    world.settle()
    before = world.config
    del world.objects["ConfigMap", "tweets-gateway"]
    world.settle()
    assert world.config == before.model_copy(update={"generation": before.generation + 1})


def test_every_setting_of_the_spec_reaches_the_gateway() -> None:
    world = fullest()
    world.settle()
    config = world.config
    assert config.require_key is True
    assert (config.limits.requests_per_minute, config.limits.tokens_per_minute) == (60, 9000)
    assert (config.capture.sample_rate, config.capture.personal_data, config.capture.retention_days) == (0.5, "Keep", 7)
    assert config.max_share_of_one_subject == 0.1
    assert config.tracing == Tracing(endpoint="https://traces.example/otlp", sample_rate=0.25)
    assert config.drift is not None
    assert (config.drift.size, config.drift.false_alarm_every_requests, config.drift.horizon_days, config.drift.mix_over_seconds) == (
        500,
        1000,
        2,
        60,
    )


def test_the_configuration_holds_no_field_that_is_default() -> None:
    """A gateway that is older than the operator refuses fields that it does not know."""
    world = World()
    world.settle()
    assert set(json.loads(world.config_text())) == {"generation", "namespace", "deployment", "model", "revisions"}
    assert GatewayConfig.model_validate_json(world.config_text()).capture.sample_rate == 1.0


def test_what_an_engine_compiles_is_kept_where_it_is_asked_for_and_nowhere_else_is_written() -> None:
    world = World(spec={"engine": {"compileCache": {"uri": "pvc://compiled/engines"}}})
    spec = engine_of(world)
    kept = {variable["name"]: variable.get("value", "") for variable in spec["containers"][0]["env"]}
    assert {kept[name] for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")} == {
        "/volumes/compiled/engines/vllm", "/volumes/compiled/engines/inductor", "/volumes/compiled/engines/triton",
    }  # fmt: skip
    assert kept["HF_HOME"].startswith("/home/")
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in spec["containers"][0]["volumeMounts"]}
    assert (mounts["/volumes/compiled"], mounts["/volumes/models"]) == (False, True)
    assert "/volumes/compiled" not in [mount["mountPath"] for mount in spec["initContainers"][0]["volumeMounts"]]


def test_what_compiles_may_not_write_where_the_model_is() -> None:
    world = World(spec={"engine": {"compileCache": {"uri": "pvc://models/compiled"}}})
    world.settle()
    assert world.condition("Stalled") == ("True", "InvalidOption")
    assert "cannot be on the claim 'models', where the model's files are: name another claim." in world.message("Stalled")
    assert world.engines() == []


# --- engine options ----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trust-remote-code": "true"}, "has no 'trust-remote-code'"),
        ({"dtype": "bfloat16 --trust-remote-code"}, "dtype cannot be"),
        ({"max-num-seqs": "0"}, "max-num-seqs cannot be"),
        ({"gpu-memory-utilization": "1.5"}, "cannot be"),
        ({"enforce-eager": "True\n"}, "cannot be"),
    ],
)
def test_what_is_not_on_the_list_is_refused(options: dict[str, str], said: str) -> None:
    problem = option_problem(options)
    assert problem is not None
    assert said in problem


def test_options_become_arguments_in_order_and_false_flags_are_negated() -> None:
    options = {"seed": "1", "enforce-eager": "true", "enable-prefix-caching": "false"}
    assert option_problem(options) is None
    assert option_arguments(options) == ["--no-enable-prefix-caching", "--enforce-eager", "--seed", "1"]


def test_no_option_is_one_that_is_ours_to_set() -> None:
    ours = {
        argument.removeprefix("--") for argument in arguments(World(versions=[make_version(1, **ADAPTER)])) if argument.startswith("--")
    }
    assert not ours & set(ENGINE_OPTIONS)


def test_what_a_record_pins_is_read_back_as_it_was() -> None:
    world = fullest()
    world.step()
    data = next(m["data"] for (kind, _), m in world.objects.items() if kind == "ControllerRevision")
    pinned = decoded(data)
    assert pinned is not None
    assert encoded(pinned) == data
    assert list(data) == sorted(data)
    assert all(isinstance(value, int) or (isinstance(value, str) and value.isascii()) for value in data.values())


@pytest.mark.parametrize("data", [{}, {"pinned": "x"}, {"pinned": None}, {"pinned": "e30="}])
def test_a_record_of_another_shape_is_none(data: dict[str, Any]) -> None:
    assert decoded(data) is None
