"""`GET /internal/state`: what the operator decides on."""

from __future__ import annotations

import asyncio
import logging
import time

from tuneloop_gateway.adapters import Adapters
from tuneloop_gateway.capture import Capture
from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.contract import GatewayState, Revision, RevisionReport
from tuneloop_gateway.curation import Curation
from tuneloop_gateway.database import Unavailable
from tuneloop_gateway.drift.monitor import Monitor
from tuneloop_gateway.drift.process import rfc3339
from tuneloop_gateway.endpoints import Endpoints
from tuneloop_gateway.outcomes import Outcomes
from tuneloop_gateway.probes import Prober
from tuneloop_gateway.routing import Router

logger = logging.getLogger(__name__)
REFRESH_SECONDS = 1.0


class State:
    """Put together anew for each question; the counts from the database may be a few seconds old."""

    def __init__(
        self, configuration: Configuration, endpoints: Endpoints, router: Router, prober: Prober, capture: Capture, monitor: Monitor,
        curation: Curation, pod_uid: str, outcomes: Outcomes, adapters: Adapters,
    ) -> None:  # fmt: skip
        self._outcomes, self._adapters = outcomes, adapters
        self._configuration, self._endpoints, self._router, self._prober = configuration, endpoints, router, prober
        self._capture, self._monitor, self._curation, self._pod_uid = capture, monitor, curation, pod_uid
        self._started_at = rfc3339(time.time())
        self._counting: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Counts feedback again; a database that is slow or away leaves the last counts."""
        if self._counting is None or self._counting.done():
            self._counting = asyncio.create_task(self._count())
        await asyncio.wait((self._counting,), timeout=REFRESH_SECONDS)

    async def _count(self) -> None:
        try:
            await self._curation.report(self._monitor.epoch, self._configuration.current.max_share_of_one_subject)
        except Unavailable as error:
            logger.warning("Feedback could not be counted now: %s.", error)

    def build(self) -> GatewayState:
        self._router.forget_gone()
        return GatewayState(
            pod_uid=self._pod_uid,
            started_at=self._started_at,
            generation=self._configuration.current.generation,
            held=self._router.held,
            idle_seconds=self._router.idle_seconds,
            revisions=tuple(self._revision(r) for r in self._configuration.current.revisions),
            window=self._outcomes.window,
            drift=self._monitor.report(),
            skew=self._monitor.skew(),
            feedback=self._curation.last_report,
            capture=self._capture.report(),
        )

    def _revision(self, revision: Revision) -> RevisionReport:
        count = self._router.count(revision.name)
        return RevisionReport(
            name=revision.name,
            endpoints=self._adapters.replicas(revision),
            load_error=self._adapters.error(revision),
            warm=count.warm,
            warm_up_seconds=count.warm_up_seconds,
            prompt_error=self._configuration.prompt_errors.get(revision.name, "")[:300],
            probe=self._prober.state(revision.name),
            prompt_digest=self._prober.prompt_digest(revision.name),
            engine_version=self._prober.engine_version(revision.name),
            requests=count.requests,
            errors=count.errors,
            in_flight=count.in_flight,
            outcomes=self._outcomes.report(revision.name) if self._outcomes.window else None,
        )
