"""`tuneloop label export|import`: what users sent, to be labelled by people, and their labels back into the gateway.

By default the gateway is reached through the API server's service proxy with the user's own credentials, so that nothing must be
exposed; the internal token is read from the deployment's Secret, which the user must therefore be allowed to read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pydantic import ValidationError

from tuneloop_gateway.contract import CapturedRow, LabelReceipt, LabelRow
from tuneloop_operator.cli.errors import Failure
from tuneloop_operator.cli.gateway import Gateway, add_place, connect

if TYPE_CHECKING:
    from argparse import _SubParsersAction

ROWS_PER_REQUEST = 10_000
BYTES_PER_REQUEST = 8 << 20
MAX_LIMIT = 10_000
LABELS_PATH = "/internal/labels"


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands."""
    label = commands.add_parser("label", help="export captured requests for labelling, and import the labels")
    actions = label.add_subparsers(required=True, metavar="ACTION")
    export = actions.add_parser("export", help="write captured requests as one JSON object a line; a person adds `label` to each")
    export.add_argument("--uniform", action="store_true", help="draw uniformly, as gates need it; else the newest come first")
    export.add_argument("--limit", type=_limit, default=1000, help="rows at most (default: %(default)s)")
    export.add_argument("-o", "--output", type=Path, metavar="FILE", help="write here instead of to stdout")
    export.set_defaults(run=run_export)
    import_ = actions.add_parser("import", help="send labels: one JSON object a line with `id` and `label`, and `document` if known")
    import_.set_defaults(run=run_import)
    for action in (export, import_):
        action.add_argument("deployment", help="name of the ModelDeployment")
        add_place(action)
    import_.add_argument("file", type=Path, help="file of labels; - reads stdin")


def run_export(arguments: argparse.Namespace) -> None:
    """Rows to a file or stdout; a file appears only when it is complete."""
    rows = asyncio.run(_export(arguments))
    text = "".join(f"{row}\n" for row in rows)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        _write(arguments.output, text)
    _say(f"{len(rows):,} rows exported" + ("" if rows else ": nothing has been captured yet"))


async def _export(arguments: argparse.Namespace) -> list[str]:
    query = f"{LABELS_PATH}?limit={arguments.limit}&uniform={int(arguments.uniform)}"
    rows: list[str] = []
    async with connect(arguments.deployment, arguments.namespace, arguments.url, arguments.token_file) as gateway:
        async for line in gateway.lines(query):
            rows.append(_row_to_label(line))
            if len(rows) % 1000 == 0:
                _say(f"{len(rows):,} rows")
    return rows


def _row_to_label(line: bytes) -> str:
    try:
        row = CapturedRow.model_validate_json(line)
    except ValidationError as error:
        raise Failure(f"the gateway sent a row that this version does not understand: {error.errors()[0]['msg']}.") from error
    return json.dumps({**row.model_dump(by_alias=True), "label": ""}, ensure_ascii=False)


def run_import(arguments: argparse.Namespace) -> None:
    """All rows are checked before the first is sent."""
    with nullcontext(sys.stdin) if str(arguments.file) == "-" else _open(arguments.file) as file:
        rows, without_label = read_labels(file, str(arguments.file))
    if not rows:
        raise Failure(f"{arguments.file} has no row with a label ({without_label:,} without).")
    receipt = asyncio.run(_import(arguments, rows))
    print(receipt.model_dump_json(by_alias=True))
    notes = [f"{receipt.accepted:,} labels accepted ({receipt.train:,} to train on, {receipt.gate:,} to gate on)"]
    notes += [f"{receipt.unknown:,} of unknown requests (never captured, or past retention)"] if receipt.unknown else []
    notes += [f"{without_label:,} rows without a label passed over"] if without_label else []
    _say("; ".join(notes))


async def _import(arguments: argparse.Namespace, rows: list[LabelRow]) -> LabelReceipt:
    total = LabelReceipt(accepted=0, unknown=0, train=0, gate=0)
    sent = 0
    async with connect(arguments.deployment, arguments.namespace, arguments.url, arguments.token_file) as gateway:
        for batch in batches(rows):
            receipt = await _send(gateway, batch)
            sums = {name: getattr(total, name) + getattr(receipt, name) for name in LabelReceipt.model_fields}
            total, sent = total.model_copy(update=sums), sent + len(batch)
            _say(f"{sent:,} of {len(rows):,} labels sent")
    return total


async def _send(gateway: Gateway, batch: list[LabelRow]) -> LabelReceipt:
    body = "".join(row.model_dump_json(by_alias=True, exclude_none=True) + "\n" for row in batch)
    answer = await gateway.post(LABELS_PATH, body.encode())
    try:
        return LabelReceipt.model_validate_json(answer)
    except ValidationError as error:
        raise Failure("the gateway's answer is not the receipt of this version; are gateway and command of one release?") from error


def read_labels(lines: Iterable[str], name: str) -> tuple[list[LabelRow], int]:
    """Rows with a label, and how many have none. Fields beside id, label and document are passed over: exported rows keep theirs."""
    rows, without = [], 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = _object(line, f"{name}:{number}")
        if str(fields.get("label") or "").strip() == "":
            without += 1
            continue
        known = {key: fields[key] for key in ("id", "label", "document") if fields.get(key) is not None}
        try:
            rows.append(LabelRow.model_validate(known))
        except ValidationError as error:
            wrong = error.errors()[0]
            raise Failure(f"{name}:{number}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}.") from error
    return rows, without


def _object(line: str, place: str) -> dict[str, object]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise Failure(f"{place} is no JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise Failure(f"{place} is no JSON object.")
    return fields


def batches(rows: list[LabelRow]) -> Iterator[list[LabelRow]]:
    """Requests that the gateway takes: few enough rows, few enough bytes."""
    batch: list[LabelRow] = []
    size = 0
    for row in rows:
        bytes_ = 4 * (len(row.label) + len(row.id) + len(row.document or "")) + 64
        if batch and (len(batch) == ROWS_PER_REQUEST or size + bytes_ > BYTES_PER_REQUEST):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += bytes_
    if batch:
        yield batch


def _open(path: Path) -> IO[str]:
    try:
        return path.open(encoding="utf-8")
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}.") from error


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}.") from error


def _limit(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MAX_LIMIT:
        raise argparse.ArgumentTypeError(f"must be from 1 to {MAX_LIMIT}")
    return number


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
