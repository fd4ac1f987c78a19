"""Logs: one JSON object a line, keyed by kind, namespace and name."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from tuneloop_operator.domain.decision import Key

FIELDS = ("kind", "namespace", "object")


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logs(level: int = logging.INFO) -> None:
    """To standard error. kopf tells of every object it looks at; its warnings are enough."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("kopf", "asyncio", "aiohttp.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)  # signals are ours


def about(key: Key) -> dict[str, str]:
    """For `extra`: what a line is about."""
    return {"kind": key.kind, "namespace": key.namespace, "object": key.name}
