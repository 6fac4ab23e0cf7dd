"""The table of bad input: every field that a client can send, and what must not be in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from streamkv.protocol import body_structs
from tests.server.serving import CONTEXT, VOCAB

NAN: Final = float("nan")
INF: Final = float("inf")
HUGE: Final = (2**63, 2**64 - 1, -(2**63))
LONG: Final = "x" * 300_000

NOT_TEXT: Final = (5, -1, 1.5, NAN, True, ["a"], {"a": 1}, b"bytes")
NOT_FLAG: Final = (0, 1, 1.5, NAN, "true", [], {})
NOT_INTEGER: Final = ("5", "", 1.5, 1e30, NAN, INF, -INF, True, False, [], {})
NOT_NUMBER: Final = ("0.5", "", True, False, [], {})
NOT_LIST: Final = ("a", 5, 1.5, NAN, True, {})
NOT_IDS: Final = (-1, VOCAB, 2**31, *HUGE)
"""Integers that are no token ids."""


@dataclass(frozen=True)
class Bad:
    """Values that one field must not have, and how the refusal names it.

    Attributes:
        param: what `param` says, if it is not the field's own path; with `*` at the end: what it starts with.
        notice: the refusal belongs to no stream.
        tokenised: only tokenising can tell.
        beside: other fields of the same object.
    """

    values: tuple[Any, ...]
    param: str | None = None
    code: str = "invalid_request"
    notice: bool = False
    tokenised: bool = False
    beside: dict[str, Any] | None = None


def _user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


_SHARED: Final[dict[str, list[Bad]]] = {
    "cache_salt": [Bad((*NOT_TEXT, "", "x" * 257, LONG))],
    "model": [Bad(NOT_TEXT), Bad(("", "gpt-4", "fake ", "FAKE", "../fake", LONG), code="model_not_found")],
    "max_tokens": [
        Bad((*NOT_INTEGER, 0, -1, 2**24 + 1, 10**12, *HUGE)),
        Bad((CONTEXT, CONTEXT + 1, 2**24), code="context_length_exceeded"),
        Bad((CONTEXT - 2,), param="body.prompt|body.messages", code="context_length_exceeded", tokenised=True),
        Bad((5,), param="body.max_completion_tokens", beside={"max_completion_tokens": 5}),
    ],
    "max_completion_tokens": [
        Bad((*NOT_INTEGER, 0, -1, 2**24 + 1, *HUGE)),
        Bad((CONTEXT,), code="context_length_exceeded"),
    ],
    "temperature": [Bad((*NOT_NUMBER, -0.1, -1, 100.5, 10**9, 1e300, NAN, INF, -INF, *HUGE))],
    "top_p": [Bad((*NOT_NUMBER, 0, 0.0, -0.1, 1.0001, 2, 1e300, NAN, INF, -INF, *HUGE))],
    "top_k": [Bad((*NOT_INTEGER, -2, 2**31, *HUGE))],
    "min_tokens": [Bad((*NOT_INTEGER, -1, 3, 2**24 + 1, 10**12, *HUGE))],
    "min_p": [Bad((*NOT_NUMBER, -0.1, 1.0001, 2, 1e300, NAN, INF, -INF, *HUGE))],
    "typical_p": [Bad((*NOT_NUMBER, 0, 0.0, -0.1, 1.0001, 2, 1e300, NAN, INF, -INF, *HUGE))],
    "repetition_penalty": [Bad((*NOT_NUMBER, 0, 0.0, -0.1, 10.5, 1e300, NAN, INF, -INF, *HUGE))],
    "presence_penalty": [Bad((*NOT_NUMBER, -2.1, 2.1, 1e300, NAN, INF, -INF, *HUGE))],
    "frequency_penalty": [Bad((*NOT_NUMBER, -2.1, 2.1, 1e300, NAN, INF, -INF, *HUGE))],
    "logit_bias": [
        Bad(("a", 5, 1.5, NAN, True, [], dict.fromkeys(range(301), 1.0), *({value: 1.0} for value in NOT_IDS))),
        Bad(({5: 100.5}, {5: -101}, {5: NAN}, {5: INF})),
        Bad(({5: "a"}, {5: True}, {5: []}, {"a": 1.0}, {"1.5": 1.0}, {"": 1.0}), param="body.logit_bias*"),
    ],
    "allowed_token_ids": [
        Bad((*NOT_LIST, [0] * 1025, [0] * 100_000, *([value] for value in NOT_IDS))),
        Bad((["a"], [1.5], [NAN], [True], [None], [[1]]), param="body.allowed_token_ids[0]"),
    ],
    "bad_token_ids": [
        Bad((*NOT_LIST, [0] * 129, [0] * 100_000, *([value] for value in NOT_IDS))),
        Bad((["a"], [1.5], [NAN], [True], [None], [[1]]), param="body.bad_token_ids[0]"),
    ],
    "bad_words": [
        Bad((5, 1.5, NAN, True, {}, "", "x" * 65, LONG, [""], ["x" * 65], ["a"] * 129, ["ab"] * 100_000)),
        Bad(([5], [None], [True], [["a"]]), param="body.bad_words[0]"),
    ],
    "seed": [Bad((*NOT_INTEGER, -1, *HUGE))],
    "stop": [
        Bad((5, 1.5, NAN, True, {}, "", "x" * 65, LONG, [""], ["x" * 65], ["a"] * 5, ["ab"] * 100_000)),
        Bad(([5], [None], [True], [["a"]]), param="body.stop[0]"),
    ],
    "stop_token_ids": [
        Bad((*NOT_LIST, [0] * 17, [0] * 100_000, *([value] for value in NOT_IDS))),
        Bad((["a"], [1.5], [NAN], [True], [None], [[1]]), param="body.stop_token_ids[0]"),
    ],
    "include_stop_str_in_output": [Bad(NOT_FLAG)],
    "ignore_eos": [Bad(NOT_FLAG)],
    "prompt_logprobs": [Bad((*NOT_INTEGER, -1, 21, VOCAB, *HUGE))],
    "logits_processors": [
        Bad(("a", 5, 1.5, NAN, True, [], {"unknown": {}}, {LONG: 1}, {f"p{n}": 1 for n in range(9)})),
    ],
    "skip_special_tokens": [Bad(NOT_FLAG)],
    "n": [Bad((*NOT_INTEGER, 0, -1, 2, 17, 16384, *HUGE))],
}

_UNSERVED: Final = ("yes", 2, 0.5, {"a": [1]}, ["a"])

_REFUSED: Final[dict[type, dict[str, list[Bad]]]] = {
    kind: {
        name: [Bad(tuple(value for value in (*_UNSERVED, True, False) if value not in harmless))]
        for name, harmless in fields.items()
    }
    for kind, fields in body_structs.REFUSED.items()
}
"""Fields that would change the answer and are not served: anything but what they are anyway."""

COMPLETIONS: Final[dict[str, list[Bad]]] = (
    _SHARED
    | _REFUSED[body_structs.CompletionBody]
    | {
        "logprobs": [Bad((*NOT_INTEGER, -1, 21, VOCAB, *HUGE))],
        "echo": [Bad(NOT_FLAG)],
        "prompt": [
            Bad((None, 5, 1.5, NAN, True, {}, "", [], [""], [[]], [[True]], [[1, 2.5]]), param="body.prompt*"),
            Bad((["a", "b"], [[1, 2], [3]], [1, "a"], ["a"] * 2000)),
            Bad(([1.5], [NAN], [True], [None], [b"a"]), param="body.prompt[0]"),
            Bad(tuple([1, value] for value in NOT_IDS)),
            Bad(([1] * CONTEXT, [1] * 100_000, LONG), code="context_length_exceeded"),
            Bad(("x" * CONTEXT,), code="context_length_exceeded", tokenised=True),
        ],
    }
)

CHAT: Final[dict[str, list[Bad]]] = (
    _SHARED
    | _REFUSED[body_structs.ChatBody]
    | {
        "parallel_tool_calls": [
            Bad(NOT_FLAG),
            Bad((False,), beside={"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ],
        "logprobs": [Bad(NOT_FLAG)],
        "top_logprobs": [
            Bad((*NOT_INTEGER, -1, 21, *HUGE), beside={"logprobs": True}),
            Bad((1,)),
            Bad((1,), beside={"logprobs": False}),
        ],
        "messages": [
            Bad((None, "a", 5, 1.5, NAN, True, {}, [], _user("a") * 1025)),
            Bad((["a"], [5], [None], [[]]), param="body.messages[0]"),
            Bad((_user(LONG),), code="context_length_exceeded"),
            Bad((_user("x" * CONTEXT), _user("x") * 1000), code="context_length_exceeded", tokenised=True),
        ],
        "messages[].role": [
            Bad(
                tuple([{"role": value, "content": "a"}] for value in (*NOT_TEXT, None, "", "root", LONG)),
                param="body.messages[0].role",
            ),
            Bad(([{"content": "a"}], [{}]), param="body.messages[0].role"),
        ],
        "tools": [
            Bad(("a", 5, 1.5, NAN, True, {})),
            Bad(([5], ["a"], [None], [[]]), param="body.tools[0]"),
            Bad(([{}], [{"type": "function"}], [{"type": "function", "function": {}}]), param="body.tools*"),
        ],
        "messages[].name": [Bad(tuple([{"role": "tool", "name": value}] for value in NOT_TEXT), param="body.messages[0].name")],
        "messages[].tool_call_id": [
            Bad(tuple([{"role": "tool", "tool_call_id": value}] for value in NOT_TEXT), param="body.messages[0].tool_call_id")
        ],
        "messages[].reasoning_content": [
            Bad(
                tuple([{"role": "assistant", "reasoning_content": value}] for value in NOT_TEXT),
                param="body.messages[0].reasoning_content",
            )
        ],
        "messages[].tool_calls": [
            Bad(
                tuple([{"role": "assistant", "tool_calls": value}] for value in ("a", 5, 1.5, NAN, True, {}, [5], [{}])),
                param="body.messages[0].tool_calls*",
            )
        ],
        "messages[].content": [
            Bad(tuple(_user(value) for value in (5, 1.5, NAN, True, {"type": "text"})), param="body.messages[0].content"),
            Bad(([*_user("a"), *_user(5)],), param="body.messages[1].content"),
            Bad((_user(["a"]), _user([5])), param="body.messages[0].content[0]"),
        ],
        "messages[].content[].type": [
            Bad(
                (*(_user([{"type": kind, "text": "a"}]) for kind in (5, None, "image_url", LONG)), _user([{"text": "a"}])),
                param="body.messages[0].content[0].type",
            ),
        ],
        "messages[].content[].text": [
            Bad(tuple(_user([{"type": "text", "text": value}]) for value in NOT_TEXT), param="body.messages[0].content[0].text"),
            Bad((_user([{"type": "text"}]),), param="body.messages[0].content[0].text"),
        ],
    }
)

_INPUT: Final[list[Bad]] = [
    Bad((None, 5, 1.5, NAN, True, {}, "", [], ["a", "b"], [[1], [2]]), param="body.input*"),
    Bad(([""], [[]], [None], [{}], [True], [["a"]], [[1.5]], [[1, None]]), param="body.input*"),
    Bad(tuple([1, value] for value in NOT_IDS)),
    Bad(([1] * (CONTEXT + 1), [[1] * 100_000], LONG, [LONG]), param="body.input|body.prompt", code="context_length_exceeded"),
    Bad(("x" * (CONTEXT + 1),), code="context_length_exceeded", tokenised=True),
]

EMBEDDINGS: Final[dict[str, list[Bad]]] = {
    "model": _SHARED["model"],
    "input": _INPUT,
    "pooling": [Bad((*NOT_TEXT, "", "max", "MEAN", LONG))],
}

SCORE: Final[dict[str, list[Bad]]] = {
    "model": _SHARED["model"],
    "input": [*_INPUT, Bad(([7], "x"), tokenised=True)],
    "prompt": [
        Bad((5, 1.5, NAN, True, {}, ["text"], [[1, 2]], [None], [1.5]), param="body.prompt*"),
        Bad(tuple([1, value] for value in NOT_IDS), tokenised=True),
        Bad(([1] * CONTEXT,), param="body.input", code="context_length_exceeded", tokenised=True),
    ],
    "logprobs": [Bad((*NOT_INTEGER, -1, 21, VOCAB, *HUGE))],
}

BODIES: Final[dict[str, dict[str, list[Bad]]]] = {
    "completions": COMPLETIONS,
    "chat": CHAT,
    "embeddings": EMBEDDINGS,
    "score": SCORE,
}
"""API -> field of its body -> what must not be in it."""

VALID_BODY: Final[dict[str, dict[str, Any]]] = {
    "completions": {"prompt": "abc", "max_tokens": 2},
    "chat": {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 2},
    "embeddings": {"input": "abc"},
    "score": {"input": "abc"},
}

_BAD_NAMES: Final = ("", "a b", "ä", "a/b", "\n", "\0", "x" * 65, LONG)

_CREATE: Final[dict[str, list[Bad]]] = {
    "id": [Bad((*NOT_TEXT, *_BAD_NAMES, None), notice=True)],
    "ids": [
        Bad(("a", 5, 1.5, NAN, True, {}, [], ["a", "a"], ["a"] * 17, [f"a{n}" for n in range(17)], ["a", ""]), notice=True),
        Bad((["a", 5], ["a", None]), param="ids[1]", notice=True),
        Bad((["a"],), notice=True, beside={"id": "b"}),
    ],
    "api": [Bad((*NOT_TEXT, None, "", "responses", "CHAT", LONG))],
    "body": [Bad((None, 5, 1.5, True, "a", []), param="body")],
    "max": [Bad((*NOT_INTEGER, -1, 2**53, *HUGE))],
    "on_disconnect": [Bad((*NOT_TEXT, None, "", "keep", LONG))],
    "priority": [Bad((*NOT_INTEGER, None, 2**31, -(2**31) - 1, *HUGE))],
    "traceparent": [Bad(NOT_TEXT)],  # a text that is none is ignored
}

_REST: Final[dict[str, dict[str, list[Bad]]]] = {
    "cancel": {"id": [Bad((*NOT_TEXT, None, *_BAD_NAMES), notice=True)]},
    "ping": {"ts": [Bad((*NOT_NUMBER, None, NAN, INF, -INF), notice=True)]},
    "bye": {"cancel": [Bad((*NOT_FLAG, None), notice=True)]},
    "credit": {
        "id": [Bad((*NOT_TEXT, None, *_BAD_NAMES), notice=True)],
        "max": [Bad((*NOT_INTEGER, None, -1, 2**53, *HUGE), notice=True)],
        "ack": [Bad((*NOT_INTEGER, None, -1, 2**53, *HUGE), notice=True)],
    },
    "resume": {
        "id": [Bad((*NOT_TEXT, None, *_BAD_NAMES), notice=True)],
        "epoch": [Bad(NOT_TEXT, notice=True)],
        "from": [Bad((*NOT_INTEGER, None), notice=True)],
        "max": [Bad(NOT_INTEGER, notice=True)],
    },
    "fork": {
        "from": [Bad((*NOT_TEXT, None)), Bad(("", "nobody", LONG), code="fork_gone")],
        "id": [Bad((*NOT_TEXT, *_BAD_NAMES, None), notice=True)],
        "ids": [Bad(("a", 5, 1.5, NAN, True, {}), notice=True), Bad(([5],), param="ids[0]", notice=True)],
        "at": [Bad(NOT_INTEGER)],
        "body": [Bad((None, 5, "a", [], {"top_p": 5}), param="from", code="fork_gone")],  # nobody has no body to be changed
        "max": [Bad((*NOT_INTEGER, -1, 2**53, *HUGE))],
        "on_disconnect": [Bad((*NOT_TEXT, None, "", "keep", LONG))],
        "priority": [Bad((*NOT_INTEGER, None, 2**31, -(2**31) - 1, *HUGE))],
        "traceparent": [Bad(NOT_TEXT)],
    },
}

MESSAGES: Final[dict[str, dict[str, list[Bad]]]] = {"create": _CREATE} | _REST
"""Type of message -> field -> what must not be in it. `hello` has a table of its own: its mistakes end the connection."""

HELLO: Final[dict[str, tuple[Any, ...]]] = {
    "token": NOT_TEXT,
    "session": NOT_TEXT,
    "epoch": NOT_TEXT,
    "client": NOT_TEXT,
    "caps": ("a", 5, 1.5, True, {}, [5], [None]),
}

VALID: Final[dict[str, dict[str, Any]]] = {
    "create": {"id": "bad", "api": "completions", "body": {"prompt": "abc", "max_tokens": 2}},
    "cancel": {"id": "nobody"},
    "ping": {"ts": 1.0},
    "bye": {"cancel": True},
    "credit": {"id": "nobody", "max": 5},
    "resume": {"id": "bad", "epoch": "e", "from": 0},
    "fork": {"from": "nobody", "id": "bad"},
    "hello": {},
}


def writable(value: Any, *, text: bool) -> bool:
    """JSON has no NaN, no infinity and no bytes (which msgspec writes as text)."""
    return not text or not any(
        isinstance(part, bytes) or (isinstance(part, float) and not abs(part) < INF) for part in _parts(value)
    )


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [part for item in value.values() for part in _parts(item)]
    if isinstance(value, list):
        return [part for item in value[:4] for part in _parts(item)]
    return [value]


def encoded_fields(struct: type[msgspec.Struct]) -> tuple[str, ...]:
    """Names on the wire."""
    return struct.__struct_encode_fields__
