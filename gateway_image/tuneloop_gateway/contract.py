"""What the operator, the trainer and the gateway say to each other: configuration, state, exported rows, names of metrics.

Imports pydantic and the standard library only, so that the operator can use it without the gateway's dependencies.
The operator writes one `GatewayConfig` as JSON under the key `config.json` of a ConfigMap; the gateway mounts it at `CONFIG_PATH`
(so that it starts with the API server down) and watches the object (so that a change takes effect at once).
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

VERSION = 1
CONFIG_PATH = "/etc/tuneloop/gateway/config.json"
SECRETS_PATH = "/etc/tuneloop/secrets"
"""Files `engine-key`, `internal-token`, `feedback-key`: made once by the operator, mounted, never read by it again."""
KEYS_PATH = "/etc/tuneloop/keys"
"""One file per API key: the file's name is the subject, its content the key. A name that starts with `reviewer.` has tier reviewer."""
DATABASE_URL_PATH = "/etc/tuneloop/database/url"
"""Where present: the SQLAlchemy URL of the capture database. Absent: SQLite at `DATA_PATH`/tuneloop.db."""
DATA_PATH = "/var/lib/tuneloop"
TOKEN_PATH = "/var/run/secrets/tuneloop"
"""Projected folder with `token` and `ca.crt`, for the watch of the ConfigMap and of the engines' EndpointSlices."""
PUBLIC_PORT = 8080
"""/v1/chat/completions, /v1/completions, /v1/models, /v1/feedback, /healthz, /readyz"""
INTERNAL_PORT = 8081
"""/internal/state (open), /metrics (open), /internal/export, /internal/labels, /internal/usage and /internal/forget (token)"""
ENGINE_PORT = 8000
ENGINE_PROBES_PATH = "/tuneloop/probes"
"""Answered by the engine's guard (with the engine key): JSON list of the trainer's `Probe` items recorded for its artifact."""
ENGINE_REFERENCE_PATH = "/tuneloop/reference"
"""Likewise: JSON list of texts, a sample of the inputs that its artifact was trained on."""
ENGINE_VERSION_PATH = "/version"
ENGINE_ADAPTERS_PATH = "/tuneloop/adapters"
"""PUT to the engine's guard (with the engine key) what adapters this replica shall have (`WantedAdapters`); it answers `LoadedAdapters`."""
FEEDBACK_HEADER = "x-tuneloop-feedback"
REVISION_HEADER = "x-tuneloop-revision"
SESSION_HEADER = "x-tuneloop-session"
"""Of a request: what a client calls its session. While a canary runs, a session's requests stay on one revision."""
TOKEN_HEADER = "x-tuneloop-token"
"""The internal token, for callers that cannot send Authorization (the API server's service proxy drops it)."""


def tokens_digest(tokens: list[int]) -> str:
    """Of token ids in order; the trainer computes the same of what it trains on."""
    return "sha256:" + hashlib.sha256(json.dumps(tokens, separators=(",", ":")).encode()).hexdigest()


class Model(BaseModel):
    """Frozen, closed, camelCase at the edge."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


# --- configuration -----------------------------------------------------------


class FewShot(Model):
    input: str
    output: str


class Prompt(Model):
    """Applied to a request before it goes to the engine. Absent fields leave the request as it is."""

    system: str | None = None
    """Put first, unless the request has a system message of its own."""
    template: str | None = None
    """Sandboxed Jinja over `text` (also `input`): the last user message (chat) or the prompt (completions)."""
    few_shot: tuple[FewShot, ...] = ()
    """User and assistant turns before the last user message."""
    temperature: float | None = None
    """Defaults for what a request does not set."""
    max_tokens: int | None = None


MAX_ADAPTERS = 32
"""Of one replica; what drained first is left out beyond."""


class Adapter(Model):
    """A LoRA adapter that the replicas of a shared engine load while they run. Paths are those in the engine's pod."""

    path: str = Field(max_length=4096)
    digest: str = Field(max_length=80)
    """Of its manifest: compared, and every file with the manifest, before the engine reads it."""
    probes: str | None = Field(default=None, max_length=4096)
    """File of the probe items recorded for it."""
    reference: str | None = Field(default=None, max_length=4096)
    """File of a sample of the inputs that it was trained on."""


