"""What the operator adds between `kubectl apply` and the first training step: FineTuneJobs on a real API server without nodes.

A script plays the pods: a stage's pod runs and ends at once, as if everything were cached. Measured are the waits in between: from the
creation of the FineTuneJob to that of its prepare Job, and from the completion of each stage's Job to the creation of the next one; and
the same since the end of the stage's pod, which the Job controller takes a second or so to notice. The last line is JSON.

    python -m bench.start [--count 20]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import yaml
from bench.operator import WATCHED, kubeconfig, machine
from tests.cluster.conftest import install
from tests.cluster.harness import ROOT, Api, ApiAnswer, Object, OperatorProcess, Play, wait_for
from tests.unit.finetunejob.builders import RESULTS

from tuneloop_operator.cluster.kinds import KINDS
from tuneloop_operator.render import names
from tuneloop_trainer.contract import Stage

NAMESPACE = f"{WATCHED}-start"
TARGET_SECONDS = 2.0
EVERY = 0.005


def fine_tune_job(name: str) -> Object:
    spec = {
        "baseModel": {"uri": "pvc://models/base"},
        "data": {"train": [{"source": {"uri": "pvc://models/rows.jsonl"}}]},
        "compute": {"acceleratorsPerNode": 0, "pod": {"schedulerName": "nobody"}},
        "output": {"model": name, "store": {"uri": "pvc://models"}},
    }
    return {
        "apiVersion": "tuneloop.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": spec,
    }


def set_up(api: Api) -> None:
    """The CRDs, an empty namespace, and the claim that the jobs name."""
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        install(api, yaml.safe_load(path.read_text()))
    remove(api)
    api.call("POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models", "namespace": NAMESPACE}, "spec": spec}
    api.create(claim)


def remove(api: Api) -> None:
    """Deletes the namespace, and waits until it is gone."""

    def is_gone() -> bool:
        try:
            api.call("DELETE", f"/api/v1/namespaces/{NAMESPACE}")
        except ApiAnswer as error:
            return error.status == 404
        return False

    wait_for(is_gone, 120, "the namespace to go", every=0.5)


def measure(api: Api, name: str) -> dict[Stage, tuple[float, float]]:
    """For each stage's Job the seconds until it was there: since the FineTuneJob was made or the pod before it ended, and since the Job
    before it said that it is complete."""
    play, waits = Play(api, NAMESPACE), {}
    api.call("POST", KINDS["FineTuneJob"].path(NAMESPACE), fine_tune_job(name))
    since, before = time.monotonic(), None
    for stage in Stage:
        job = names.stage_job(name, stage.value, 1)
        completed = wait_for(lambda job=before: is_complete(api, job), 120, f"{before} to be complete", EVERY)  # type: ignore[misc]
        wait_for(lambda job=job: api.get("Job", NAMESPACE, job), 120, f"Job {job}", EVERY)  # type: ignore[misc]
        waits[stage] = (time.monotonic() - since, time.monotonic() - (completed if before else since))
        said = RESULTS[stage]()
        pod = play.run({"kind": "Pod", **play.pod(job)})
        play.finish(pod, said.exit_code, said.model_dump_json(by_alias=True, exclude_none=True))
        since, before = time.monotonic(), job
    return waits


def is_complete(api: Api, job: str | None) -> float:
    """When the Job was seen to be complete; 0 while it is not. Of no Job: now."""
    found = api.get("Job", NAMESPACE, job) if job is not None else None
    conditions = (found or {}).get("status", {}).get("conditions", [])
    is_done = job is None or any(condition["type"] == "Complete" and condition["status"] == "True" for condition in conditions)
    return time.monotonic() if is_done else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.start", description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="FineTuneJobs, one after the other (default: %(default)s)")
    options = parser.parse_args()
    access = kubeconfig()
    api = Api(access)
    load = os.getloadavg()[0]
    print(f"machine: {machine()}; load {load:.1f}", flush=True)
    set_up(api)
    with tempfile.TemporaryDirectory() as folder:
        operator = OperatorProcess(access, NAMESPACE, Path(folder) / "operator.log", "bench")
        try:
            operator.start()
            wait_for(lambda: operator.metric("tuneloop_operator_leader") == 1, what="the operator to lead")
            measure(api, "warm")
            found = []
            for number in range(options.count):
                found.append(measure(api, f"job-{number:03}"))
                print(" ".join(f"{stage.value} {whole:.3f} ({own:.3f})" for stage, (whole, own) in found[-1].items()), flush=True)
        finally:
            operator.stop()
            remove(api)
    # Training begins with the train stage's pod: what comes behind it delays no step.
    whole = sorted(waits[Stage.PREPARE][0] + waits[Stage.TRAIN][0] for waits in found)
    own = sorted(waits[Stage.PREPARE][1] + waits[Stage.TRAIN][1] for waits in found)
    figures = {
        "operator_share_to_first_step_p50_seconds": round(statistics.median(own), 3),
        "operator_share_to_first_step_max_seconds": round(own[-1], 3),
        "with_job_controller_p50_seconds": round(statistics.median(whole), 3),
        "with_job_controller_max_seconds": round(whole[-1], 3),
        "target_seconds": TARGET_SECONDS,
        "stages_p50_seconds": {stage.value: round(statistics.median(waits[stage][1] for waits in found), 3) for stage in Stage},
        "jobs": len(found),
        "load": round(load, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
