"""ModelDeployment: what is served, how the next revision takes over, and when a better model is trained."""

from tuneloop_operator.domain.modeldeployment.decisions import EPOCH_ANNOTATION, REARMED_ANNOTATION, STABLE_ANNOTATION, decide
from tuneloop_operator.domain.modeldeployment.snapshot import Evidence, GatewayPod, ObservedConfig, Snapshot

__all__ = [
    "EPOCH_ANNOTATION",
    "REARMED_ANNOTATION",
    "STABLE_ANNOTATION",
    "Evidence",
    "GatewayPod",
    "ObservedConfig",
    "Snapshot",
    "decide",
]
