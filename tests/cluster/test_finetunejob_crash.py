"""The operator is killed after each of its writes in a FineTuneJob's life: the same objects, and the same end, as without."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.cluster.conftest import Start
from tests.cluster.faults import FaultProxy, Write
from tests.cluster.harness import Api, OperatorProcess, wait_for
from tests.cluster.test_finetunejob import Trainee, make_claim
from tests.unit.finetunejob.builders import RESULTS

from tuneloop_trainer.contract import Stage

KINDS = ("Job", "ConfigMap", "NetworkPolicy", "ModelVersion")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def play_stages(trainee: Trainee) -> None:
    """One look at the cluster: every pod that waits runs and ends well."""
    for stage in Stage:
        for pod in trainee.play.pods(trainee.job(stage)):
            if pod["status"].get("phase", "Pending") == "Pending":
                told = RESULTS[stage]().model_dump_json(by_alias=True, exclude_none=True)
                trainee.play.finish(pod, 0, told)


def is_over(trainee: Trainee) -> bool:
    """The job has ended, and its version has been looked at."""
    versions = trainee.versions()
    return bool(trainee.status().get("finishedAt")) and bool(versions) and "status" in versions[0]


def made_objects(api: Api, trainee: Trainee) -> set[tuple[str, str]]:
    """Kinds and names, the job's own name and hashes apart."""
    found = {(kind, obj["metadata"]["name"]) for kind in KINDS for obj in api.list(kind, trainee.namespace)}
    return {(kind, masked(name, trainee)) for kind, name in found if name.startswith(trainee.name)}


def masked(name: str, trainee: Trainee) -> str:
    return re.sub(r"-config-[0-9a-f]{8}\b", "-config", name.replace(trainee.name, "X"))


def writes_of(trainee: Trainee, proxy: FaultProxy) -> list[Write]:
    """Those of this job that the API server carried out, in order."""
    return [write for write, status in proxy.faults.statuses if status < 300 and trainee.name in write.target]


def what_was_written(trainee: Trainee, proxy: FaultProxy) -> set[tuple[str, str]]:
    return {(write.method, masked(write.target, trainee)) for write in writes_of(trainee, proxy)}


def end_state(trainee: Trainee) -> Any:
    """Status of the job, and its version, without what differs from run to run."""
    text = json.dumps([trainee.status(), trainee.versions()[0]["spec"], trainee.versions()[0]["status"]], sort_keys=True)
    uid = trainee.get()["metadata"]["uid"]
    text = text.replace(uid, "UID").replace(uid[:8], "UID").replace(trainee.name, "X")
    text = re.sub(r'"runningSeconds": \d+', '"runningSeconds": 0', text)
    return json.loads(re.sub(r"sha256:[0-9a-f]{64}", "DIGEST", TIME.sub("TIME", text)))


def test_killed_after_every_write_the_operator_ends_with_the_same_objects(
    api: Api, namespace: str, proxy: FaultProxy, start_operator: Start
) -> None:
    make_claim(api, namespace)
    operator = start_operator(kubeconfig=proxy.kubeconfig)
    undisturbed = Trainee(api, namespace, "calm").make()
    wait_for(lambda: play_stages(undisturbed) or is_over(undisturbed), 60)

    killed: list[Write] = []

    def kill(write: Write) -> bool:
        """The write is carried out, its answer never arrives, and nothing else of the process happens."""
        assert operator.process is not None
        operator.process.kill()
        killed.append(write)
        return False

    proxy.faults.after_write = kill
    stormy = Trainee(api, namespace, "wild").make()
    wait_for(lambda: _goes_on(operator, stormy), 180, "the end of a job whose operator is killed after each write")
    assert killed == writes_of(stormy, proxy)
    assert what_was_written(stormy, proxy) == what_was_written(undisturbed, proxy)
    assert made_objects(api, stormy) == made_objects(api, undisturbed)
    assert end_state(stormy) == end_state(undisturbed)
    posts = [(write.path, status) for write, status in proxy.faults.statuses if write.method == "POST" and status == 201]
    assert len(posts) == len(made_objects(api, stormy)) + len(made_objects(api, undisturbed))


def _goes_on(operator: OperatorProcess, trainee: Trainee) -> bool:
    assert operator.process is not None
    if operator.process.poll() is not None:
        operator.start(wait=False)
    play_stages(trainee)
    return is_over(trainee)
