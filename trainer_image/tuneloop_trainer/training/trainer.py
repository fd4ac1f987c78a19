"""What is ours in every trainer, on rows that are tokenised already: the order, the checkpoints, the head."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch.utils.data import Sampler
from transformers import Trainer

from tuneloop_trainer.contract import Reason
from tuneloop_trainer.data.schedule import Order
from tuneloop_trainer.errors import Unavailable
from tuneloop_trainer.training import parts
from tuneloop_trainer.training.checkpoints import FAREWELL_SECONDS, OUTAGE_SECONDS, Checkpoints, Saves, is_of_the_store
from tuneloop_trainer.training.heads import select_positions
from tuneloop_trainer.training.publishing import Late
from tuneloop_trainer.training.rows import NewRowsFirst, in_two_parts

SCHEDULER = "scheduler.pt"


class OrderSampler(Sampler[int]):
    """The run's sequence of rows from the samples already consumed onwards."""

    def __init__(self, order: Order, consumed: int) -> None:
        self._rest = order[consumed:]

    def __len__(self) -> int:
        return len(self._rest)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rest.tolist())


class Resumable(Trainer):
    """What every objective's trainer has before its own: rows in a given order, checkpoints that are complete or not there at all,
    and the language-model head only where a token is learned."""

    def __init__(
        self,
        *args: Any,  # Any: TRL's
        order: Order,
        consumed: int,
        checkpoints: Checkpoints,
        is_sharded: bool = False,
        publishes_meanwhile: bool = False,
        columns: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.order = order
        self.consumed = consumed
        self.checkpoints = checkpoints
        self.saves = Saves()
        self.is_sharded = is_sharded
        self.publishes_meanwhile = publishes_meanwhile
        self.columns = columns
        if is_sharded:
            parts.keep_precision(kwargs["args"])
        self.first_steps = 0
        self.best_step: int | None = None
        self.figures: Callable[[], dict[str, float]] = dict
        """What is logged beside the loss of a step."""
        self._random_state_of: str | None = None
        super().__init__(*args, **kwargs)
        _complete_token_wrappers(self.model)
        _learn_in_full(self.model)
        models = list(filter(None, (self.model, getattr(self, "ref_model", None))))
        for model in models:
            select_positions(model, getattr(self, "temperature", 1.0), self.args.device.type)
        if self.is_fsdp_enabled and self.args.bf16:
            for model in models:
                parts.compute_in_half(model, self.args.device.type)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL would tokenise here; prepare has."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if self.columns is None:
            super()._set_signature_columns_if_needed()
        else:
            self._signature_columns = list(self.columns)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs | self.figures() if "loss" in logs else logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return OrderSampler(self.order, self.consumed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A save that may not be missed, the last one, the best one or that after SIGTERM, is tried for a while, and is published before
        anything else goes on."""
        step = self.state.global_step
        within = OUTAGE_SECONDS if step >= self.state.max_steps or step == self.best_step else None
        if within is None and self.control.should_training_stop:
            within = self._farewell()
        else:
            self._wait_for_the_last(OUTAGE_SECONDS)
        meanwhile = within is None and self.publishes_meanwhile
        self.saves.attempt(lambda: self._save_once(model, trial, meanwhile=meanwhile), within, is_all=not meanwhile)

    def _wait_for_the_last(self, seconds: float) -> None:
        """One checkpoint at a time. Raises Unavailable where the store does not take the one before."""
        try:
            self.settle(seconds)
        except Late as error:
            raise Unavailable(f"The store took no checkpoint for {seconds:.0f} s: {error}.", Reason.STORE_UNAVAILABLE) from error

    def _farewell(self) -> float:
        """After SIGTERM: half of the time for the checkpoint that is on its way, which is the nearer one, and how much is left for that of
        this step. Where it is late both are published at once, and whichever is complete by then counts."""
        started = time.monotonic()
        with suppress(Late):
            self.settle(FAREWELL_SECONDS / 2)
        return FAREWELL_SECONDS - (time.monotonic() - started)

    def settle(self, seconds: float = 0.0) -> None:
        """See to the checkpoint that is being published, and wait so long for it, then raise Late. All processes call this after the
        same steps."""
        try:
            step = self.checkpoints.publisher.settle(seconds)
        except Exception as error:
            if not is_of_the_store(error):
                raise
            self._drop(Path(self.args.output_dir))
            self.checkpoints.has_missed = True
            self.saves.failed_meanwhile(error)
            return
        if step is not None:
            self.checkpoints.saved_step = step
            self.saves.succeeded()

    def _save_once(self, model: Any, trial: Any, *, meanwhile: bool = False) -> None:
        """All processes write their part; the first one publishes, once all have."""
        step, world = self.state.global_step, self.checkpoints.world
        written = Path(self.args.output_dir) / f"checkpoint-{step}"
        samples, best = step * len(self.order) // self.state.max_steps, self.best_step

        def publish() -> None:
            try:
                self.checkpoints.add(written, step, samples, keep_step=best)
            finally:
                shutil.rmtree(written, ignore_errors=True)

        try:
            self._together(lambda: super(Resumable, self)._save_checkpoint(model, trial))
        except BaseException:
            self._drop(written)
            raise
        if meanwhile:
            self.checkpoints.publisher.start(step, written, publish)
            return
        self._together(publish if world.is_first else lambda: None)
        self.checkpoints.saved_step = step

    def _drop(self, written: Path) -> None:
        if self.checkpoints.world.is_first:
            shutil.rmtree(written, ignore_errors=True)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None:
            parts.divide_on_any_device(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of a sharded model each process writes its part, with the optimiser's."""
        if not self.is_sharded:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        parts.save(self.model, self.optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        parts.load(self.model, self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def write_weights(self, checkpoint: Path, folder: Path) -> None:
        """A sharded checkpoint's weights as one model, or one adapter. For one process: nothing is asked of the others."""
        self.model.save_pretrained(folder, state_dict=parts.weights(checkpoint))

    def _together(self, part: Callable[[], Any]) -> None:
        """Do one's part; raises in every process where it failed in one."""
        is_done = False
        try:
            part()
            is_done = True
        finally:
            (has_failed,) = self.checkpoints.world.any(not is_done)
        if has_failed:
            raise OSError("another process could not write its part")

    def learn_rows_first(self, tokens: Sequence[int], steps: int) -> None:
        """For so many steps learn the rows of these tokens alone; what follows has a schedule of its own."""
        self.first_steps = steps
        self.add_callback(NewRowsFirst(self.model, tokens, steps))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps - self.first_steps, optimizer)
        if self.first_steps and hasattr(scheduler, "lr_lambdas"):
            scheduler.lr_lambdas = in_two_parts(scheduler.lr_lambdas, self.first_steps)
            for group, rate, base in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, scheduler.base_lrs, strict=True):
                group["lr"] = base * rate(0)
        return scheduler

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put off until the first step: the data loader draws a random number when it starts, which an undisturbed run
        did before its own first step, and dropout would differ from there on."""
        self._random_state_of = checkpoint

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._random_state_of is not None:
            super()._load_rng_state(self._random_state_of)
            self._random_state_of = None
        return super().training_step(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL would write its card into every checkpoint; ours is written when the model is packaged."""

    def tokens_trained(self) -> int:
        """Tokens of this attempt so far; TRL's trainers count them themselves."""
        counted = getattr(self, "_total_train_tokens", None)
        return int(self.state.num_input_tokens_seen if counted is None else counted)


def _learn_in_full(model: torch.nn.Module) -> None:
    """TRL rounds adapters on a quantised base to bf16; small steps of the optimiser would be lost in that."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _complete_token_wrappers(model: torch.nn.Module) -> None:
    """peft's wrapper of single rows has a weight and no bias; TRL's head asks for both."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.bias = None


def resumable(trainer: type[Any], own: type[Resumable] = Resumable) -> type[Any]:
    """The trainer's class with `Resumable`, or one made from it, before it."""
    return type(f"Resumable{trainer.__name__}", (own,) if trainer is Trainer else (own, trainer), {})


def trainable_share(model: torch.nn.Module) -> float:
    """Share of the parameters that are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return float(sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes))
