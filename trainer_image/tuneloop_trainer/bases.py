"""The base model: a folder of the store, or a snapshot of a hub repository kept in the shared cache. Safetensors only."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from tuneloop_trainer import hub
from tuneloop_trainer.contract import Artifact, Base, Manifest, Paths, Reason, RunConfig
from tuneloop_trainer.errors import Invalid, Mismatch
from tuneloop_trainer.manifests import MANIFEST, files_digest, list_files, publish, read_manifest, staging, verify
from tuneloop_trainer.shapes import layers_missing
from tuneloop_trainer.turns import turn

log = logging.getLogger("tuneloop.bases")
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""What a model needs to be loaded and to tokenise. Pickles are never fetched, read or hashed."""
OWN = "base"
"""Of what prepare wrote: the folder of a base that it made, with new tokens or from scratch."""


@dataclass(frozen=True)
class Prepared:
    """A base model that is there, and the commit that it is of, where it has one."""

    folder: Path
    revision: str | None


def base_folder(base: Base, paths: Paths) -> Path:
    """Where the base model lies; one of the hub, at a commit."""
    if base.path is not None:
        return Path(base.path)
    repository = (base.repository or "").replace("/", "--")
    return Path(paths.cache) / "bases" / f"{repository}@{base.revision}"


def prepare_base(base: Base, paths: Paths) -> Prepared:
    """The base model, downloaded if it comes from the hub: at its commit, which is looked up here, once, where only a branch or
    nothing is given. Raises Invalid if it cannot be used, Unavailable if the hub does not answer."""
    if base.path is None:
        base = base.model_copy(update={"revision": hub.resolve(base)})
        _download(base, base_folder(base, paths))
    folder = base_folder(base, paths)
    if not folder.is_dir():
        raise Invalid(f"Model {base.uri} does not exist.", Reason.MODEL_NOT_FOUND)
    _refuse_unusable(folder, base.uri)
    return Prepared(folder, base.revision)


def prepare_tokenizer(base: Base, paths: Paths) -> Prepared | None:
    """A folder with the tokenizer that a model from scratch takes, its weights left where they are; None where it is to be trained."""
    if base.path is None and base.repository is None:
        return None
    folder = Path(base.path or "")
    if base.path is None:
        base = base.model_copy(update={"revision": hub.resolve(base)})
        repository = (base.repository or "").replace("/", "--")
        folder = Path(paths.cache) / "tokenizers" / f"{repository}@{base.revision}"
        _download(base, folder, tuple(pattern for pattern in PATTERNS if "safetensors" not in pattern))
    if "auto_map" in _json(folder / "tokenizer_config.json", base.uri):
        raise Invalid(
            f"Model {base.uri} needs code of its own (auto_map in tokenizer_config.json), which is not run.", Reason.MODEL_NOT_FOUND
        )
    return Prepared(folder, base.revision)


def base_digest(folder: Path) -> str:
    """`sha256:<hex>` over the files of the base model, the same wherever the folder lies."""
    return files_digest(tuple(file for file in list_files(folder, PATTERNS) if "/" not in file.path))


def require_prepared(config: RunConfig, prepared: Manifest) -> Path:
    """The folder of the base that prepare found, at its commit. Raises Mismatch."""
    found: dict[str, object] = {"revision": prepared.metadata.get("base_revision", config.base.revision)}
    if config.scratch is not None:
        found["path"] = str(Path(config.paths.work) / "prepare" / OWN)
    return require_base(config.base.model_copy(update=found), config.paths, str(prepared.metadata["base_digest"]))


def require_base(base: Base, paths: Paths, digest: str) -> Path:
    """The base's folder, once its files have the digest that was pinned. Raises Mismatch."""
    folder = base_folder(base, paths)
    found = base_digest(folder) if folder.is_dir() else "nothing"
    if found != digest:
        raise Mismatch(f"Model {base.uri} changed since it was pinned: {found} instead of {digest}.")
    return folder


def require_artifact(artifact: Artifact) -> Path:
    """The folder of a packaged model, verified by its digest. Raises Mismatch."""
    folder = Path(artifact.path)
    verify(folder, artifact.manifest_digest)
    return folder


def _download(base: Base, folder: Path, patterns: tuple[str, ...] = PATTERNS) -> None:
    """Once for all runs of the store: those that want the same files at the same time wait for the first of them."""
    if _is_there(folder):
        return
    with turn(folder.with_name(f".{folder.name}.lock")):
        if _is_there(folder):
            return
        with staging(folder, shared=True) as temporary:
            hub.download(base, str(base.revision), temporary, patterns)
            if _is_there(folder):
                return  # another run was faster, on a store without locks
            publish(temporary, folder, "model", {"uri": base.uri, "revision": base.revision})
    log.info("downloaded %s at %s to the shared cache", base.uri, base.revision)


def _is_there(folder: Path) -> bool:
    """Raises Mismatch where it is there with a manifest that is none."""
    if not (folder / MANIFEST).is_file():
        return False
    read_manifest(folder)
    return True


def _refuse_unusable(folder: Path, uri: str) -> None:
    """Raises Invalid for what could run code when loaded, or cannot be loaded at all."""
    for name in ("config.json", "tokenizer_config.json"):
        content = _json(folder / name, uri)
        if "auto_map" in content:
            raise Invalid(f"Model {uri} needs code of its own (auto_map in {name}), which is not run.", Reason.MODEL_NOT_FOUND)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise Invalid(f"Model {uri} has no .safetensors weights. Convert them: pickled weights are not loaded.", Reason.MODEL_NOT_FOUND)
    for path in weights:
        _refuse_broken(path, uri)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        named = _json(index, uri).get("weight_map")
        lost = {str(name) for name in named.values()} - {path.name for path in weights} if isinstance(named, dict) else ()
        if lost:
            raise Invalid(f"Model {uri}: {index.name} names {min(lost)[:100]}, which is not there.", Reason.MODEL_NOT_FOUND)
    if (missing := layers_missing(folder)) is not None:
        message = f"Model {uri}: config.json speaks of {missing[0]} layers, and the weights have {missing[1]}. Copy the model again, whole."
        raise Invalid(message, Reason.MODEL_NOT_FOUND)


def _refuse_broken(path: Path, uri: str) -> None:
    """Raises Invalid for a file of weights that is cut off or is something else. Reads its header alone: no device is taken for it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise Invalid(f"Model {uri}: {path.name} is no whole safetensors file ({error}). Copy it again.", Reason.MODEL_NOT_FOUND) from error


def _json(path: Path, uri: str) -> dict[str, object]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise Invalid(f"Model {uri} has no {path.name}.", Reason.MODEL_NOT_FOUND) from None
    except (OSError, ValueError) as error:
        raise Invalid(f"Model {uri}: {path.name} cannot be read as JSON.", Reason.MODEL_NOT_FOUND) from error
    return content if isinstance(content, dict) else {}
