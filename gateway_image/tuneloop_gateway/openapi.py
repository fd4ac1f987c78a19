"""The OpenAPI document of the public port, made of the models that requests are checked with."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from tuneloop_gateway.contract import FEEDBACK_HEADER, SESSION_HEADER
from tuneloop_gateway.feedback import MAX_COMMENT_CHARS, MAX_CORRECTION_CHARS
from tuneloop_gateway.fields import ChatRequest, CompletionRequest
from tuneloop_gateway.tokens import MAX_TOKEN_CHARS

Json = dict[str, Any]
REFUSALS = {
    400: "The request must be changed; `param` names the field.",
    401: "The API key is missing or not known.",
    403: "The feedback token is not valid, or too old.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    409: "The answer was not captured, so that it cannot be corrected.",
    413: "The body is too large.",
    429: "The key has used its requests or tokens of this minute; see Retry-After.",
    502: "The engine refuses the gateway.",
    503: "No replica can answer now, or the store is away; see Retry-After.",
    504: "The model did not answer in time.",
}
COMPLETING = (400, 401, 404, 408, 413, 429, 502, 503, 504)
RATING = (400, 401, 403, 408, 409, 413, 429, 503)
SIGNED = {"type": "string", "maxLength": MAX_TOKEN_CHARS}
FEEDBACK: Json = {
    "type": "object",
    "additionalProperties": False,
    "description": "About one answer, whose token came with it. One of rating, thumbs, preference and correction at least.",
    "properties": {
        "token": {**SIGNED, "description": f"The answer's header {FEEDBACK_HEADER}; may be sent as a header too."},
        "rating": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 5}, {"enum": ["up", "down"]}]},
        "thumbs": {"enum": ["up", "down"]},
        "preference": {"type": "object", "additionalProperties": False, "properties": {"over": SIGNED}, "required": ["over"]},
        "correction": {"type": "string", "minLength": 1, "maxLength": MAX_CORRECTION_CHARS},
        "comment": {"type": "string", "maxLength": MAX_COMMENT_CHARS},
    },
}
_TEXT: Json = {"type": "string"}
_PROBLEM: Json = {"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": _TEXT}
ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": [*_PROBLEM], "properties": _PROBLEM}},
}
MODEL: Json = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {"id": {"type": "string"}, "object": {"const": "model"}, "created": {"type": "integer"}, "owned_by": {"type": "string"}},
}


@cache
def document() -> Json:
    """OpenAPI 3.1."""
    references, defined = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")], ref_template="#/components/schemas/{model}"
    )
    answer = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
    session = {"name": SESSION_HEADER, "in": "header", "schema": {"type": "string"}, "description": "What the client calls its session."}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    signed = {"name": FEEDBACK_HEADER, "in": "header", "schema": SIGNED}
    models = {"type": "object", "required": ["object", "data"], "properties": {"data": {"type": "array", "items": _ref("Model")}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tuneloop gateway", "version": "1", "description": "OpenAI's paths, and feedback on answers."},
        "paths": {
            "/v1/chat/completions": {"post": _post(references[ChatRequest, "validation"], answer, COMPLETING, [session])},
            "/v1/completions": {"post": _post(references[CompletionRequest, "validation"], answer, COMPLETING, [session])},
            "/v1/models": {"get": {"responses": _responses(_json(models), (401, 429))}},
            "/v1/models/{model}": {"get": {"parameters": [name], "responses": _responses(_json(_ref("Model")), (401, 404, 429))}},
            "/v1/feedback": {"post": _post(_ref("Feedback"), _json({"type": "object"}), RATING, [signed])},
            "/healthz": {"get": {"responses": _responses({"text/plain": {}}, ()), "security": []}},
            "/readyz": {"get": {"responses": {**_responses({"text/plain": {}}, ()), "503": {"description": "It stops."}}, "security": []}},
        },
        "components": {
            "schemas": {**defined["$defs"], "Feedback": FEEDBACK, "Error": ERROR, "Model": MODEL},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }  # fmt: skip


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _post(body: Json, answer: Json, refusals: tuple[int, ...], parameters: list[Json]) -> Json:
    body = {"required": True, "content": _json(body)}
    return {"parameters": parameters, "requestBody": body, "responses": _responses(answer, refusals)}


def _responses(answer: Json, refusals: tuple[int, ...]) -> Json:
    refused = {str(status): {"description": REFUSALS[status], "content": _json(_ref("Error"))} for status in refusals}
    return {"200": {"description": "The answer.", "content": answer}, **refused}