class NamedAdapter(Adapter):
    name: str = Field(max_length=253)
    """What the engine calls it: another name for other bytes, so that nothing cached of one is used for another."""


class WantedAdapters(Model):
    """All that a replica shall have: what is missing is verified and loaded, what is not named is unloaded."""

    generation: int
    """Of the gateway's configuration: who has an older one changes nothing."""
    adapters: tuple[NamedAdapter, ...] = Field(max_length=MAX_ADAPTERS)


class LoadedAdapters(BaseModel):
    """What the replica has, by its engine's own /v1/models. Open: an engine keeps the guard of the release that made it."""

    loaded: tuple[str, ...] = ()
    errors: dict[str, str] = {}
    """Name -> why it could not be loaded: what the verification found, or the engine's own sentence."""


class RevisionState(StrEnum):
    CANDIDATE = "Candidate"
    """Probed and warmed up; takes no user traffic unless its weight says so."""
    STABLE = "Stable"
    DRAINING = "Draining"
    """No new requests; running ones end."""


class Revision(Model):
    """One revision of the deployment, and the engine that serves it."""

    name: str
    """The ControllerRevision's name; the label `revision` of the metrics."""
    version: int | None = None
    """The ModelVersion's number, where there is one."""
    service: str
    """The engine's Service; its EndpointSlices are the replicas. The host `<service>.<namespace>.svc` is the fallback."""
    model_id: str
    """What to send as `model` to the engine."""
    adapter: Adapter | None = None
    """Set where the engine is shared: only replicas that say they have it are asked."""
    prompt: Prompt = Prompt()
    state: RevisionState
    weight: Annotated[int, Field(ge=0, le=100)]
    """Percent of the traffic."""
    probe: bool = False
    """Ask the probe items recorded with the artifact, and report the agreement."""
    probe_text: str | None = None
    """Said by a user; `RevisionReport.prompt_digest` tells which prompt the engine reads then."""
    reference: bool = False
    """The engine has a sample of the inputs that the model was trained on: live ones are compared with it."""


class Capture(Model):
    sample_rate: float = 1.0
    personal_data: Literal["Redact", "Keep"] = "Redact"
    retention_days: int = 30
    queue_size: int = 2000


class Drift(Model):
    """Detector B (sequential classifier e-CUSUM) on users' inputs."""

    size: int = 2000
    """Rows of the reference."""
    false_alarm_every_requests: float = 100_000
    """c: the guaranteed average run length in sampled requests; the alarm threshold is ln(c)."""
    horizon_days: float = 30
    mix_over_seconds: float = 86_400
    epoch: str = "0"
    """Changes when the e-process must start afresh (promotion, re-arming)."""
    seed: Literal["Fresh", "SinceAlarm"] = "Fresh"
    """Where the new epoch's reference comes from: live traffic to come, or inputs captured since the alarm of the epoch before."""
    collect: bool = True
    """False until a version takes full traffic: nothing is sampled into a reference."""


class Limits(Model):
    max_body_bytes: int = 1 << 20
    requests_per_minute: int | None = None
    """Per API key, over all replicas; callers without a key count as one."""
    tokens_per_minute: int | None = None
    """Likewise: tokens of prompts and answers, as the engines report them."""
    upstream_timeout_seconds: float = 300
    """From when there is a replica for it."""
    max_in_flight: int = 512
    """Requests that are answered or wait."""
    max_held_bytes: int = 32 << 20
    """Of the bodies of requests that wait for a replica."""


class Tracing(Model):
    """Spans of requests, to an OTLP/HTTP receiver."""

    endpoint: str = Field(max_length=512)
    """Without `/v1/traces`."""
    sample_rate: float = Field(ge=0, le=1)
    """Share of the requests that are recorded, where their sender did not decide."""


