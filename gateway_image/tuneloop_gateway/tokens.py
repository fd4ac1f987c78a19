"""The feedback token: proof that this deployment gave an answer, to whom, and when."""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass

MAX_TOKEN_CHARS = 512


@dataclass(frozen=True)
class FeedbackToken:
    response_id: str
    subject: str
    issued_at: int


def sign(token: FeedbackToken, key: bytes) -> str:
    """`<response id>.<subject>.<seconds>.<HMAC-SHA256, base64url>`: fits a header, needs no storage."""
    text = f"{token.response_id}.{token.subject}.{token.issued_at}"
    return f"{text}.{_signature(text, key)}"


def verify(text: str, key: bytes, *, now: float, max_age_seconds: float) -> FeedbackToken | None:
    """The token, or None where it is forged, malformed, too old or from the future."""
    if len(text) > MAX_TOKEN_CHARS or text.count(".") != 3:
        return None
    claims, _, signature = text.rpartition(".")
    if not hmac.compare_digest(_signature(claims, key).encode(), signature.encode("utf-8", "surrogatepass")):
        return None
    response_id, subject, issued_at = claims.split(".")
    token = FeedbackToken(response_id, subject, int(issued_at))
    return token if -60 <= now - token.issued_at <= max_age_seconds else None


def _signature(text: str, key: bytes) -> str:
    digest = hmac.digest(key, b"feedback:" + text.encode("utf-8", "surrogatepass"), hashlib.sha256().name)
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
