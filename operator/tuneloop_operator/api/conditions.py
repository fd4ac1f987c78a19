"""Condition types and reasons: every word that a status may say."""

from __future__ import annotations

from enum import StrEnum


class JobCondition(StrEnum):
    """Conditions of a FineTuneJob. The first five are there from the first write; the last three only when True."""

    SUCCEEDED = "Succeeded"
    DATA_READY = "DataReady"
    TRAINED = "Trained"
    PACKAGED = "Packaged"
    EVALUATED = "Evaluated"
    SUSPENDED = "Suspended"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"


class VersionCondition(StrEnum):
    """Conditions of a ModelVersion."""

    VERIFIED = "Verified"
    IN_USE = "InUse"


class DeploymentCondition(StrEnum):
    """Conditions of a ModelDeployment; Reconciling and Stalled only when True, all others from the first write."""

    AVAILABLE = "Available"
    READY = "Ready"
    CANARY_HEALTHY = "CanaryHealthy"
    DRIFT_DETECTED = "DriftDetected"
    TRAINING_SERVING_SKEW = "TrainingServingSkew"
    RETRAINING_NEEDED = "RetrainingNeeded"
    DEGRADED = "Degraded"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"


class JobReason(StrEnum):
    """Reasons of a FineTuneJob's conditions."""

    # progress
    PENDING = "Pending"
    PREPARING = "Preparing"
    TRAINING = "Training"
    PACKAGING = "Packaging"
    EVALUATING = "Evaluating"
    SUSPENDED = "Suspended"
    COMPLETED = "Completed"
    ALREADY_TRAINED = "AlreadyTrained"
    # outcomes of the gates
    GATE_PASSED = "GatePassed"
    GATE_FAILED = "GateFailed"
    GATE_INCONCLUSIVE = "GateInconclusive"
    NO_GATES = "NoGates"
    SUITE_EXHAUSTED = "SuiteExhausted"
    # what went wrong
    INVALID_ARGUMENT = "InvalidArgument"
    DATA_INVALID = "DataInvalid"
    DATA_EMPTY = "DataEmpty"
    MODEL_NOT_FOUND = "ModelNotFound"
    ACCESS_DENIED = "AccessDenied"
    SOURCE_UNAVAILABLE = "SourceUnavailable"
    STORE_UNAVAILABLE = "StoreUnavailable"
    SECRET_NOT_FOUND = "SecretNotFound"
    CLAIM_NOT_FOUND = "ClaimNotFound"
    QUOTA_EXCEEDED = "QuotaExceeded"
    UNSCHEDULABLE = "Unschedulable"
    VOLUME_NOT_SHARED = "VolumeNotShared"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    DOES_NOT_FIT = "DoesNotFit"
    OUT_OF_MEMORY = "OutOfMemory"
    REWARD_FAILED = "RewardFailed"
    NON_FINITE_LOSS = "NonFiniteLoss"
    LOSS_SPIKE = "LossSpike"
    STEP_STALLED = "StepStalled"
    PREEMPTED = "Preempted"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    RESTART_LIMIT = "RestartLimit"
    NAME_CONFLICT = "NameConflict"
    REFUSED = "Refused"
    INTERNAL_ERROR = "InternalError"


class VersionReason(StrEnum):
    """Reasons of a ModelVersion's conditions."""

    EVALUATED_BY_DIGEST = "EvaluatedByDigest"
    NOT_EVALUATED = "NotEvaluated"
    SERVED = "Served"
    NOT_SERVED = "NotServed"


class DeploymentReason(StrEnum):
    """Reasons of a ModelDeployment's conditions."""

    # Available, Ready
    SERVING = "Serving"
    STARTING = "Starting"
    ROLLING_OUT = "RollingOut"
    ROLLED_BACK = "RolledBack"
    NO_ENDPOINTS = "NoEndpoints"
    SCALED_TO_ZERO = "ScaledToZero"
    # what stands in the way
    VERSION_NOT_FOUND = "VersionNotFound"
    NO_APPROVED_VERSION = "NoApprovedVersion"
    NOT_SERVABLE = "NotServable"
    NO_LEADER_WORKER_SETS = "NoLeaderWorkerSets"
    INVALID_OPTION = "InvalidOption"
    PROMPT_MISMATCH = "PromptMismatch"
    RUNTIME_VULNERABLE = "RuntimeVulnerable"
    PROMPT_INVALID = "PromptInvalid"
    SERVING_MISMATCH = "ServingMismatch"
    ENGINE_FAILED = "EngineFailed"
    MODEL_NOT_FOUND = "ModelNotFound"
    ACCESS_DENIED = "AccessDenied"
    STARTUP_TIMEOUT = "StartupTimeout"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    UNSCHEDULABLE = "Unschedulable"
    OUT_OF_MEMORY = "OutOfMemory"
    SECRET_NOT_FOUND = "SecretNotFound"
    QUOTA_EXCEEDED = "QuotaExceeded"
    NAME_CONFLICT = "NameConflict"
    REFUSED = "Refused"
    # canary
    NO_CANARY = "NoCanary"
    ANALYSING = "Analysing"
    CANARY_INCONCLUSIVE = "CanaryInconclusive"
    CANARY_FAILED = "CanaryFailed"
    CANARY_PASSED = "CanaryPassed"
    NO_DEVICE_FOR_CANARY = "NoDeviceForCanary"
    # drift
    DRIFT_ALARM = "DriftAlarm"
    NO_DRIFT = "NoDrift"
    COLLECTING_REFERENCE = "CollectingReference"
    REFERENCE_EXHAUSTED = "ReferenceExhausted"
    NO_DATA = "NoData"
    NOT_MONITORED = "NotMonitored"
    # training-serving skew
    NO_REFERENCE = "NoReference"
    COMPARING = "Comparing"
    INPUTS_DIFFER = "InputsDiffer"
    INPUTS_ALIKE = "InputsAlike"
    # retraining
    NOT_NEEDED = "NotNeeded"
    EFFECT_TOO_SMALL = "EffectTooSmall"
    COLLECTING_DATA = "CollectingData"
    NEEDS_LABELS = "NeedsLabels"
    COOLDOWN = "Cooldown"
    BUDGET_EXHAUSTED = "BudgetExhausted"
    AWAITING_APPROVAL = "AwaitingApproval"
    RETRAINING = "Retraining"
    RETRAINING_FAILED = "RetrainingFailed"
    GATE_FAILED = "GateFailed"
    NO_TEMPLATE = "NoTemplate"
    HEALTHY = "Healthy"
    WITHDRAWN = "Withdrawn"
