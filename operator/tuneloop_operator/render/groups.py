"""A replica of several pods: a LeaderWorkerSet, whose leaders are asked, and whose workers hold the other parts of the model."""

from __future__ import annotations

from typing import Any

from tuneloop_operator.api.modeldeployment import Engine
from tuneloop_operator.render.revisions import Group

Json = dict[str, Any]
KIND = "LeaderWorkerSet"
WORKER = "engine-worker"
"""Component of the pods that nobody asks: no Service has them, and no gateway."""
WORKER_COMMAND = ["python3", "-m", "vllm.entrypoints.cli.main", "serve"]
"""vLLM's server that the leader runs is no worker; its command line is."""
RENDEZVOUS_PORT = 29501
SERVES = ("ports", "startupProbe", "livenessProbe", "readinessProbe", "lifecycle")
"""Fields of a container that is asked. A worker ends with its process; then the whole group begins again."""
SECRETS = "secrets"
KEY_VARIABLE = "TUNELOOP_ENGINE_KEY_FILE"


def parallel_options(engine: Engine) -> dict[str, str]:
    """Each layer over the devices of a pod, and the layers over the pods; what the user says goes before."""
    sizes = {"tensor-parallel-size": engine.accelerators_per_replica, "pipeline-parallel-size": engine.nodes_per_replica}
    return {name: str(size) for name, size in sizes.items() if size > 1}


def parallel_problem(engine: Engine) -> str | None:
    """A sentence where the parts of the model are more or fewer than the devices of a group."""
    parts = parallel_options(engine) | engine.options
    tensor, pipeline = (int(parts.get(f"{kind}-parallel-size", "1")) for kind in ("tensor", "pipeline"))
    devices = engine.nodes_per_replica * engine.accelerators_per_replica
    if engine.nodes_per_replica == 1 or tensor * pipeline == devices:
        return None
    return (
        f"Options tensor-parallel-size and pipeline-parallel-size divide the model into {tensor} x {pipeline} parts, but a replica has"
        f" {devices} devices: {engine.accelerators_per_replica} on each of {engine.nodes_per_replica} nodes. Make both the same."
    )


def divided(template: Json, size: int) -> tuple[Json, Group]:
    """The template of a group's leader, and its workers', of one that is a replica alone."""
    rendezvous = [
        "--distributed-executor-backend", "mp",
        "--nnodes", str(size),
        "--node-rank", "$(LWS_WORKER_INDEX)",
        "--master-addr", "$(LWS_LEADER_ADDRESS)",
        "--master-port", str(RENDEZVOUS_PORT),
    ]  # fmt: skip
    server = template["spec"]["containers"][0]
    leader = _with_server(template, server | {"args": [*server["args"], *rendezvous]})
    return leader, Group(size=size, worker=_worker(leader))


def _worker(leader: Json) -> Json:
    """The same without what is there for requests, and without the key."""
    server = leader["spec"]["containers"][0]
    kept = {name: value for name, value in server.items() if name not in SERVES}
    told = {
        "command": WORKER_COMMAND,
        "args": [*server["args"][1:], "--headless"],  # the model comes first, and is named by its place here
        "env": [variable for variable in server["env"] if variable["name"] != KEY_VARIABLE],
        "volumeMounts": [mount for mount in server["volumeMounts"] if mount["name"] != SECRETS],
    }
    metadata, spec = leader["metadata"], leader["spec"]
    labels = metadata["labels"] | {"app.kubernetes.io/component": WORKER}
    volumes = [volume for volume in spec["volumes"] if volume["name"] != SECRETS]
    return _with_server({"metadata": metadata | {"labels": labels}, "spec": spec | {"volumes": volumes}}, kept | told)


def _with_server(template: Json, server: Json) -> Json:
    return template | {"spec": template["spec"] | {"containers": [server, *template["spec"]["containers"][1:]]}}


def render_group(metadata: Json, leader: Json, group: Group, replicas: int) -> Json:
    """One LeaderWorkerSet for an engine; a replica is a group. Its headless Services are called like the leaders: like the set is ours."""
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": KIND,
        "metadata": metadata,
        "spec": {
            "replicas": replicas,
            "startupPolicy": "LeaderCreated",
            "networkConfig": {"subdomainPolicy": "UniquePerReplica"},
            "leaderWorkerTemplate": {
                "size": group.size,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": leader,
                "workerTemplate": group.worker,
            },
        },
    }