class GatewayConfig(Model):
    version: Literal[1] = 1
    generation: int
    """Grows with every change; the gateway reports the one it has applied."""
    namespace: str
    deployment: str
    model: str
    """The model name that clients use and `/v1/models` lists."""
    task: Literal["Chat", "Completion"] = "Chat"
    revisions: tuple[Revision, ...] = ()
    affinity: Literal["Session", "Request"] = "Session"
    """What stays on one revision where several have a weight. Session: of one caller, what has one `SESSION_HEADER`, or begins alike."""
    window: str = Field(default="", max_length=160)
    """Names the step of a canary: outcomes are counted afresh when it changes, and not at all where it is empty."""
    require_key: bool = False
    """True: a request without a key of `KEYS_PATH` is answered 401."""
    capture: Capture = Capture()
    drift: Drift | None = None
    max_share_of_one_subject: float = 0.02
    """Share of the exported training rows that one subject may contribute."""
    limits: Limits = Limits()
    asleep: bool = False
    """No engine runs, or is to run: requests wait, and `GatewayState.held` asks for one."""
    hold_seconds: float | None = Field(default=None, gt=0)
    """How long a request waits for a ready replica before it is answered 503; None: the gateway's own setting."""
    tracing: Tracing | None = None


# --- state -------------------------------------------------------------------


class ProbeState(Model):
    status: Literal["Pending", "Running", "Done", "Failed", "NoProbes"]
    asked: int = 0
    agreed: int = 0
    message: str = Field(default="", max_length=300)


LATENCY_LEAST_SECONDS = 0.001
LATENCY_EDGE_RATIO = 1.05
LATENCY_BUCKETS = 240
"""Geometric buckets up to 118 seconds: bucket i holds what is below LEAST * RATIO**i, and not below the edge before; the last, the rest."""
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Buckets = Annotated[tuple[Count, ...], Field(max_length=LATENCY_BUCKETS)]


class Outcomes(Model):
    """What became of one revision's requests since the window began. Buckets at the end that are empty are left out."""

    requests: Count = 0
    """Answered, or failed. Not: refused for the client's fault, or given up by the client."""
    errors: Count = 0
    """5xx, `abort`, `error`, broken streams; also those that another replica answered then."""
    answers: Count = 0
    """Looked at for what follows."""
    empty: Count = 0
    refused: Count = 0
    repetitive: Count = 0
    cut_short: Count = 0
    """Ended by the limit on tokens."""
    first_token: Buckets = ()
    """Of streamed answers: seconds from arrival to the first token."""
    inter_token: Buckets = ()
    """Of streamed answers: seconds between two tokens, on average over the answer."""
    whole_answer: Buckets = ()
    """Of answers that were not streamed: seconds for each token."""
    up: Count = 0
    down: Count = 0


class RevisionReport(Model):
    name: str
    endpoints: int
    """Ready replicas that the gateway sees; of a revision with an adapter, those that have it."""
    load_error: str = Field(default="", max_length=600)
    """Why a replica could not load the revision's adapter; "" where none said so."""
    warm: bool = False
    """A warm-up prompt was answered."""
    warm_up_seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """It took so long, on the replica that took longest."""
    prompt_error: str = Field(default="", max_length=300)
    """Why the revision's prompt cannot be used at all; "" where it can."""
    probe: ProbeState = ProbeState(status="Pending")
    prompt_digest: str = Field(default="", max_length=80)
    """sha256 over the token ids that the engine makes of `Revision.probe_text`, through the revision's prompt. "" while not known."""
    engine_version: str = Field(default="", max_length=32)
    """vLLM's, as an engine of the revision told it after the warm-up. "" while not known."""
    requests: int = 0
    errors: int = 0
    in_flight: int = 0
    outcomes: Outcomes | None = None
    """While a canary runs: of the window that `GatewayState.window` names."""


class DriftStatus(StrEnum):
    OFF = "Off"
    COLLECTING = "Collecting"
    """The reference is being sampled."""
    MONITORING = "Monitoring"
    ALARM = "Alarm"
    """Latched until the epoch changes."""
    EXHAUSTED = "ReferenceExhausted"


