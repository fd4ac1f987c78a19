"""Runs stages through the real launcher and the real worker, without importing torch anew for each: both are forked from this process.

Read from stdin: one JSON object a line, `{"stage", "environment"}`. Written to stdout: the launcher's process id, then its exit code.
Each launcher leads a session of its own, so that killing its process group kills all of a pod.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

from tuneloop_trainer import launcher, worker, workers
from tuneloop_trainer.contract import Stage

ENV_SAMPLES = "TEST_SAMPLES_FILE"
"""Where each training step writes which rows it is given."""
ENV_HANG_AT, ENV_OUT_OF_MEMORY_AT = "TEST_HANG_AT", "TEST_OUT_OF_MEMORY_AT"
"""A step of which the attempt hangs, or is out of memory."""


class Forked:
    """What the launcher uses of Popen, for a worker that is forked."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.pid = fork(signal.SIG_DFL)
        if self.pid == 0:
            leave(lambda: work(command[-1], env))

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def work(stage: str, env: Mapping[str, str]) -> int:
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["worker", stage]
    record_samples()
    return worker.main()


def launch(stage: str, environment: Mapping[str, str]) -> int:
    os.setsid()
    os.environ.update(environment)
    return launcher.Launcher(Stage(stage), launcher.Surroundings.from_environment()).run()


def record_samples() -> None:
    """Before each forward pass: the step, and a hash of every row of the micro-batch."""
    from tuneloop_trainer.training.trainer import Resumable

    original = Resumable.training_step

    def recorded(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = [hashlib.sha256(bytes(str(ids[mask.bool()].tolist()), "ascii")).hexdigest()[:12] for ids, mask in _rows(inputs)]
        step = self.state.global_step + 1
        line = json.dumps({"step": step, "rank": int(os.environ.get("RANK", "0")), "worker": os.getpid(), "rows": rows}) + "\n"
        descriptor = os.open(os.environ[ENV_SAMPLES], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, line.encode())
        os.close(descriptor)
        go_wrong(step)
        return original(self, model, inputs, *args, **kwargs)

    Resumable.training_step = recorded  # type: ignore[method-assign]


def go_wrong(step: int) -> None:
    """At one step, as the test asks for."""
    if os.environ.get(ENV_HANG_AT) == str(step):
        time.sleep(600)
    if os.environ.get(ENV_OUT_OF_MEMORY_AT) == str(step):
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory.")


def _rows(inputs: Any) -> Any:
    import torch

    if isinstance(inputs, list):  # prompts, which completions are yet to be written to
        ids = [torch.tensor(row["input_ids"]) for row in inputs]
        return [(one, torch.ones_like(one)) for one in ids]
    mask = inputs.get("attention_mask")
    return zip(inputs["input_ids"], mask if mask is not None else torch.ones_like(inputs["input_ids"]), strict=True)


def fork(on_sigterm: signal.Handlers) -> int:
    """As a new program begins: without its parent's handler, and with no moment in which SIGTERM would be lost to that."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, on_sigterm)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    return pid


def leave(run: Callable[[], int]) -> NoReturn:
    code = 70
    try:
        code = run()
    except BaseException:  # noqa: BLE001  # the last place where it can be seen
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    import tuneloop_trainer.stages.prepare
    import tuneloop_trainer.stages.train
    import tuneloop_trainer.training.callbacks
    import tuneloop_trainer.training.trainer  # noqa: F401

    workers.subprocess = SimpleNamespace(Popen=Forked)  # type: ignore[assignment]  # theirs alone: libraries start programs too
    for line in sys.stdin:
        asked = json.loads(line)
        pid = fork(signal.SIG_IGN)  # as PID 1 of a container is given no signal that it has no handler for
        if pid == 0:
            os.dup2(2, 1)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            leave(lambda asked=asked: launch(asked["stage"], asked["environment"]))  # type: ignore[misc]
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
