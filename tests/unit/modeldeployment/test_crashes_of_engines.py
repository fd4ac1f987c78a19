"""What an engine's log says of its crash. The tails are vLLM 0.32's own, cut to the last 2048 bytes as the kubelet does."""

from __future__ import annotations

import pytest
from tests.unit.modeldeployment.world import World, make_version

from tuneloop_operator.api.conditions import DeploymentReason as R
from tuneloop_operator.domain.modeldeployment.crashes import diagnose, sentence

ADDED = """ await init_app_state(engine_client, app.state, args, supported_tasks)
  File "/opt/tuneloop/lib/vllm/entrypoints/openai/models/serving.py", line 139, in init_static_loras
    raise ValueError(load_result.error.message)
ValueError: Call to add_lora method failed: Worker failed with error '%s', please check the stack trace above for the root cause
/usr/lib/python3.11/multiprocessing/resource_tracker.py:224: UserWarning: resource_tracker: There appear to be 1 leaked objects
  warnings.warn('resource_tracker: There appear to be %%d '
"""
NO_BASE = """    raise HFValidationError(
huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/volumes/models/bases/x'. Use
"""
EMPTY_BASE = """    s.__pydantic_validator__.validate_python(ArgsKwargs(args, kwargs), self_instance=s)
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Invalid repository ID or local directory specified: '/volumes/models/bases/x'.
Please verify the following requirements:
1. Provide a valid Hugging Face repository ID.
"""
NO_NETWORK = """    raise LocalEntryNotFoundError(
huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for the specified revision
"""
GATED = "huggingface_hub.errors.GatedRepoError: 403 Client Error. Access to model org/base is restricted.\n"
NO_VLLM = """/usr/bin/python3: Error while finding module specification for 'vllm.entrypoints' (ModuleNotFoundError: No module named 'vllm')
"""
CORE = """(EngineCore pid=9) ERROR 11-23 07:34:24 [core.py:99] ValueError: No available memory for the cache blocks.
    raise RuntimeError("Engine core initialization failed. "
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.mark.parametrize(
    ("log", "said", "reason", "is_permanent"),
    [
        (ADDED % "LoRA rank 64 is greater than max_lora_rank 16.", "LoRA rank 64 is greater than max_lora_rank 16.", R.ENGINE_FAILED, True),
        (ADDED % "Error while deserializing header: incomplete", "Error while deserializing header: incomplete", R.ENGINE_FAILED, True),
        (NO_BASE, "Repo id must be in the form", R.MODEL_NOT_FOUND, True),
        (EMPTY_BASE, "Invalid repository ID or local directory specified: '/volumes/models/bases/x'.", R.MODEL_NOT_FOUND, True),
        (NO_VLLM, "Error while finding module specification", R.ENGINE_FAILED, True),
        (GATED, "403 Client Error.", R.ACCESS_DENIED, True),
        (NO_NETWORK, "Cannot find an appropriate cached snapshot folder", R.MODEL_NOT_FOUND, False),
    ],
)
def test_a_crash_is_told_in_the_engines_own_sentence(log: str, said: str, reason: R, is_permanent: bool) -> None:
    assert sentence(log).startswith(said)
    known = diagnose(log)
    assert known is not None
    assert (known.reason, known.is_permanent) == (reason, is_permanent)
    assert known.remedy.endswith(".")


def test_an_exception_about_another_process_gives_way_to_that_ones() -> None:
    assert sentence(CORE) == "No available memory for the cache blocks."
    assert sentence(CORE.splitlines()[-1]).startswith("Engine core initialization failed")
    assert diagnose(CORE) is None


@pytest.mark.parametrize("log", ["", "Killed", "INFO: 127.0.0.1 - GET /x 404", "x" * 5000, "Error: \n", "ValueError: " + "y" * 9000])
def test_any_log_is_bounded_and_none_breaks_it(log: str) -> None:
    assert len(sentence(log)) <= 300
    assert diagnose(log) is None


def crashed(log: str, restarts: int, *, serving: bool = True) -> World:
    """Version 2 crashed so often with this log, beside version 1 or alone."""
    world = World(versions=[make_version(1)] if serving else [make_version(2)])
    if serving:
        world.settle()
        world.versions.append(make_version(2))
    world.step()
    ended = {"terminated": {"exitCode": 1, "reason": "Error", "message": log}}
    world.ready[world.engine_of(2)] = 0
    world.pod_status[world.engine_of(2)] = {"containerStatuses": [{"name": "engine", "restartCount": restarts, "state": ended}]}
    world.settle()
    return world


def test_a_crash_that_will_repeat_itself_is_not_waited_for_while_the_old_revision_serves_on() -> None:
    world = crashed(ADDED % "LoRA rank 64 is greater than max_lora_rank 16.", 0)
    assert world.condition("Available") == ("True", "Serving")
    assert world.condition("Ready") == ("True", "RolledBack")
    message = next(c["message"] for c in world.status["conditions"] if c["type"] == "Ready")
    assert "LoRA rank 64 is greater than max_lora_rank 16. Record the adapter's true rank" in message
    assert "Version 1 serves on." in message


@pytest.mark.parametrize(("restarts", "ready"), [(0, "RollingOut"), (2, "RollingOut"), (3, "RolledBack")])
def test_a_crash_that_may_heal_is_waited_for(restarts: int, ready: str) -> None:
    assert crashed(NO_NETWORK, restarts).condition("Ready")[1] == ready  # type: ignore[index]


def test_the_first_revision_says_what_is_missing() -> None:
    world = crashed(NO_BASE, 0, serving=False)
    assert world.condition("Ready") == ("False", "ModelNotFound")
    assert world.condition("Stalled") == ("True", "ModelNotFound")
