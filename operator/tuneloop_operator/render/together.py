"""Which stages run as several pods, and what those of a training need to find each other, and each one's processes."""

from __future__ import annotations

from tuneloop_operator.api.finetunejob import FineTuneJob
from tuneloop_operator.render import names, pods
from tuneloop_operator.render.pods import Json
from tuneloop_trainer.contract import ENV_NODES, ENV_PROCESSES, ENV_RENDEZVOUS, RENDEZVOUS_PORT, Stage

NODE = "node"
"""The one kind of Job of a JobSet."""


def nodes(job: FineTuneJob, stage: Stage, *, with_devices: bool) -> int:
    """Pods of an attempt: those that train together, or prepare shares of the rows; one where its result is only read again."""
    shared = {Stage.TRAIN: job.spec.compute.nodes, Stage.PREPARE: job.spec.data.workers}
    return shared.get(stage, 1) if with_devices else 1


def processes(job: FineTuneJob) -> int:
    """Of the whole training: one for each device, or for each pod on CPUs."""
    return job.spec.compute.nodes * processes_of_node(job)


def processes_of_node(job: FineTuneJob) -> int:
    return max(1, job.spec.compute.accelerators_per_node)


def fewest_nodes(job: FineTuneJob, *, is_sharded: bool) -> int:
    """Nodes that an elastic training may come down to. One process alone has nobody to divide a model with."""
    least = job.spec.compute.min_nodes or job.spec.compute.nodes
    return max(least, 2) if is_sharded and processes_of_node(job) == 1 else least


def environment(job: FineTuneJob, first: str, stage: Stage, count: int) -> list[Json]:
    """For the launcher; nothing where one process works alone. The pod's own number is set by Kubernetes."""
    if stage is Stage.PREPARE and count > 1:
        return [pods.value(ENV_NODES, str(count))]
    if stage is not Stage.TRAIN or count * processes_of_node(job) == 1:
        return []
    return [
        pods.value(ENV_NODES, str(count)),
        pods.value(ENV_PROCESSES, str(processes_of_node(job))),
        pods.value(ENV_RENDEZVOUS, f"{first}:{RENDEZVOUS_PORT}"),
    ]


def first_host(job: FineTuneJob, name: str, count: int, *, in_set: bool) -> str:
    """Where the others find the first one."""
    if count == 1:
        return "127.0.0.1"
    return f"{name}-{NODE}-0-0.{name}" if in_set else f"{name}-0.{names.job_peers(job.metadata.name)}"


def job_set(job: Json) -> Json:
    """The same Job within a JobSet, whose controller makes it, and the headless Service, which is called like the JobSet. It restarts
    nothing: attempts are the operator's."""
    spec = {field: value for field, value in job["spec"].items() if field != "suspend"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": job["metadata"],
        "spec": {
            "suspend": job["spec"]["suspend"],
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All"},  # JobSet's webhook would set it; its controller fails without
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": [
                {"name": NODE, "replicas": 1, "template": {"metadata": {"labels": job["metadata"]["labels"]}, "spec": spec}},
            ],
        },
    }


def job_spec(manifest: Json) -> Json:
    """Of a Job, or of the one that a JobSet makes."""
    spec: Json = manifest["spec"]["replicatedJobs"][0]["template"]["spec"] if manifest["kind"] == "JobSet" else manifest["spec"]
    return spec


def service(job: FineTuneJob, labels: dict[str, str]) -> Json:
    """Headless: gives each pod a name. The first one must be found before it is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": names.job_peers(job.metadata.name), "namespace": job.metadata.namespace, "labels": labels},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": _selector(job),
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT, "targetPort": RENDEZVOUS_PORT, "protocol": "TCP"}],
        },
    }


def ingress(job: FineTuneJob) -> list[Json]:
    """Gloo and NCCL open ports as they like, so the training's own pods reach each other on all."""
    return [{"from": [{"podSelector": {"matchLabels": _selector(job)}}]}] if job.spec.compute.nodes > 1 else []


def _selector(job: FineTuneJob) -> dict[str, str]:
    return {names.JOB_LABEL: job.metadata.name, names.STAGE_LABEL: Stage.TRAIN.value}