class DriftReport(Model):
    status: DriftStatus
    epoch: str
    log_evidence: float = 0.0
    log_threshold: float = 0.0
    effect: float = 0.0
    """Prequential AUC over the last 500 pairs, minus 0.5."""
    pairs: int = 0
    reference_rows: int = 0
    reference_remaining: int = 0
    detected_at: str | None = None
    """RFC 3339, UTC."""


class SkewReport(Model):
    """The live inputs of the stable version beside those that it was trained on."""

    version: int | None
    status: Literal["Comparing", "Differ", "Alike"]
    """Differ: with evidence that chance does not give once in a hundred versions. Alike: all of the sample was used without that."""
    log_evidence: float = 0.0
    log_threshold: float = 0.0
    effect: float = 0.0
    """As of drift."""
    pairs: int = 0
    reference_rows: int = 0


class FeedbackReport(Model):
    up: int = 0
    down: int = 0
    corrections: int = 0
    labelled_train: int = 0
    """Curated rows of the current epoch that `/internal/export?split=train` would give."""
    labelled_gate: int = 0


class CaptureReport(Model):
    captured: int = 0
    dropped: int = 0
    """Not stored: the queue was full, or the database did not take it."""
    pending: int = 0


class GatewayState(Model):
    """Answer of `GET /internal/state`."""

    version: Literal[1] = 1
    pod_uid: str
    started_at: str
    generation: int
    """Of the configuration that is applied."""
    held: Count = 0
    """Requests that wait for a replica."""
    idle_seconds: float = 0.0
    """Since the last request was answered, or this process began; 0 while there is one, those that wait included."""
    revisions: tuple[RevisionReport, ...] = ()
    window: str = ""
    drift: DriftReport | None = None
    """None: its saved state has not been read yet, so there may be an alarm or none."""
    skew: SkewReport | None = None
    """None: nothing is compared, or the saved state has not been read yet."""
    feedback: FeedbackReport = FeedbackReport()
    capture: CaptureReport = CaptureReport()


# --- rows --------------------------------------------------------------------


class CapturedRow(Model):
    """A row of `GET /internal/labels?limit=N&uniform=1` (NDJSON): what a reviewer labels. Drawn uniformly from captured traffic."""

    id: str
    text: str
    """The last user message, redacted as captured."""
    answer: str
    captured_at: str


class LabelRow(Model):
    """A row of `POST /internal/labels` (NDJSON, at most 10,000 a request). A later label of the same id replaces the earlier."""

    id: str
    label: str = Field(max_length=8192)
    document: str | None = Field(default=None, max_length=256)
    """Rows of one document never stand on both sides of the split. Absent: the hash of the text."""


class LabelReceipt(Model):
    """Answer of `POST /internal/labels`."""

    accepted: int
    unknown: int
    """Ids that were never captured (or are past retention)."""
    train: int
    gate: int


class ExportRow(Model):
    """A row of `GET /internal/export?split=train|gate&rows=Labels|Ratings|Preferences` (NDJSON), in the order of ids."""

    id: str
    document: str
    text: str
    """What was asked: the last user message, before the deployment's prompt."""
    kind: Literal["Label", "Correction", "Rating", "Preference"]
    label: str | None = None
    """Of a Label or Correction."""
    completion: str | None = None
    desirable: bool | None = None
    """Of a Rating: the answer, and whether people found it good."""
    chosen: str | None = None
    rejected: str | None = None
    """Of a Preference: the better and the worse answer."""


class UsageRow(Model):
    """A row of `GET /internal/usage?since=2026-01-01&until=2026-01-31` (NDJSON): what one key used on one day (UTC), over all replicas."""

    day: str
    key: str | None
    """The key's name; None where there is no such key any more."""
    subject: str
    """The name's pseudonym."""
    requests: int
    """Answered, or cut off by the client after the answer began."""
    failed: int
    """Not answered, or not to the end, without the client's doing; their tokens are not counted."""
    prompt_tokens: int
    completion_tokens: int


