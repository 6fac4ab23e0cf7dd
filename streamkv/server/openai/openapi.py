"""`/openapi.json`: what the door takes and gives, from the very structs that it reads and writes."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import msgspec

from streamkv import __version__
from streamkv.server.openai import shapes
from streamkv.server.openai.requests import ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from streamkv.server.openai.tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse

__all__ = ["document"]

_Operation = tuple[str, type[msgspec.Struct] | None, type[msgspec.Struct] | None, type[msgspec.Struct] | None]

_OPERATIONS: Final[dict[tuple[str, str], _Operation]] = {
    ("post", "/v1/chat/completions"): ("createChatCompletion", ChatCompletionRequest, shapes.ChatCompletion, shapes.ChatChunk),
    ("post", "/v1/completions"): ("createCompletion", CompletionRequest, shapes.Completion, shapes.Completion),
    ("post", "/v1/embeddings"): ("createEmbedding", EmbeddingRequest, shapes.EmbeddingList, None),
    ("post", "/tokenize"): ("tokenize", TokenizeRequest, TokenizeResponse, None),
    ("post", "/detokenize"): ("detokenize", DetokenizeRequest, DetokenizeResponse, None),
    ("get", "/v1/models"): ("listModels", None, shapes.ModelList, None),
    ("get", "/v1/models/{model}"): ("retrieveModel", None, shapes.Model, None),
    ("get", "/openapi.json"): ("openapi", None, None, None),
}
"""(method, path) -> (name, request, whole answer, event of a streamed answer)."""

_ID_HEADER: Final = {
    "X-Request-Id": {"description": "Names the request; the client's own if it sent one.", "schema": {"type": "string"}}
}


@cache
def document() -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    structs = {struct for operation in _OPERATIONS.values() for struct in operation[1:] if struct is not None}
    named = sorted(structs | {shapes.ErrorBody}, key=lambda struct: struct.__name__)
    _, schemas = msgspec.json.schema_components(named, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in _OPERATIONS.items():
        paths.setdefault(path, {})[method] = _operation(path, *operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "StreamKV", "version": __version__, "description": "OpenAI's dialect; docs/openai.md has the details."},
        "security": [{"key": []}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(
    path: str,
    name: str,
    request: type[msgspec.Struct] | None,
    answer: type[msgspec.Struct] | None,
    chunk: type[msgspec.Struct] | None,
) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(answer) if answer is not None else {"type": "object"}}}
    if chunk is not None:
        # OpenAPI 3.1 has no word for a stream of events: this is the schema of each event's data before [DONE].
        content["text/event-stream"] = {"schema": _ref(chunk)}
    operation: dict[str, Any] = {
        "operationId": name,
        "responses": {
            "200": {"description": "The answer.", "headers": _ID_HEADER, "content": content},
            "default": {
                "description": "A refusal, or a failure.",
                "content": {"application/json": {"schema": _ref(shapes.ErrorBody)}},
            },
        },
    }
    if request is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
    if "{model}" in path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation


def _ref(struct: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{struct.__name__}"}
