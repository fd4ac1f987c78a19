"""After evaluate: what the gates did not reject goes to every place of output.push, with the card that has its figures, and is pulled
back."""

from __future__ import annotations

import logging
from pathlib import Path

from tuneloop_trainer.contract import Manifest, Push, RunConfig, Stage, StageResult
from tuneloop_trainer.manifests import verify
from tuneloop_trainer.progress import ProgressWriter
from tuneloop_trainer.stages.outputs import MODEL_CARD, stage_folder
from tuneloop_trainer.stores import oci, s3

log = logging.getLogger("tuneloop.push")


def push(config: RunConfig, evaluated: StageResult, progress: ProgressWriter) -> StageResult:
    """The evaluation's result with the digests of what was pushed, in the order of the configuration. Pushed again, nothing changes."""
    summary = evaluated.evaluate
    if not config.push or summary is None or summary.verdict == "Fail":
        return evaluated
    progress.phase("Pushing")
    folder = Path(config.paths.artifact)
    manifest = verify(folder, summary.artifact_digest)
    card = stage_folder(config, Stage.EVALUATE) / MODEL_CARD
    digests = tuple(push_to(target, folder, manifest, card if card.is_file() else None) for target in config.push)
    return evaluated.model_copy(update={"evaluate": summary.model_copy(update={"pushed": digests})})


def push_to(target: Push, folder: Path, manifest: Manifest, card: Path | None) -> str:
    """The digest under which the model is found there. Raises Invalid, Unavailable or Mismatch."""
    push_model = oci.push_model if target.uri.startswith("oci://") else s3.push_model
    digest = push_model(target, folder, manifest, card)
    log.info("pushed to %s as %s, and verified", target.uri, digest)
    return digest
