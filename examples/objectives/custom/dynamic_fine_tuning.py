"""Dynamic fine-tuning (arXiv 2508.05629): SFT whose loss counts a token by how likely it was, so that odd answers do not dominate.

An objective of one's own is a class that says what its rows are, how they become tokens, and which trainer learns from them. What it
does not say is taken from the class below it; resuming, checkpoints, progress, packaging and gates come with every objective.
"""

from __future__ import annotations

from typing import Any

from tuneloop_trainer.contract import RunConfig
from tuneloop_trainer.errors import Invalid
from tuneloop_trainer.objectives.sft import SFT


class DynamicFineTuning(SFT):
    """As SFT, with TRL's loss of that paper. Settings: `strict`, yes or no."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        settings = config.custom.settings if config.custom is not None else {}
        if settings.get("strict", "yes") not in ("yes", "no"):
            raise Invalid("objective.custom.settings.strict must be yes or no.")
        self.strict = settings.get("strict", "yes") == "yes"

    def own_arguments(self) -> dict[str, Any]:
        return super().own_arguments() | ({"loss_type": "dft"} if self.strict else {})
