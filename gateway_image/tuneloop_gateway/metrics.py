"""The gateway's metrics, all of them; their names are the contract's."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from tuneloop_gateway.contract import DriftReport, DriftStatus, GatewayConfig, GatewayState, Metric, SkewReport

disable_created_metrics()  # type: ignore[no-untyped-call]
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
MAX_KEYS = 200
"""With series of their own: a Secret may hold many more."""
COUNTED = {"requests", "errors", "answers", "empty", "refused", "repetitive", "cut_short", "up", "down"}
OWN = ("namespace", "deployment")


class Metrics:
    """One registry for one deployment. Never labelled with what users say, nor with their keys: at most with the names of those."""

    def __init__(self, namespace: str, deployment: str) -> None:
        self.registry = CollectorRegistry()
        self.own = {"namespace": namespace, "deployment": deployment}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*OWN, *labels), registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, (*OWN, *labels), registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, (*OWN, "revision"), registry=self.registry, buckets=SECONDS)

        self._requests = counter(Metric.REQUESTS, "Requests answered.", "revision", "code", "finish_reason")
        self._seconds = histogram(Metric.REQUEST_SECONDS, "Seconds from a request's arrival to the end of its answer.")
        self._first_byte = histogram(Metric.FIRST_BYTE_SECONDS, "Seconds from a request's arrival to the answer's first byte.")
        self._between = histogram(Metric.INTER_TOKEN_SECONDS, "Seconds between two tokens of a stream, on average over an answer.")
        self._outcomes = gauge(Metric.CANARY_OUTCOMES, "Of a canary's step: what became of requests.", "revision", "outcome")
        self._in_flight = gauge(Metric.IN_FLIGHT, "Requests being answered now.")
        self._held = gauge(Metric.HELD, "Requests that wait for a ready engine.")
        self._retries = counter(Metric.RETRIES, "Attempts that were repeated on another replica before the first byte.", "revision")
        self._tokens = counter(Metric.TOKENS, "Tokens that engines reported.", "revision", "kind")
        self._key_requests = counter(Metric.KEY_REQUESTS, "Requests by API key.", "key", "outcome")
        self._key_tokens = counter(Metric.KEY_TOKENS, "Tokens of answers by API key.", "key", "kind")
        self._weight = gauge(Metric.REVISION_WEIGHT, "Share of the traffic a revision is given.", "revision", "version")
        self._agreement = gauge(Metric.PROBE_AGREEMENT, "Share of the probes answered as the evaluator did.", "revision")
        self._captured = counter(Metric.CAPTURED, "Requests stored.")
        self._dropped = counter(Metric.CAPTURE_DROPPED, "Requests not stored.", "reason")
        self._deleted = counter(Metric.ROWS_DELETED, "Stored rows that were deleted.", "table", "reason")
        self._feedback = counter(Metric.FEEDBACK, "Feedback received.", "kind", "value")
        self._labelled = gauge(Metric.LABELLED_ROWS, "Curated rows of the current epoch.", "split")
        self._evidence = gauge(Metric.DRIFT_LOG_EVIDENCE, "Natural logarithm of the evidence that users' inputs changed.")
        self._threshold = gauge(Metric.DRIFT_LOG_THRESHOLD, "The alarm is raised where the evidence reaches this.")
        self._effect = gauge(Metric.DRIFT_EFFECT, "Prequential AUC over the last 500 pairs, minus 0.5.")
        self._alarm = gauge(Metric.DRIFT_ALARM, "1 from the alarm on until the detector starts afresh.")
        self._remaining = gauge(Metric.DRIFT_REFERENCE_REMAINING, "Reference rows not used yet.")
        self._pairs = gauge(Metric.DRIFT_PAIRS, "Pairs tested since the detector started.")
        self._skew = (
            gauge(Metric.SKEW_LOG_EVIDENCE, "Natural logarithm of the evidence that users' inputs are unlike those of the training."),
            gauge(Metric.SKEW_LOG_THRESHOLD, "Inputs are said to be unlike where the evidence reaches this."),
            gauge(Metric.SKEW_EFFECT, "Prequential AUC over the last 500 pairs, minus 0.5."),
            gauge(Metric.SKEW_PAIRS, "Pairs of a live and a training input that were compared."),
            gauge(Metric.SKEW_DETECTED, "1 where users' inputs are unlike those that the version was trained on."),
        )
        self._generation = gauge(Metric.CONFIG_GENERATION, "Generation of the configuration that is applied.")
        for reason in ("queue_full", "database"):
            self._dropped.labels(**self.own, reason=reason)
        self._captured.labels(**self.own)
        self._feedback_series()
        self._children: dict[tuple[str, ...], Counter] = {}
        self._accounts: dict[str, tuple[Counter, Counter, Counter, Counter]] = {}
        self._timers: dict[str, tuple[Histogram, Histogram, Histogram]] = {}

    def _feedback_series(self) -> None:
        """A rate over a series that does not exist is no data, not zero."""
        for kind, value in (("rating", "up"), ("rating", "down"), ("rating", "none"), ("preference", "none"), ("correction", "none")):
            self._feedback.labels(**self.own, kind=kind, value=value)

    def request(self, revision: str, code: str, finish_reason: str) -> None:
        key = (revision, code, finish_reason)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = self._requests.labels(**self.own, revision=revision, code=code, finish_reason=finish_reason)
        child.inc()

    def _timer(self, revision: str) -> tuple[Histogram, Histogram, Histogram]:
        timer = self._timers.get(revision)
        if timer is None:
            own = {**self.own, "revision": revision}
            timer = self._timers[revision] = (self._seconds.labels(**own), self._first_byte.labels(**own), self._between.labels(**own))
        return timer

    def ended(self, revision: str, seconds: float) -> None:
        self._timer(revision)[0].observe(seconds)

    def first_byte(self, revision: str, seconds: float) -> None:
        self._timer(revision)[1].observe(seconds)

    def between_tokens(self, revision: str, seconds: float) -> None:
        self._timer(revision)[2].observe(seconds)

    def retried(self, revision: str) -> None:
        self._retries.labels(**self.own, revision=revision).inc()

    def tokens(self, revision: str, prompt: int, completion: int) -> None:
        for kind, amount in (("prompt", prompt), ("completion", completion)):
            key = (revision, "tokens", kind)
            child = self._children.get(key)
            if child is None:
                child = self._children[key] = self._tokens.labels(**self.own, revision=revision, kind=kind)
            child.inc(amount)

    def _account(self, key: str) -> tuple[Counter, Counter, Counter, Counter]:
        account = self._accounts.get(key)
        if account is None:
            if len(self._accounts) >= MAX_KEYS and key != "other":
                return self._account("other")
            own = {**self.own, "key": key}
            answered, failed = (self._key_requests.labels(**own, outcome=outcome) for outcome in ("answered", "failed"))
            prompt, completion = (self._key_tokens.labels(**own, kind=kind) for kind in ("prompt", "completion"))
            account = self._accounts[key] = (answered, failed, prompt, completion)
        return account

    def used(self, key: str, prompt: int, completion: int) -> None:
        """One request of a key that was answered."""
        account = self._account(key)
        account[0].inc()
        account[2].inc(prompt)
        account[3].inc(completion)

    def failed(self, key: str) -> None:
        """One request of a key that was not, or not to the end."""
        self._account(key)[1].inc()

    def captured(self, rows: int) -> None:
        self._captured.labels(**self.own).inc(rows)

    def dropped(self, reason: str, rows: int = 1) -> None:
        self._dropped.labels(**self.own, reason=reason).inc(rows)

    def deleted(self, table: str, reason: str, rows: int) -> None:
        self._deleted.labels(**self.own, table=table, reason=reason).inc(rows)

    def feedback(self, kind: str, value: str) -> None:
        self._feedback.labels(**self.own, kind=kind, value=value).inc()

    def render(self, config: GatewayConfig, state: GatewayState) -> bytes:
        """The exposition, with the gauges set from the state."""
        self._in_flight.labels(**self.own).set(sum(r.in_flight for r in state.revisions))
        self._held.labels(**self.own).set(state.held)
        self._generation.labels(**self.own).set(state.generation)
        self._weight.clear()
        for revision in config.revisions:
            version = "" if revision.version is None else str(revision.version)
            self._weight.labels(**self.own, revision=revision.name, version=version).set(revision.weight)
        self._outcomes.clear()
        for report in state.revisions:
            for name, count in (report.outcomes.model_dump(include=COUNTED) if report.outcomes is not None else {}).items():
                self._outcomes.labels(**self.own, revision=report.name, outcome=name).set(count)
        self._agreement.clear()
        for report in state.revisions:
            if report.probe.asked and report.probe.status in ("Done", "Running"):
                self._agreement.labels(**self.own, revision=report.name).set(report.probe.agreed / report.probe.asked)
        self._labelled.labels(**self.own, split="train").set(state.feedback.labelled_train)
        self._labelled.labels(**self.own, split="gate").set(state.feedback.labelled_gate)
        self._render_drift(state.drift)
        self._render_skew(state.skew)
        return generate_latest(self.registry)

    def _render_skew(self, skew: SkewReport | None) -> None:
        if skew is None:
            for gauge in self._skew:
                gauge.clear()
            return
        values = (skew.log_evidence, skew.log_threshold, skew.effect, float(skew.pairs), float(skew.status == "Differ"))
        for gauge, value in zip(self._skew, values, strict=True):
            gauge.labels(**self.own).set(value)

    def _render_drift(self, drift: DriftReport | None) -> None:
        gauges = (self._evidence, self._threshold, self._effect, self._alarm, self._remaining, self._pairs)
        if drift is None or drift.status is DriftStatus.OFF:
            for gauge in gauges:
                gauge.clear()
            return
        values = (drift.log_evidence, drift.log_threshold, drift.effect, float(drift.status is DriftStatus.ALARM))
        for gauge, value in zip(gauges, (*values, drift.reference_remaining, drift.pairs), strict=True):
            gauge.labels(**self.own).set(value)
