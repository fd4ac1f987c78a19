"""The kinds that the operator reconciles. A further one is a line here."""

from __future__ import annotations

from typing import Any

from tuneloop_operator.cluster.registration import Registration


def registrations() -> tuple[Registration[Any], ...]:
    """Imported on call: `tuneloop render` and the tests of the runtime need none of them."""
    from tuneloop_operator.cluster import observe_finetunejob, observe_modeldeployment, observe_modelversion

    return (observe_finetunejob.REGISTRATION, observe_modelversion.REGISTRATION, observe_modeldeployment.REGISTRATION)
