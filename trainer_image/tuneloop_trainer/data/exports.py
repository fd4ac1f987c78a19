"""A gateway's export as a stream of bytes: the token in a header, no redirects, no proxy, asked again while the gateway is away."""

from __future__ import annotations

import time
import urllib.error
import urllib.parse
import urllib.request
from email.message import Message
from http.client import HTTPResponse
from pathlib import Path
from typing import IO

from tuneloop_trainer.contract import FeedbackExport, Reason
from tuneloop_trainer.errors import Invalid, StageError

HTTP_TIMEOUT_SECONDS = 30.0
HTTP_ATTEMPTS = 6


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to wherever it points."""

    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str) -> None:
        return None


def open_export(export: FeedbackExport, uri: str) -> HTTPResponse:
    """The export's body as a stream. A gateway that is away for a moment is asked again."""
    token = Path(export.token_file).read_text().strip()
    query = {"split": export.split, "epoch": export.epoch, "rows": export.rows if export.rows != "Labels" else None}
    said = urllib.parse.urlencode({name: value for name, value in query.items() if value is not None})
    separator = "&" if "?" in export.url else "?"
    request = urllib.request.Request(f"{export.url}{separator}{said}", headers={"Authorization": f"Bearer {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
    for attempt in range(HTTP_ATTEMPTS):
        if attempt:
            time.sleep(min(2.0**attempt, 20.0))
        try:
            response = opener.open(request, timeout=HTTP_TIMEOUT_SECONDS)
            assert isinstance(response, HTTPResponse)
            return response
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                message = f"The gateway of {export.deployment} refuses the export {uri} ({error.code})."
                raise Invalid(message, Reason.ACCESS_DENIED) from None
            if error.code < 500:
                raise Invalid(f"The gateway of {export.deployment} has no export for {uri} ({error.code}).") from None
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            continue
    raise StageError(f"The gateway of {export.deployment} did not answer {HTTP_ATTEMPTS} times; its export {uri} is needed.")
