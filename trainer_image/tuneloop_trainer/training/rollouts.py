"""TRL's trainers that learn from completions which the model writes itself, on our order of prompts and with our rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import Sampler

from tuneloop_trainer.errors import NonFinite
from tuneloop_trainer.rewards import Completion, Reward
from tuneloop_trainer.training.trainer import OrderSampler, Resumable, resumable

if TYPE_CHECKING:
    from tuneloop_trainer.objectives.objective import Parts


class EachBatchAgain(Sampler[int]):
    """Every batch as often as the trainer asks for it: it generates to the first and learns a part of that each time."""

    def __init__(self, rows: OrderSampler, batch: int, times: int) -> None:
        self._rows, self._batch, self._times = list(rows), batch, times

    def __len__(self) -> int:
        return len(self._rows) * self._times

    def __iter__(self) -> Iterator[int]:
        for start in range(0, len(self._rows), self._batch):
            yield from self._rows[start : start + self._batch] * self._times


class RollingOut(Resumable):
    """What is ours before a trainer of this kind. Generation draws from the generators that a checkpoint holds, so that a run that
    is taken up writes what it would have written."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return EachBatchAgain(OrderSampler(self.order, self.consumed), self.args.generation_batch_size, self.args.steps_per_generation)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        self._prompt_ids = [row["input_ids"] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """prepare has, as the engine will."""
        return self._prompt_ids, None, {}

    def tokens_trained(self) -> int:
        """Of prompts and completions, over all attempts; TRL counts these in the trainer's state."""
        return int(self.state.num_input_tokens_seen)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._generate_single_turn(*args, **kwargs)
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            step = self.state.global_step
            raise NonFinite(
                f"After step {step} the model's probabilities are no numbers: no completion can be drawn. Lower training.learningRate, "
                "or raise beta."
            ) from error


class Judge:
    """A reward as TRL calls it."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.__name__ = reward.name

    def __call__(
        self, prompts: list[str], completions: list[str], reference: list[str], row: list[int], system: list[str | None], **_: Any
    ) -> list[float]:
        judged = zip(prompts, completions, reference, row, system, strict=True)
        return self._reward.of([Completion(prompt, text.strip(), answer, place, before) for prompt, text, answer, place, before in judged])


def make_trainer(
    name: str, rewards: Sequence[Reward], arguments: dict[str, Any], parts: Parts, adapter: Any, columns: Sequence[str]
) -> Any:
    """TRL's trainer of that name, ready to run."""
    import trl

    trainer = resumable(getattr(trl, f"{name}Trainer"), RollingOut)
    return trainer(
        model=parts.model,
        peft_config=adapter,
        reward_funcs=[Judge(reward) for reward in rewards],
        args=getattr(trl, f"{name}Config")(**arguments),
        processing_class=parts.tokenizer,
        train_dataset=parts.train,
        columns=columns,
        **parts.resuming,
    )
