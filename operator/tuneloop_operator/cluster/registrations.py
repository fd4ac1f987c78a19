"""The kinds that the operator reconciles. A further one is a line here."""

from __future__ import annotations

from typing import Any

from tuneloop_operator.cluster.registration import Registration


def registrations() -> tuple[Registration[Any], ...]:
    """Imported on call: the tests of the runtime bring a kind of their own."""
    from tuneloop_operator.cluster import observe_finetunejob as jobs
    from tuneloop_operator.cluster import observe_modeldeployment as deployments
    from tuneloop_operator.cluster import observe_modelversion as versions

    return (jobs.REGISTRATION, versions.REGISTRATION, deployments.REGISTRATION)
