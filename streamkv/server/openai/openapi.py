"""`/openapi.json`: what the door takes and gives, from the very structs that it reads and writes.

Bounds are checked elsewhere, in one place for all of StreamKV (`SamplingParams`, `check_body`), and only described here; a test
compares the two value by value.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import msgspec

from streamkv import __version__
from streamkv import sampling_params as sampling
from streamkv.protocol import bodies
from streamkv.protocol.body_structs import REFUSED, ChatMessage
from streamkv.server.openai import shapes
from streamkv.server.openai.embeddings import MAX_INPUTS
from streamkv.server.openai.requests import MAX_PROMPTS, ChatCompletionRequest, CompletionRequest, EmbeddingRequest
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

_Bounds = dict[str, dict[str, Any]]

_TEXT_OF_STOP: Final = {"minLength": 1, "maxLength": sampling.MAX_STOP_CHARS}
_BAD_WORD: Final = {"minLength": 1, "maxLength": sampling.MAX_BAD_WORD_CHARS}
_TOKEN_ID: Final = {"minimum": 0, "maximum": sampling.MAX_TOKEN_ID}
_LENGTH: Final = {"integer": {"minimum": 0, "maximum": sampling.MAX_TOKENS_BOUND}}
_SHARE: Final = {"number": {"exclusiveMinimum": 0, "maximum": 1}}
_PENALTY: Final = {"number": {"minimum": -2, "maximum": 2}}
_LOGPROBS: Final = {"integer": {"minimum": 0, "maximum": sampling.MAX_LOGPROBS}}


def _texts(most: int) -> _Bounds:
    """A text, token ids, or a list of these."""
    text, ids = {"type": "string", "minLength": 1}, {"type": "array", "minItems": 1, "items": {"type": "integer"}}
    several = {"maxItems": most, "items": {"anyOf": [text, ids]}}
    return {"string": text, "array": {"minItems": 1, "items": {}, "anyOf": [ids, several]}}


_BOUNDS: Final[dict[str, _Bounds]] = {
    "max_tokens": _LENGTH,
    "max_completion_tokens": _LENGTH,
    "min_tokens": _LENGTH,
    "temperature": {"number": {"minimum": 0, "maximum": 100}},
    "top_k": {"integer": {"minimum": -1, "maximum": sampling.MAX_TOKEN_ID}},
    "top_p": _SHARE,
    "typical_p": _SHARE,
    "min_p": {"number": {"minimum": 0, "maximum": 1}},
    "repetition_penalty": {"number": {"exclusiveMinimum": 0, "maximum": 10}},
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logit_bias": {
        "object": {
            "maxProperties": sampling.MAX_LOGIT_BIAS,
            "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    },
    "allowed_token_ids": {"array": {"maxItems": sampling.MAX_ALLOWED_TOKEN_IDS, "items": {"type": "integer"} | _TOKEN_ID}},
    "bad_token_ids": {"array": {"maxItems": sampling.MAX_BAD_WORDS, "items": {"type": "integer"} | _TOKEN_ID}},
    "stop_token_ids": {"array": {"maxItems": sampling.MAX_STOP_TOKEN_IDS, "items": {"type": "integer"} | _TOKEN_ID}},
    "bad_words": {"string": _BAD_WORD, "array": {"maxItems": sampling.MAX_BAD_WORDS, "items": {"type": "string"} | _BAD_WORD}},
    "stop": {
        "string": _TEXT_OF_STOP,
        "array": {"maxItems": sampling.MAX_STOP_STRINGS, "items": {"type": "string"} | _TEXT_OF_STOP},
    },
    "seed": {"integer": {"minimum": 0, "maximum": sampling.MAX_SEED}},
    "logprobs": _LOGPROBS,
    "top_logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "logits_processors": {"object": {"maxProperties": sampling.MAX_PROCESSORS}},
    "n": {"integer": {"minimum": 1, "maximum": sampling.MAX_N}},
    "cache_salt": {"string": {"minLength": 1, "maxLength": bodies.MAX_SALT_CHARS}},
    "priority": {"integer": {"minimum": -(2**31), "maximum": 2**31 - 1}},
    "messages": {"array": {"minItems": 1, "maxItems": bodies.MAX_MESSAGES}},
    "prompt": _texts(MAX_PROMPTS),
    "input": _texts(MAX_INPUTS),
    "pooling": {"string": {"enum": list(sampling.POOLINGS)}},
    "role": {"string": {"enum": sorted(bodies.ROLES)}},
}
"""Field of a request -> JSON type -> what its values must be besides."""

_ID_HEADER: Final = {
    "X-Request-Id": {"description": "Names the request; the client's own if it sent one.", "schema": {"type": "string"}}
}


@cache
def document(*, needs_key: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document of a server that asks for keys, or does not."""
    structs = {struct for operation in _OPERATIONS.values() for struct in operation[1:] if struct is not None}
    named = sorted(structs | {shapes.ErrorBody}, key=lambda struct: struct.__name__)
    _, schemas = msgspec.json.schema_components(named, ref_template="#/components/schemas/{name}")
    for struct in (ChatCompletionRequest, CompletionRequest, EmbeddingRequest, ChatMessage):
        _narrow(schemas[struct.__name__]["properties"], struct)
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in _OPERATIONS.items():
        paths.setdefault(path, {})[method] = _operation(path, *operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "StreamKV", "version": __version__, "description": "OpenAI's dialect; docs/openai.md has the details."},
        "security": [{"key": []}] if needs_key else [],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _narrow(properties: dict[str, dict[str, Any]], struct: type[msgspec.Struct]) -> None:
    """Say what the types alone do not: bounds, and values of fields that are not served."""
    refused = next((fields for kind, fields in REFUSED.items() if issubclass(struct, kind)), {})
    for name, schema in properties.items():
        if name in refused:
            properties[name] = {"enum": [None, *refused[name]], "default": None}
        for branch in schema.get("anyOf", [schema]):
            branch |= _BOUNDS.get(name, {}).get(branch.get("type", ""), {})  # noqa: PLW2901  # in place: it is the schema's own


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
