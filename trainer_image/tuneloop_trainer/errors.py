"""What a stage raises to end with a reason: each class knows its exit code, and `worker` maps it once."""

from __future__ import annotations

from tuneloop_trainer.contract import ExitCode, Reason


class StageError(Exception):
    """Ends the stage with a reason and one sentence that the user can act on."""

    exit_code = ExitCode.BUG
    reason: Reason = Reason.INTERNAL_ERROR

    def __init__(self, message: str, reason: Reason | None = None) -> None:
        super().__init__(message)
        self.message = message
        if reason is not None:
            self.reason = reason


class Invalid(StageError):
    """The user's input is wrong; another attempt would end the same."""

    exit_code = ExitCode.INVALID
    reason = Reason.DATA_INVALID


class RewardFailed(Invalid):
    """A reward raised, took too long, or is no number: whoever wrote it has to look."""

    reason = Reason.REWARD_FAILED


class OutOfMemory(StageError):
    exit_code = ExitCode.OUT_OF_MEMORY
    reason = Reason.OUT_OF_MEMORY


class NonFinite(StageError):
    """The loss or the gradient is no longer a number."""

    exit_code = ExitCode.NON_FINITE
    reason = Reason.NON_FINITE_LOSS


class LossSpike(NonFinite):
    """The loss is a number, and far above what it was."""

    reason = Reason.LOSS_SPIKE


class Unavailable(StageError):
    """Something outside does not answer; another attempt may do better."""

    exit_code = ExitCode.UNAVAILABLE
    reason = Reason.SOURCE_UNAVAILABLE


class Changed(Unavailable):
    """What several pods read of the same place is not the same."""


class PeerLost(StageError):
    """Another process that trains the same model went away."""

    exit_code = ExitCode.PEER_LOST
    reason = Reason.PREEMPTED


class Interrupted(BaseException):
    """SIGTERM was received; what was reached is saved. No `Exception`, so that no library's broad except takes it for its own."""

    exit_code = ExitCode.INTERRUPTED
    reason = Reason.PREEMPTED

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Mismatch(StageError):
    """A published folder is not what its manifest says."""
