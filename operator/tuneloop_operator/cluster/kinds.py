"""Kinds that the operator speaks of: where the API server serves them."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = "tuneloop.dev"
VERSION = "v1alpha1"
OURS = f"{GROUP}/{VERSION}"


@dataclass(frozen=True)
class Resource:
    """A kind's place in the API."""

    api_version: str
    plural: str
    kind: str
    is_namespaced: bool = True
    is_optional: bool = False
    """Of somebody else, and made use of where the API server has it."""

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        return self.api_version.rpartition("/")[2]

    @property
    def is_ours(self) -> bool:
        """Our own kinds are watched whole; all others only where they carry our label."""
        return self.group == GROUP

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """URL path of the collection, of one object, or of its subresource."""
        parts = ["/apis" if self.group else "/api", self.api_version]
        if namespace and self.is_namespaced:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)


KINDS: dict[str, Resource] = {
    resource.kind: resource
    for resource in (
        Resource(OURS, "finetunejobs", "FineTuneJob"),
        Resource(OURS, "modelversions", "ModelVersion"),
        Resource(OURS, "modeldeployments", "ModelDeployment"),
        Resource("v1", "pods", "Pod"),
        Resource("v1", "services", "Service"),
        Resource("v1", "configmaps", "ConfigMap"),
        Resource("v1", "secrets", "Secret"),
        Resource("v1", "persistentvolumeclaims", "PersistentVolumeClaim"),
        Resource("v1", "serviceaccounts", "ServiceAccount"),
        Resource("v1", "events", "Event"),
        Resource("v1", "resourcequotas", "ResourceQuota"),
        Resource("v1", "nodes", "Node", is_namespaced=False),
        Resource("v1", "namespaces", "Namespace", is_namespaced=False),
        Resource("v1", "persistentvolumes", "PersistentVolume", is_namespaced=False),
        Resource("apps/v1", "deployments", "Deployment"),
        Resource("apps/v1", "replicasets", "ReplicaSet"),
        Resource("apps/v1", "controllerrevisions", "ControllerRevision"),
        Resource("batch/v1", "jobs", "Job"),
        Resource("jobset.x-k8s.io/v1alpha2", "jobsets", "JobSet", is_optional=True),
        Resource("leaderworkerset.x-k8s.io/v1", "leaderworkersets", "LeaderWorkerSet", is_optional=True),
        Resource("keda.sh/v1alpha1", "scaledobjects", "ScaledObject", is_optional=True),
        Resource("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget"),
        Resource("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy"),
        Resource("rbac.authorization.k8s.io/v1", "roles", "Role"),
        Resource("rbac.authorization.k8s.io/v1", "rolebindings", "RoleBinding"),
        Resource("coordination.k8s.io/v1", "leases", "Lease"),
        Resource("discovery.k8s.io/v1", "endpointslices", "EndpointSlice"),
        Resource("storage.k8s.io/v1", "storageclasses", "StorageClass", is_namespaced=False),
    )
}
"""By kind; a further one is a line here."""
