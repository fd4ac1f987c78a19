"""`POST /v1/feedback`: a rating, a preference or a correction, proven by the token of the answer it is about."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from aiohttp import web

from tuneloop_gateway.canonical import normalise, redact_personal_data, storable
from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.contract import FEEDBACK_HEADER
from tuneloop_gateway.curation import Curation, NotCaptured, Vote
from tuneloop_gateway.database import Unavailable
from tuneloop_gateway.errors import Refused, invalid
from tuneloop_gateway.inbound import Json, parse_object, read_body
from tuneloop_gateway.keys import Caller
from tuneloop_gateway.metrics import Metrics
from tuneloop_gateway.outcomes import Outcomes
from tuneloop_gateway.tokens import FeedbackToken, verify

MAX_BODY_BYTES = 64 << 10
MAX_CORRECTION_CHARS = 8192
MAX_COMMENT_CHARS = 2000
FIELDS = {"token", "rating", "thumbs", "preference", "correction", "comment"}
NAMES = {1: "up", -1: "down", 0: "none"}
CAPTURE_SECONDS = 3.0
"""How long a correction waits for its answer to be stored, which happens off the request path."""
POLL_SECONDS = 0.1


class Feedback:
    """Nothing that was said is lost silently: where the database is away, the sender is told to say it again."""

    def __init__(self, configuration: Configuration, curation: Curation, metrics: Metrics, key: bytes, outcomes: Outcomes) -> None:
        self._outcomes = outcomes
        self._configuration, self._curation, self._metrics, self._key = configuration, curation, metrics, key

    async def take(self, request: web.BaseRequest, caller: Caller, epoch: str) -> web.Response:
        """Answers one POST. Raises Refused."""
        body = parse_object(await read_body(request, MAX_BODY_BYTES))
        unknown = sorted(set(body) - FIELDS)
        if unknown:
            raise invalid(f"Unknown field '{unknown[0][:50]}'; feedback has {', '.join(sorted(FIELDS))}.", unknown[0][:50])
        token = self._token(request, body)
        votes = self._votes(body, token, caller)
        if not votes:
            raise invalid("Feedback needs one of rating, thumbs, preference and correction.")
        try:
            for vote in votes:
                # A sender that hangs up does not undo what was said.
                if await asyncio.shield(self._add(vote, epoch)):
                    self._metrics.feedback(vote.kind, NAMES[vote.value])
                    await self._count(vote)
        except Unavailable:
            raise Refused(503, "Feedback cannot be stored now; send it again.", code="store_unavailable", retry_after=10) from None
        return web.json_response({"object": "feedback", "response_id": token.response_id, "stored": [v.kind for v in votes]})

    async def _count(self, vote: Vote) -> None:
        """For the revision that gave the answer, while a canary runs."""
        if not self._outcomes.window or vote.kind != "rating" or vote.value == 0:
            return
        asked = await self._curation.asked(vote.response_id)
        if asked is not None:
            self._outcomes.voted(asked.revision, asked.at, vote.subject, is_up=vote.value > 0)

    async def _add(self, vote: Vote, epoch: str) -> bool:
        """True where it is the subject's first. A correction is learnt from together with what was asked, which is stored off the
        request path: waits for that. Raises Refused where it was not captured."""
        deadline = time.monotonic() + CAPTURE_SECONDS
        while True:
            try:
                return await self._curation.add_vote(vote, epoch)
            except NotCaptured:
                if time.monotonic() > deadline:
                    message = "This answer was not captured, so a correction of it cannot be kept; nothing of this request was stored."
                    raise Refused(409, message, code="not_captured", param="correction") from None
            await asyncio.sleep(POLL_SECONDS)

    def _token(self, request: web.BaseRequest, body: Json) -> FeedbackToken:
        text = body.get("token") or request.headers.get(FEEDBACK_HEADER)
        if not isinstance(text, str):
            raise invalid(f"Send the answer's header {FEEDBACK_HEADER} as the field 'token'.", "token")
        max_age = self._configuration.current.capture.retention_days * 86400
        token = verify(text, self._key, now=time.time(), max_age_seconds=max_age)
        if token is None:
            raise Refused(403, "The feedback token is not valid, or too old.", code="invalid_token", param="token")
        return token

    def _votes(self, body: Json, token: FeedbackToken, caller: Caller) -> list[Vote]:
        """A caller without a key speaks as the one who got the answer."""
        subject = caller.subject if caller.known else token.subject
        comment = self._text(body, "comment", MAX_COMMENT_CHARS)

        def vote(kind: Any, value: int, text: str | None) -> Vote:
            return Vote(token.response_id, subject, caller.reviewer, kind, value, text)

        votes = []
        correction = self._text(body, "correction", MAX_CORRECTION_CHARS)
        if correction is not None:  # first, as it alone may be refused later on
            if not correction.strip():
                raise invalid("'correction' is empty.", "correction")
            votes.append(vote("correction", 0, correction.strip()))
        value = _rating(body)
        if value is not None:
            votes.append(vote("rating", value, comment))
        preference = body.get("preference")
        if preference is not None:
            votes.append(vote("preference", *self._preference(preference)))
        return votes

    def _text(self, body: Json, field: str, limit: int) -> str | None:
        """A text field, redacted like captured text."""
        text = body.get(field)
        if text is None:
            return None
        if not isinstance(text, str) or len(text) > limit:
            raise invalid(f"'{field}' must be a text of at most {limit} characters.", field)
        redact = self._configuration.current.capture.personal_data == "Redact"
        return storable(redact_personal_data(text) if redact else text)

    def _preference(self, preference: Any) -> tuple[int, str]:
        """`{"over": <token of the other answer>}`: this answer is the better one."""
        other = preference.get("over") if isinstance(preference, dict) and set(preference) == {"over"} else None
        max_age = self._configuration.current.capture.retention_days * 86400
        token = verify(other, self._key, now=time.time(), max_age_seconds=max_age) if isinstance(other, str) else None
        if token is None:
            raise invalid('\'preference\' must be {"over": "<feedback token of the other answer>"}.', "preference")
        return 0, normalise(token.response_id)


def _rating(body: Json) -> int | None:
    """1..5 or thumbs, as 1, -1 or 0."""
    rating, thumbs = body.get("rating"), body.get("thumbs")
    if rating is not None and thumbs is not None:
        raise invalid("Send 'rating' or 'thumbs', not both.", "rating")
    if thumbs is not None or isinstance(rating, str):
        named = thumbs if thumbs is not None else rating
        if named not in ("up", "down"):
            raise invalid('\'thumbs\' must be "up" or "down".', "thumbs")
        return 1 if named == "up" else -1
    if rating is None:
        return None
    if type(rating) is not int or not 1 <= rating <= 5:
        raise invalid("'rating' must be a whole number from 1 to 5.", "rating")
    return 1 if rating >= 4 else -1 if rating <= 2 else 0
