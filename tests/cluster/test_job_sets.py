"""Training as a JobSet, by the definition of JobSet itself; the tests play its controller, which makes the Job."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.cluster.conftest import Start, fresh_namespace, install
from tests.cluster.harness import Api, Object, wait_for
from tests.cluster.test_finetunejob import Trainee, make_claim, name_of
from tests.unit.finetunejob.builders import trained
from tests.unit.finetunejob.test_job_sets import world

from tuneloop_operator.render import names
from tuneloop_trainer.contract import Stage

MODULE = "sigs.k8s.io/jobset@v0.10.1"
DEFINITION = "config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml"


@pytest.fixture(scope="module")
def definition(api: Api) -> None:
    """Of the Go module. It stays installed: an operator that watches JobSets would miss it."""
    fetched = subprocess.run(["go", "mod", "download", "-json", MODULE], check=True, capture_output=True, text=True, timeout=300)
    install(api, yaml.safe_load((Path(json.loads(fetched.stdout)["Dir"]) / DEFINITION).read_text()))


@pytest.fixture(scope="module")
def place(api: Api, definition: None, shared_operator: Start) -> Iterator[str]:
    """A namespace with a claim, and an operator that found JobSets when it started."""
    with fresh_namespace(api, "job sets") as name:
        make_claim(api, name)
        shared_operator(TUNELOOP_WATCH_NAMESPACES=name)
        yield name


@pytest.fixture
def trainee(api: Api, place: str, request: pytest.FixtureRequest) -> Trainee:
    two = {"nodes": 2, "acceleratorsPerNode": 0, "pod": {"schedulerName": "nobody"}}
    trainee = Trainee(api, place, name_of(request)).make(compute=two)
    trainee.ends(Stage.PREPARE)
    return trainee


def job_set(trainee: Trainee, number: int = 1) -> Object:
    name = names.stage_job(trainee.name, "train", number, names.IN_SET_LENGTH)
    return wait_for(lambda: trainee.api.get("JobSet", trainee.namespace, name), what="the JobSet")  # type: ignore[return-value]


def make_job(trainee: Trainee, owner: Object) -> str:
    """As JobSet's controller does it."""
    template = owner["spec"]["replicatedJobs"][0]["template"]
    metadata = {
        "name": f"{owner['metadata']['name']}-node-0",
        "namespace": trainee.namespace,
        "labels": template["metadata"]["labels"],
        "ownerReferences": [
            {
                "apiVersion": owner["apiVersion"],
                "kind": "JobSet",
                "name": owner["metadata"]["name"],
                "uid": owner["metadata"]["uid"],
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }
    return trainee.api.create({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": template["spec"]})["metadata"]["name"]


def end(trainee: Trainee, job: str, *codes: int) -> None:
    """Its pods run, and end so."""
    pods = wait_for(lambda: found if len(found := trainee.play.pods(job)) == len(codes) else None, what="its pods")
    assert pods is not None
    told = trained().model_dump_json(by_alias=True, exclude_none=True)
    for pod, code in zip([trainee.play.run(pod) for pod in pods], codes, strict=True):
        trainee.play.finish(pod, code, told if code == 0 else "")


def test_job_set_has_no_field_that_its_definition_does_not_know(api: Api, place: str) -> None:
    manifest = world().current().manifest
    metadata = {**manifest["metadata"], "namespace": place}
    path = f"/apis/jobset.x-k8s.io/v1alpha2/namespaces/{place}/jobsets"
    answer = api.call("POST", f"{path}?fieldValidation=Strict&dryRun=All", {**manifest, "metadata": metadata})
    assert answer["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] == 2


def test_training_on_two_nodes_is_a_job_set_that_ends_with_its_job(api: Api, trainee: Trainee) -> None:
    made = job_set(trainee)
    assert made["metadata"]["ownerReferences"][0]["uid"] == trainee.get()["metadata"]["uid"]
    assert (made["spec"]["network"]["enableDNSHostnames"], made["spec"]["failurePolicy"]["maxRestarts"]) == (True, 0)
    end(trainee, make_job(trainee, made), 0, 0)
    wait_for(lambda: "package-1" in trainee.jobs(), what="the next stage")
    assert trainee.status()["progress"]["display"] == "12/12"
    assert trainee.jobs() == ["package-1", "prepare-1"], "the Job of training is the JobSet's"


def test_failed_job_of_a_job_set_is_followed_by_another_job_set(trainee: Trainee) -> None:
    end(trainee, make_job(trainee, job_set(trainee)), 137, 14)
    again = job_set(trainee, 2)
    assert again["metadata"]["labels"]["tuneloop.dev/attempt"] == "2"
    assert trainee.status()["attempts"] == 2


def test_job_set_is_suspended_with_the_job_and_goes_on_with_it(api: Api, trainee: Trainee) -> None:
    job_set(trainee)
    for suspend in (True, False):
        trainee.edit(runPolicy={"suspend": suspend})
        wait_for(lambda wanted=suspend: job_set(trainee)["spec"].get("suspend", False) is wanted, what=f"suspend {suspend}")
    assert trainee.status()["attempts"] == 1


def test_what_a_job_set_owns_goes_with_the_finetunejob(api: Api, trainee: Trainee) -> None:
    job = make_job(trainee, job_set(trainee))
    api.delete("FineTuneJob", trainee.namespace, trainee.name)
    wait_for(lambda: api.get("Job", trainee.namespace, job) is None, what="the JobSet's Job to be collected")
    assert api.list("JobSet", trainee.namespace, f"tuneloop.dev/finetunejob={trainee.name}") == []


def test_job_set_of_that_name_that_is_somebody_elses_is_left_alone(api: Api, place: str, request: pytest.FixtureRequest) -> None:
    name = name_of(request)
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "x", "image": "x"}]}}
    foreign = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": f"{name}-train-1", "namespace": place},
        "spec": {"replicatedJobs": [{"name": "x", "template": {"spec": {"template": template}}}]},
    }
    api.create(foreign)
    trainee = Trainee(api, place, name).make(compute={"nodes": 2, "acceleratorsPerNode": 0, "pod": {"schedulerName": "nobody"}})
    trainee.ends(Stage.PREPARE)
    trainee.wait_for("True", "NameConflict", "Stalled")
