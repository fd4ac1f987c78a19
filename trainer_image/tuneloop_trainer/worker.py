"""The process that does a stage's work: `python -m tuneloop_trainer.worker <stage>`, started by the launcher."""

from __future__ import annotations

import errno
import faulthandler
import logging
import os
import signal
import sys
from pathlib import Path

from tuneloop_trainer.contract import ExitCode, Reason, RunConfig, Stage, StageResult
from tuneloop_trainer.errors import Interrupted, OutOfMemory, PeerLost, StageError, Unavailable
from tuneloop_trainer.interrupts import Interrupts
from tuneloop_trainer.launcher import ENV_CONFIG, ENV_POD_UID, ENV_PROGRESS, ENV_RESULT
from tuneloop_trainer.progress import ProgressWriter
from tuneloop_trainer.results import sentence, write_result
from tuneloop_trainer.workers import Place

log = logging.getLogger("tuneloop.worker")
STORE_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO)
)
"""What a file system answers that is full or away: nothing that the stage did wrong."""
HINTS = {
    ExitCode.OUT_OF_MEMORY: "Lower training.maxSequenceLength, or give the pod more memory.",
}


def main() -> int:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    os.umask(0o022)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    interrupts = Interrupts()
    interrupts.install()
    stage = Stage(sys.argv[1])
    config = RunConfig.model_validate_json(Path(os.environ[ENV_CONFIG]).read_bytes())
    progress = ProgressWriter(Path(os.environ[ENV_PROGRESS]), stage, os.environ.get(ENV_POD_UID, ""))
    result = run(stage, config, progress, interrupts)
    result = result.model_copy(update={"phase_seconds": progress.phase_seconds()})
    write_result(Path(os.environ[ENV_RESULT]), result)
    return result.exit_code


def run(stage: Stage, config: RunConfig, progress: ProgressWriter, interrupts: Interrupts) -> StageResult:
    """Run a stage; whatever it raises becomes a result."""
    try:
        with interrupts:
            return _stage(stage, config, progress, interrupts)
    except (StageError, Interrupted) as error:
        return _failure(stage, error)
    except Exception as error:  # the last place where an error can still be told
        if _is_out_of_memory(error):
            return _failure(stage, OutOfMemory(f"{type(error).__name__}: {error}"))
        if isinstance(error, OSError) and error.errno in STORE_ERRORS:
            where = f" ({error.filename})" if error.filename else ""
            log.exception("stage %s cannot read or write", stage.value)
            return _failure(stage, Unavailable(f"The store does not answer or is full: {error.strerror}{where}.", Reason.STORE_UNAVAILABLE))
        if _is_of_peers(error):
            return _failure(stage, PeerLost(f"Another process of the training went away: {sentence(str(error), 200)}"))
        log.exception("stage %s failed", stage.value)
        message = sentence(f"{type(error).__name__}: {error}")
        return StageResult(stage=stage, exit_code=ExitCode.BUG, reason=Reason.INTERNAL_ERROR, message=message)


def _stage(stage: Stage, config: RunConfig, progress: ProgressWriter, interrupts: Interrupts) -> StageResult:
    # Imported here: each stage pulls in only the libraries that it needs.
    match stage:
        case Stage.PREPARE:
            from tuneloop_trainer.data.formats import Share
            from tuneloop_trainer.stages.prepare import prepare

            place = Place.from_environment(os.environ)
            return prepare(config, progress, Share(place.node, place.nodes))
        case Stage.TRAIN:
            from tuneloop_trainer.stages.train import train

            return train(config, progress, interrupts)
        case Stage.PACKAGE:
            from tuneloop_trainer.stages.package import package

            return package(config, progress)
        case Stage.EVALUATE:
            from tuneloop_trainer.stages.evaluate import evaluate
            from tuneloop_trainer.stages.push import push

            return push(config, evaluate(config, progress), progress)


def _failure(stage: Stage, error: StageError | Interrupted) -> StageResult:
    message = sentence(" ".join(filter(None, (sentence(error.message, 480), HINTS.get(error.exit_code)))))
    return StageResult(stage=stage, exit_code=error.exit_code, reason=error.reason, message=message)


def _is_of_peers(error: Exception) -> bool:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    from tuneloop_trainer.training.world import is_of_peers

    return is_of_peers(error)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


if __name__ == "__main__":
    sys.exit(main())
