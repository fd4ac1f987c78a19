"""The parts of Kubernetes' own objects that decisions rest on, parsed once at the boundary."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

from tuneloop_operator.api.types import Metadata, Model

Item = TypeVar("Item")
List = Annotated[tuple[Item, ...], BeforeValidator(lambda value: () if value is None else value)]
"""A tuple whose JSON may be null, as Go writes empty lists."""


class OwnerReference(Model):
    api_version: str = ""
    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool = False


class ObjectMeta(Metadata):
    owner_references: List[OwnerReference] = ()

    def is_controlled_by(self, uid: str) -> bool:
        return any(owner.controller and owner.uid == uid for owner in self.owner_references)


class KubeCondition(Model):
    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_transition_time: str | None = None


class JobStatus(Model):
    active: int = 0
    succeeded: int = 0
    failed: int = 0
    start_time: str | None = None
    completion_time: str | None = None
    conditions: List[KubeCondition] = ()


class JobSpec(Model):
    suspend: bool = False


class Job(Model):
    metadata: ObjectMeta
    spec: JobSpec = JobSpec()
    status: JobStatus = JobStatus()

    def condition(self, type_: str) -> KubeCondition | None:
        """The condition of this type, if it is True."""
        return next((c for c in self.status.conditions if c.type == type_ and c.status == "True"), None)

    @property
    def is_complete(self) -> bool:
        return self.condition("Complete") is not None

    @property
    def is_failed(self) -> bool:
        return self.condition("Failed") is not None

    @property
    def is_finished(self) -> bool:
        return self.is_complete or self.is_failed


def job_of_set(job_set: dict[str, Any], made: dict[str, Any] | None) -> Job:
    """A JobSet as the one Job that it has: under its own name, with the status of the Job that was made for it. What it says itself
    counts where that Job says nothing of its end."""
    own = {"Completed": "Complete", "Failed": "Failed"}
    told = [c | {"type": own[c["type"]]} for c in (job_set.get("status") or {}).get("conditions") or () if c.get("type") in own]
    status = dict((made or {}).get("status") or {})
    status["conditions"] = [*(status.get("conditions") or ()), *told]
    spec = {"suspend": bool(job_set["spec"].get("suspend"))}
    return Job.model_validate({"metadata": job_set["metadata"], "spec": spec, "status": status})


class Terminated(Model):
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    started_at: str | None = None
    finished_at: str | None = None


class Waiting(Model):
    reason: str = ""
    message: str = ""


class Running(Model):
    started_at: str | None = None


class ContainerState(Model):
    waiting: Waiting | None = None
    running: Running | None = None
    terminated: Terminated | None = None


class ContainerStatus(Model):
    name: str
    ready: bool = False
    restart_count: int = 0
    state: ContainerState = ContainerState()
    last_state: ContainerState = ContainerState()


class PodStatus(Model):
    phase: str = "Pending"
    pod_ip: str | None = Field(default=None, alias="podIP")
    reason: str = ""
    message: str = ""
    start_time: str | None = None
    conditions: List[KubeCondition] = ()
    container_statuses: List[ContainerStatus] = ()
    init_container_statuses: List[ContainerStatus] = ()


class PodSpec(Model):
    node_name: str | None = None


class Pod(Model):
    metadata: ObjectMeta
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    def condition(self, type_: str) -> KubeCondition | None:
        """The condition of this type, whatever its status."""
        return next((c for c in self.status.conditions if c.type == type_), None)

    @property
    def index(self) -> int:
        """Its number in an Indexed Job; 0 in any other."""
        number = self.metadata.labels.get("batch.kubernetes.io/job-completion-index", "")
        return int(number) if number.isdecimal() else 0

    @property
    def is_ready(self) -> bool:
        ready = self.condition("Ready")
        return ready is not None and ready.status == "True" and self.metadata.deletion_timestamp is None

    @property
    def is_unschedulable(self) -> bool:
        scheduled = self.condition("PodScheduled")
        return scheduled is not None and scheduled.status == "False" and scheduled.reason == "Unschedulable"

    @property
    def is_starting(self) -> bool:
        """Whether a container waits: for its image, a volume, a Secret. One that was evicted before waits for nothing any more."""
        return self.status.phase == "Pending" and any(status.state.waiting is not None for status in self.status.container_statuses)


class DeploymentSpec(Model):
    replicas: int = 1


class DeploymentStatus(Model):
    observed_generation: int = 0
    replicas: int = 0
    updated_replicas: int = 0
    ready_replicas: int = 0
    available_replicas: int = 0
    conditions: List[KubeCondition] = ()


class Deployment(Model):
    metadata: ObjectMeta
    spec: DeploymentSpec = DeploymentSpec()
    status: DeploymentStatus = DeploymentStatus()


class ConfigMap(Model):
    metadata: ObjectMeta
    data: dict[str, str] = Field(default_factory=dict)


class ControllerRevision(Model):
    metadata: ObjectMeta
    revision: int = 0
    data: dict[str, Any] = Field(default_factory=dict)


class Named(Model):
    """An object of which only the metadata counts (Service, PersistentVolumeClaim, PodDisruptionBudget, …)."""

    metadata: ObjectMeta


class InvolvedObject(Model):
    kind: str = ""
    name: str = ""
    uid: str = ""


class WarningEvent(Model):
    """A Warning event of a child, read where a child makes no headway and its own status does not say why."""

    metadata: ObjectMeta
    involved_object: InvolvedObject = InvolvedObject()
    reason: str = ""
    message: str = ""
    last_timestamp: str | None = None
