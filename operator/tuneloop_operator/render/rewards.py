"""GRPO's and RLOO's part of the trainer's configuration: how completions are written, and what they are paid."""

from __future__ import annotations

from tuneloop_operator.api.objectives import Objective
from tuneloop_operator.api.rewards import Reward
from tuneloop_operator.render import names
from tuneloop_trainer import contract


def rollouts(objective: Objective) -> contract.Rollouts | None:
    """None for an objective whose model writes nothing while it is trained."""
    asked = objective.grpo or objective.rloo
    if asked is None:
        return None
    return contract.Rollouts(
        rewards=tuple(map(_reward, asked.rewards)),
        num_generations=asked.num_generations,
        max_completion_length=asked.max_completion_length,
        temperature=float(asked.temperature),
        beta=float(asked.beta),
    )


def _reward(asked: Reward) -> contract.Reward:
    weight = float(asked.weight)
    if asked.entry_point is not None:
        point = asked.entry_point
        brought = contract.EntryPoint(name=point.name, settings=dict(point.settings), timeout_seconds=point.timeout_seconds)
        return contract.Reward(entry_point=brought, weight=weight)
    if asked.model is not None:
        scorer = contract.Scorer(uri=asked.model.uri, path=names.pvc_path(asked.model.uri), manifest_digest=asked.model.manifest_digest)
        return contract.Reward(model=scorer, weight=weight)
    match = asked.exact_match.match if asked.exact_match is not None else "Equals"
    return contract.Reward(exact_match=contract.ExactMatch(match=match), weight=weight)
