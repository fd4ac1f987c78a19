"""A packaged model as an OCI artifact in the layout of ModelPack (CNCF model-spec): one raw layer for each file.

ORAS pulls it too: each layer has the title annotation. Equal models have equal manifests: nothing in them is a time.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from tuneloop_trainer.contract import Manifest, Push, Reason
from tuneloop_trainer.errors import Invalid, Mismatch
from tuneloop_trainer.manifests import MANIFEST, sha256_file
from tuneloop_trainer.stores.credentials import registry_login
from tuneloop_trainer.stores.registry import MANIFEST_TYPE, Registry

PREFIX = "application/vnd.cncf.model"
ARTIFACT_TYPE = f"{PREFIX}.manifest.v1+json"
CONFIG_TYPE = f"{PREFIX}.config.v1+json"
FILEPATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"
REFERENCE = re.compile(
    r"^oci://(?P<host>[a-zA-Z0-9.-]+(?::[0-9]+)?)/(?P<repository>[a-z0-9._/-]+?)(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?$"
)


class File(NamedTuple):
    """Something that is pushed."""

    path: str
    """In the copy."""
    source: Path
    size: int
    sha256: str


def push_model(target: Push, folder: Path, manifest: Manifest, card: Path | None = None, registry: Registry | None = None) -> str:
    """Push, pull every byte back, and return the digest of the OCI manifest. Raises Invalid, Unavailable or Mismatch."""
    found = REFERENCE.match(target.uri)
    if found is None:
        raise Invalid(f"output.push {target.uri} is not oci://registry/repository:tag.", Reason.STORE_UNAVAILABLE)
    host = found["host"]
    registry = registry or Registry(host, found["repository"], registry_login(target.credentials, host), plain_http=target.plain_http)
    files = files_of(folder, manifest, card)
    layers = [_layer(file) for file in files]
    config = _canonical(_config(manifest, layers))
    content = _canonical(_image_manifest(manifest, config, layers))
    for file, layer in zip(files, layers, strict=True):
        registry.put_blob(file.source, layer["digest"])
    registry.put_blob(config, digest_of(config))
    registry.put_manifest(content, found["tag"] or default_tag(manifest))
    verify(registry, content)
    return digest_of(content)


def verify(registry: Registry, content: bytes) -> None:
    """Pull back manifest and blobs, and compare their hashes. Raises Mismatch."""
    digest = digest_of(content)
    if digest_of(registry.get_manifest(digest)) != digest:
        raise Mismatch(f"Registry {registry.host} gives back another manifest than {digest}.")
    image = json.loads(content)
    for layer in (image["config"], *image["layers"]):
        if registry.digest_of_blob(layer["digest"]) != layer["digest"]:
            raise Mismatch(f"Registry {registry.host} gives back another blob than {layer['digest']}.")


def default_tag(manifest: Manifest) -> str:
    """The beginning of the packaged manifest's digest: the version's number is not known yet."""
    return f"sha256-{manifest.digest().removeprefix('sha256:')[:12]}"


def files_of(folder: Path, manifest: Manifest, card: Path | None) -> list[File]:
    """Everything that is pushed: the manifest's files, the card with the figures of the evaluation, and the manifest last. The card is
    no part of the manifest, whose digest is the model's and known before it is evaluated."""
    files = [File(file.path, folder / file.path, file.size, file.sha256) for file in manifest.files]
    beside = [card] if card is not None else []
    return [*files, *(File(path.name, path, path.stat().st_size, sha256_file(path)) for path in (*beside, folder / MANIFEST))]


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _layer(file: File) -> dict[str, Any]:
    if file.path.endswith(".safetensors"):
        kind = "weight"
    else:
        kind = "doc" if file.path.endswith(".md") else "weight.config"
    return {
        "mediaType": f"{PREFIX}.{kind}.v1.raw",
        "digest": f"sha256:{file.sha256}",
        "size": file.size,
        "annotations": {TITLE: file.path, FILEPATH: file.path},
    }


def _config(manifest: Manifest, layers: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "descriptor": {"name": str(manifest.metadata.get("model", ""))},
        "config": {"format": "safetensors"},
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
    }


def _image_manifest(manifest: Manifest, config: bytes, layers: list[dict[str, Any]]) -> dict[str, Any]:
    told = {"model": "model", "format": "format", "base_uri": "base-uri", "base_digest": "base-digest", "shards_digest": "shards-digest"}
    annotations = {f"dev.tuneloop.{name}": str(value) for key, name in told.items() if (value := manifest.metadata.get(key)) is not None}
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": digest_of(config), "size": len(config)},
        "layers": layers,
        "annotations": annotations | {"dev.tuneloop.manifest-digest": manifest.digest()},
    }


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