class ForgetRequest(Model):
    """Body of `POST /internal/forget`: whose rows to delete. One of the two."""

    key: str | None = Field(default=None, min_length=1, max_length=253)
    """Name of an API key, as in `KEYS_PATH`; `anonymous`: all who had none."""
    subject: str | None = Field(default=None, pattern="^[0-9a-f]{24}$")
    """Its pseudonym, where a table or an answer to this request showed it."""


class ForgetReceipt(Model):
    """Answer of `POST /internal/forget`: rows that were deleted."""

    subject: str
    captured: int = 0
    feedback: int = 0
    labels: int = 0
    corrections: int = 0


# --- names of metrics (prometheus-client adds _total to counters) ---------------


class Metric:
    """Names that dashboards, rules and the operator rely on. Labels: namespace, deployment (+ revision where per revision)."""

    REQUESTS = "tuneloop_gateway_requests"
    """counter; + revision, code (2xx 4xx 5xx), finish_reason"""
    REQUEST_SECONDS = "tuneloop_gateway_request_seconds"
    """histogram; + revision"""
    FIRST_BYTE_SECONDS = "tuneloop_gateway_time_to_first_byte_seconds"
    """histogram; + revision"""
    INTER_TOKEN_SECONDS = "tuneloop_gateway_inter_token_seconds"
    """histogram; + revision. Of streams: seconds between two tokens, on average over an answer."""
    CANARY_OUTCOMES = "tuneloop_gateway_canary_outcomes"
    """gauge; + revision, outcome (`Outcomes`' counts). While a canary runs: what this replica counted since its step began."""
    IN_FLIGHT = "tuneloop_gateway_in_flight_requests"
    HELD = "tuneloop_gateway_held_requests"
    RETRIES = "tuneloop_gateway_retries"
    """counter; + revision"""
    TOKENS = "tuneloop_gateway_tokens"
    """counter; + revision, kind (prompt, completion)"""
    KEY_REQUESTS = "tuneloop_gateway_key_requests"
    """counter; + key (name of the API key; `other` beyond 200 of them), outcome (answered, failed)"""
    KEY_TOKENS = "tuneloop_gateway_key_tokens"
    """counter; + key, kind (prompt, completion)"""
    REVISION_WEIGHT = "tuneloop_gateway_revision_weight_percent"
    """gauge; + revision, version"""
    PROBE_AGREEMENT = "tuneloop_gateway_probe_agreement_ratio"
    """gauge; + revision"""
    CAPTURED = "tuneloop_gateway_captured"
    CAPTURE_DROPPED = "tuneloop_gateway_capture_dropped"
    """counter; + reason (queue_full, database)"""
    ROWS_DELETED = "tuneloop_gateway_rows_deleted"
    """counter; + table (captured, feedback, labels, corrections), reason (retention, subject)"""
    FEEDBACK = "tuneloop_feedback"
    """counter; + kind (rating, preference, correction), value (up, down, none)"""
    LABELLED_ROWS = "tuneloop_feedback_labelled_rows"
    """gauge; + split"""
    DRIFT_LOG_EVIDENCE = "tuneloop_drift_log_evidence"
    DRIFT_LOG_THRESHOLD = "tuneloop_drift_log_threshold"
    DRIFT_EFFECT = "tuneloop_drift_effect"
    DRIFT_ALARM = "tuneloop_drift_alarm"
    """gauge, 0 or 1, latched"""
    DRIFT_REFERENCE_REMAINING = "tuneloop_drift_reference_remaining_rows"
    DRIFT_PAIRS = "tuneloop_drift_pairs"
    """gauge: pairs tested in this epoch"""
    SKEW_LOG_EVIDENCE = "tuneloop_skew_log_evidence"
    SKEW_LOG_THRESHOLD = "tuneloop_skew_log_threshold"
    SKEW_EFFECT = "tuneloop_skew_effect"
    SKEW_DETECTED = "tuneloop_skew_detected"
    """gauge, 0 or 1: live inputs differ from those of the training"""
    SKEW_PAIRS = "tuneloop_skew_pairs"
    CONFIG_GENERATION = "tuneloop_gateway_config_generation"
