"""PID 1 of a stage's pod: starts the worker, forwards SIGTERM, reaps, watches for stalls, and tells the operator how it ended.

The worker is a process of its own because what ends it may not be catchable: the kernel's OOM killer, a crash in native code,
a device that hangs. The launcher imports no ML library, so it stays small and always answers.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from tuneloop_trainer import contract, hardware
from tuneloop_trainer.contract import ExitCode, Progress, Reason, RunConfig, Stage, StageResult
from tuneloop_trainer.progress import read_progress
from tuneloop_trainer.results import sentence, write_result, write_termination
from tuneloop_trainer.server import ProgressServer
from tuneloop_trainer.watchdog import Watchdog
from tuneloop_trainer.workers import Place, Workers

log = logging.getLogger("tuneloop.launcher")
WORKER = (sys.executable, "-m", "tuneloop_trainer.worker")
ENDING = (signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 0.2
STACKS_SECONDS = 1.0
"""Time that a stalled worker has to print its stacks before it is killed."""
ENV_CONFIG = "TUNELOOP_CONFIG"
ENV_PROGRESS = "TUNELOOP_PROGRESS_FILE"
ENV_RESULT = "TUNELOOP_RESULT_FILE"
ENV_POD_UID = "POD_UID"
CACHES = ("HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR")


@dataclass(frozen=True)
class Surroundings:
    """Where the launcher reads and writes; from the environment in a pod, made up in tests."""

    config: Path
    termination: Path
    port: int
    pod_uid: str
    place: Place
    environment: Mapping[str, str]

    @classmethod
    def from_environment(cls) -> Surroundings:
        env = os.environ
        return cls(
            config=Path(env.get(ENV_CONFIG, contract.CONFIG_PATH)),
            termination=Path(env.get("TERMINATION_PATH", contract.TERMINATION_PATH)),
            port=int(env.get("PROGRESS_PORT", contract.PROGRESS_PORT)),
            pod_uid=env.get(ENV_POD_UID, ""),
            place=Place.from_environment(env),
            environment=dict(env),
        )


class Launcher:
    """One run of one stage."""

    def __init__(self, stage: Stage, surroundings: Surroundings, command: Sequence[str] = WORKER) -> None:
        self._stage = stage
        self._at = surroundings
        self._command = [*command, stage.value]
        self._scratch = Path(tempfile.mkdtemp(prefix="tuneloop-"))
        self._progress_file = self._scratch / "progress-0.json"
        self._workers = Workers()
        self._terminated = False

    def run(self) -> int:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
        os.umask(0o022)
        for number in ENDING:
            signal.signal(number, self._forward)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        try:
            return self._run()
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _run(self) -> int:
        try:
            config = RunConfig.model_validate_json(self._at.config.read_bytes())
        except (OSError, ValidationError) as error:
            return self._tell(None, self._failure(ExitCode.BUG, f"The run's configuration cannot be read: {error}"))
        with self._serving():
            oom_kills = hardware.oom_kills()
            self._start(config)
            stalled = self._watch(config)
            killed_for_memory = (hardware.oom_kills() or 0) > (oom_kills or 0)
            return self._tell(config, self._conclude(stalled, killed_for_memory))

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """Answer progress meanwhile. A port that is taken costs the progress, not the stage."""
        try:
            server = ProgressServer(self._at.port, self._progress)
        except OSError as error:
            log.error("port %d cannot be served, there will be no progress: %s", self._at.port, error.strerror)
            yield
            return
        server.start()
        try:
            yield
        finally:
            server.stop()

    def _start(self, config: RunConfig) -> None:
        """One worker; one for each device where several train together."""
        place = self._at.place if self._stage is Stage.TRAIN else Place()
        for local in range(place.processes):
            result = self._scratch / f"result-{local}.json"
            environment = worker_environment(self._at.environment, self._scratch, config, place.processes) | place.environment(local)
            environment |= {
                ENV_CONFIG: str(self._at.config),
                ENV_PROGRESS: str(self._scratch / f"progress-{local}.json"),
                ENV_RESULT: str(result),
                ENV_POD_UID: self._at.pod_uid,
            }
            self._workers.start(self._command, environment, result)
        if self._terminated:
            self._workers.signal(signal.SIGTERM)

    def _watch(self, config: RunConfig) -> Watchdog | None:
        """Wait for the workers, reaping whatever else falls to PID 1. Returns the watchdog if that ended them."""
        watchdog = Watchdog(config.stall_seconds, time.monotonic()) if self._stage is Stage.TRAIN else None
        while True:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended:
                self._workers.reaped(ended, os.waitstatus_to_exitcode(status))
                if self._workers.are_over:
                    return None
                continue
            self._workers.end_what_is_left()
            if watchdog is not None and watchdog.is_stalled(read_progress(self._progress_file), time.monotonic()):
                self._kill_stalled()
                return watchdog
            time.sleep(POLL_SECONDS)

    def _kill_stalled(self) -> None:
        log.error("no step for too long: asking the worker for its stacks, then ending it")
        self._workers.signal(signal.SIGUSR1)
        time.sleep(STACKS_SECONDS)
        self._workers.signal(signal.SIGKILL)
        while not self._workers.are_over:
            ended, status = os.waitpid(-1, 0)
            self._workers.reaped(ended, os.waitstatus_to_exitcode(status))

    def _conclude(self, stalled: Watchdog | None, killed_for_memory: bool) -> StageResult:
        code, result = self._workers.outcome()
        if result is not None and stalled is None:
            return result
        if stalled is not None:
            return self._failure(ExitCode.STALLED, f"No step for {stalled.limit_seconds:.0f} s; the worker was ended.", Reason.STEP_STALLED)
        if code == -signal.SIGKILL:
            by = "the kernel, for memory" if killed_for_memory else "SIGKILL, most likely for memory"
            return self._failure(ExitCode.OUT_OF_MEMORY, f"The worker was ended by {by}.", Reason.OUT_OF_MEMORY)
        if self._terminated and code in (-signal.SIGTERM, -signal.SIGINT):
            return self._failure(ExitCode.INTERRUPTED, "Ended by SIGTERM before there was anything to save.", Reason.PREEMPTED)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return self._failure(ExitCode.BUG, f"The worker ended with {how} and left no result; its log has the cause.")

    def _tell(self, config: RunConfig | None, result: StageResult) -> int:
        try:
            write_termination(self._at.termination, result)
        except OSError as error:
            log.error("the termination message cannot be written: %s", error)
        try:
            if config is not None and self._at.place.node == 0:
                write_result(Path(config.paths.work) / f"{self._stage.value}-result.json", result)
        except OSError as error:
            log.error("the result cannot be written to the store: %s", error)
        log.info("stage=%s exit_code=%d reason=%s %s", self._stage.value, result.exit_code, result.reason, result.message)
        return result.exit_code

    def _failure(self, code: ExitCode, message: str, reason: Reason = Reason.INTERNAL_ERROR) -> StageResult:
        return StageResult(stage=self._stage, exit_code=code, reason=reason, message=sentence(message))

    def _progress(self) -> Progress:
        progress = read_progress(self._progress_file)
        return progress or Progress(pod_uid=self._at.pod_uid, stage=self._stage, phase="Starting")

    def _forward(self, number: int, frame: object) -> None:
        self._terminated = True
        self._workers.signal(signal.SIGTERM)


def worker_environment(inherited: Mapping[str, str], scratch: Path, config: RunConfig, processes: int = 1) -> dict[str, str]:
    """The worker's environment: every cache in scratch (the root is read-only and the user may have no home), threads as the
    quota says, and no network for stages that need none."""
    threads = str(max(1, hardware.cpu_threads(config.threads) // processes))
    caches = {name: str(scratch / name.lower()) for name in CACHES}
    own = {
        "HOME": str(scratch),
        "USER": "tuneloop",
        "LOGNAME": "tuneloop",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # Threads that wait for each other sleep instead of spinning: three times faster where others want the same CPUs.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return dict(inherited) | caches | own
