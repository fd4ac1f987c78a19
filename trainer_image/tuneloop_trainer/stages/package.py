"""package: from trained weights to what is evaluated and served, published in one rename under its manifest's digest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tuneloop_trainer.card import base_licence, model_card
from tuneloop_trainer.contract import ExitCode, Manifest, PackageSummary, RunConfig, Stage, StageResult
from tuneloop_trainer.errors import StageError
from tuneloop_trainer.manifests import Metadata, publish, staging, verify
from tuneloop_trainer.objectives import objective_of
from tuneloop_trainer.progress import ProgressWriter
from tuneloop_trainer.results import RESULT_FILE, read_result
from tuneloop_trainer.stages.outputs import require_stage, run_key, stage_folder
from tuneloop_trainer.stages.vocabulary import trained_base

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def package(config: RunConfig, progress: ProgressWriter) -> StageResult:
    target = Path(config.paths.artifact)
    if (manifest := published(config)) is not None:
        return _result(config, manifest)
    progress.phase("LoadingData")
    prepared_manifest, prepared = require_stage(config, Stage.PREPARE)
    trained = stage_folder(config, Stage.TRAIN) / "final"
    trained_manifest, trained_result = verify(trained), read_result(trained / RESULT_FILE)
    if prepared.prepare is None or trained_result is None or trained_result.train is None:
        raise StageError("The results of prepare and train have no summaries.")
    if trained_manifest.metadata.get("run_key") != run_key(config):
        raise StageError("The output of train was made for another configuration of this run.")
    base = trained_base(config, prepared_manifest)
    with staging(target) as folder:
        progress.phase("Packaging")
        if config.output_format == "Adapter":
            write_adapter(config, trained, folder, prepared.prepare.base_revision)
        else:
            write_merged(config, base, trained, folder)
        card = model_card(config, prepared.prepare, trained_result.train, base_licence(base))
        (folder / "README.md").write_text(card)
        metadata: Metadata = {
            "run_key": run_key(config),
            "model": config.model,
            "format": config.output_format,
            "objective": config.objective,
            "base_uri": config.base.uri,
            "base_digest": prepared.prepare.base_digest,
            "shards_digest": prepared.prepare.shards_digest,
            "prompt_probe_sha256": prepared.prepare.prompt_probe_sha256,
        }
        manifest = publish(folder, target, "model", metadata)
    return _result(config, manifest)


def write_adapter(config: RunConfig, trained: Path, folder: Path, base_revision: str | None) -> None:
    """The weights and the configuration of an adapter, or of a learned prompt; the base is named as the user named it, not by a path
    of this pod."""
    if config.method.type == "Full":
        raise StageError("Full makes no adapter.")
    shutil.copyfile(trained / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    adapter = json.loads((trained / "adapter_config.json").read_text())
    adapter |= {"base_model_name_or_path": config.base.uri, "revision": base_revision, "inference_mode": True}
    if "target_modules" in adapter:
        adapter["target_modules"] = sorted(adapter["target_modules"])  # peft keeps a set: equal runs would differ in their digest
    (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=1, sort_keys=True))


def write_merged(config: RunConfig, base: Path, trained: Path, folder: Path) -> None:
    """Whole weights in bf16. An adapter is merged in fp32 and rounded once. Tokenizer files are the base's, byte for byte."""
    import torch

    objective = objective_of(config, stage_folder(config, Stage.PREPARE))
    if config.method.type == "LoRA":
        from peft import PeftModel

        model = PeftModel.from_pretrained(objective.load_base(base, "float32"), trained).merge_and_unload()
    else:
        model = objective.load(trained, config.base.uri, "float32")
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def published(config: RunConfig) -> Manifest | None:
    """The manifest of the artifact, if it was packaged for this configuration and every file verifies."""
    try:
        manifest = verify(Path(config.paths.artifact))
    except StageError:
        return None
    return manifest if manifest.metadata.get("run_key") == run_key(config) else None


def _result(config: RunConfig, manifest: Manifest) -> StageResult:
    summary = PackageSummary(
        path=config.paths.artifact,
        manifest_digest=manifest.digest(),
        format=config.output_format,
        size_bytes=sum(file.size for file in manifest.files),
    )
    return StageResult(
        stage=Stage.PACKAGE, exit_code=ExitCode.DONE, uri=config.paths.artifact, sha256=summary.manifest_digest, package=summary
    )
