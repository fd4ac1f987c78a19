"""`tuneloop render`: what the operator would make of manifests, by its own passes over objects that exist only here."""

from __future__ import annotations

import argparse
import asyncio
import base64
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from tuneloop_operator.cli.errors import Failure
from tuneloop_operator.cli.imagined import Imagined
from tuneloop_operator.cluster.apply import Applier
from tuneloop_operator.cluster.client import Cluster
from tuneloop_operator.cluster.errors import ApiError, NameConflict
from tuneloop_operator.cluster.kinds import KINDS
from tuneloop_operator.cluster.registration import Registration
from tuneloop_operator.cluster.registrations import registrations
from tuneloop_operator.domain.decision import Key
from tuneloop_operator.settings import read_settings

if TYPE_CHECKING:
    from argparse import _SubParsersAction

Object = dict[str, Any]
"""A Kubernetes object as JSON."""
MAX_BYTES = 16 << 20
MAX_ROUNDS = 50
OF_THE_SERVER = ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields")


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "render",
        help="print what the operator would make of manifests",
        description="Prints, as YAML, every object that the operator would make of the manifests before anything has run: later stages "
        "rest on the results of earlier ones. Referenced claims count as existing. Settings are read from TUNELOOP_*, as the operator "
        "reads them. Checks of the API server are not made: use kubectl apply --dry-run=server for those.",
    )
    command.add_argument("-f", "--file", required=True, action="append", type=Path, metavar="FILE", help="manifests; - reads stdin")
    command.add_argument("-n", "--namespace", default="default", help="of manifests that name none (default: %(default)s)")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Objects to stdout, where the given ones stand to stderr."""
    given = [_placed(obj, arguments.namespace) for path in arguments.file for obj in read_manifests(path)]
    if not any(obj["kind"] in _kinds() for obj in given):
        raise Failure(f"there is no {', '.join(_kinds())} in {', '.join(map(str, arguments.file))}.")
    server = asyncio.run(imagine(given))
    names = {_place(obj) for obj in given}
    print("---\n".join(_yaml(_public(obj)) for obj in server.objects.values() if _place(obj) not in names), end="")
    for obj in (server.objects[_place(obj)] for obj in given if obj["kind"] in _kinds()):
        for line in _standing(obj):
            print(line, file=sys.stderr)


def read_manifests(path: Path) -> list[Object]:
    """The objects of a YAML stream. Raises Failure."""
    try:
        text = sys.stdin.read(MAX_BYTES + 1) if str(path) == "-" else _read(path)
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise Failure(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    return [_checked(document, path) for document in documents if document is not None]


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Failure(f"{path} is larger than {MAX_BYTES >> 20} MiB.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"cannot read {path}: {error}.") from error


def _checked(document: Any, path: Path) -> Object:
    """Whatever YAML gave, as an object of a kind that is known here."""
    if not isinstance(document, dict) or not isinstance(document.get("metadata"), dict) or not document["metadata"].get("name"):
        raise Failure(f"{path} holds something that is no Kubernetes object with a name.")
    known = KINDS.get(str(document.get("kind")))
    if known is None or known.api_version != document.get("apiVersion"):
        raise Failure(f"{path}: {document.get('apiVersion')} {document.get('kind')} is no kind that the operator knows.")
    return document


def _placed(obj: Object, namespace: str) -> Object:
    if not KINDS[obj["kind"]].is_namespaced:
        return obj
    return {**obj, "metadata": {**obj["metadata"], "namespace": obj["metadata"].get("namespace") or namespace}}


# --- passes -------------------------------------------------------------------


async def imagine(given: list[Object]) -> Imagined:
    """Passes over all objects of ours until none changes anything. Raises Failure."""
    now = datetime.now(UTC).replace(microsecond=0)
    server = Imagined(now.isoformat().replace("+00:00", "Z"))
    cluster = Cluster(server, read_settings().model_copy(update={"prometheus_url": None}))
    for obj in given:
        cluster.cache.put(obj["kind"], server.put(server.completed(obj)))
    applier = Applier(cluster)
    for _ in range(MAX_ROUNDS):
        before = _contents(server)
        for registration in registrations():
            for key in list(cluster.cache.keys(registration.kind)):
                await _pass(registration, key, cluster, applier, now)
        if _contents(server) == before:
            return server
    raise Failure(f"the passes did not come to rest in {MAX_ROUNDS} rounds.")


async def _pass(registration: Registration[Any], key: Key, cluster: Cluster, applier: Applier, now: datetime) -> None:
    owner = cluster.cache.get(key.kind, key.namespace, key.name)
    try:
        snapshot = await registration.observe(key, cluster, cluster.settings, now)
        if owner is not None and snapshot is not None:
            await applier.carry_out(owner, registration.decide(snapshot, cluster.settings, now), now)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise Failure(f"{key.kind} {key.name}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}.") from error
    except (ApiError, NameConflict) as error:
        raise Failure(f"{key.kind} {key.name}: {error}.") from error


def _contents(server: Imagined) -> dict[tuple[str, str, str], Object]:
    return {place: {**obj, "metadata": None} for place, obj in server.objects.items()}


# --- what is shown ------------------------------------------------------------


def _kinds() -> tuple[str, ...]:
    return tuple(kind for kind, resource in KINDS.items() if resource.is_ours)


def _place(obj: Object) -> tuple[str, str, str]:
    return obj["kind"], obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _public(obj: Object) -> Object:
    """Without what only a real API server could know, and without the random values of Secrets."""
    metadata = {name: value for name, value in obj["metadata"].items() if name not in OF_THE_SERVER}
    shown = {name: value for name, value in {**obj, "metadata": metadata}.items() if name != "status"}
    if obj["kind"] == "Secret":
        for block, value in (("data", base64.b64encode(b"random").decode()), ("stringData", "random")):
            if block in shown:
                shown[block] = dict.fromkeys(shown[block], value)
    return shown


def _standing(obj: Object) -> list[str]:
    """Each condition as a line."""
    name = f"{obj['kind']} {obj['metadata']['name']}"
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return [f"{name}: {c['type']}={c['status']} {c['reason']}: {c.get('message', '')}".rstrip(": ") for c in conditions]


class _Dumper(yaml.SafeDumper):
    """Without anchors, and with texts of several lines as such."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def _yaml(obj: Object) -> str:
    return yaml.dump(obj, Dumper=_Dumper, sort_keys=False, width=140, allow_unicode=True)
