"""What a conversation may hold: OpenAI's messages and tools, bounded and checked before any template sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, Final, NoReturn

from streamkv.errors import InvalidRequestError

__all__ = ["ROLES", "checked_messages", "checked_tools"]

ROLES: Final = ("assistant", "developer", "system", "tool", "user")

_MAX_MESSAGES: Final = 4096
_MAX_TOOLS: Final = 128
_MAX_CALLS: Final = 128
_MAX_DEPTH: Final = 32
_MAX_ITEMS: Final = 100_000

# A template may build control text from a name ("<function=" + name + ">").
_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")

_MESSAGE_KEYS: Final = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"})
_CALL_KEYS: Final = frozenset({"id", "type", "function"})
_TOOL_KEYS: Final = frozenset({"type", "function"})
_FUNCTION_KEYS: Final = frozenset({"name", "description", "parameters", "strict"})


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """Copies of the messages, with the arguments of tool calls as objects, which is what templates are written for.

    Raises:
        InvalidRequestError: these are no messages; `param` names the place.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidRequestError("messages must be a list with at least one message", param="messages")
    if len(messages) > _MAX_MESSAGES:
        raise InvalidRequestError(f"messages must hold at most {_MAX_MESSAGES} messages", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def checked_tools(tools: object) -> list[dict[str, Any]]:
    """Copies of the tools.

    Raises:
        InvalidRequestError: these are no tools in OpenAI's form; `param` names the place.
    """
    if not isinstance(tools, (list, tuple)) or len(tools) > _MAX_TOOLS:
        raise InvalidRequestError(f"tools must be a list of at most {_MAX_TOOLS} tools", param="tools")
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _message(message: object, at: str) -> dict[str, Any]:
    # A template may build a control token from the role ("<|" + role + "|>"), so that it is not free text.
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise InvalidRequestError(f"role must be one of {', '.join(ROLES)}", param=f"{at}.role")
    role, calls = message["role"], message.get("tool_calls")
    if not message.keys() <= _MESSAGE_KEYS:
        _refuse(f"a message has no {_first_other(message, _MESSAGE_KEYS)!r}", at)
    for name in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(message.get(name, ""), str):
            _refuse(f"{name} must be a string", f"{at}.{name}")
    if calls and role != "assistant":
        _refuse("only messages of the assistant have tool_calls", f"{at}.tool_calls")
    content = message.get("content")
    if not (isinstance(content, str) or (content is None and calls)):
        _refuse("a message has role and content, and content is a string (or null beside tool_calls)", at)
    checked = {key: value for key, value in message.items() if key != "tool_calls"}
    if reasoning := message.get("reasoning_content"):
        checked["thinking"] = reasoning  # its name in gpt-oss's template; transformers gives both
    if calls:  # an empty list is no calls, and templates ask whether the key is there
        checked["tool_calls"] = _calls(calls, f"{at}.tool_calls")
    return checked


def _calls(calls: object, at: str) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)) or len(calls) > _MAX_CALLS:
        _refuse(f"tool_calls must be a list of at most {_MAX_CALLS} calls", at)
    return [_call(call, f"{at}[{index}]") for index, call in enumerate(calls)]


def _call(call: object, at: str) -> dict[str, Any]:
    function = _function(call, _CALL_KEYS, frozenset({"name", "arguments"}), at)
    assert isinstance(call, Mapping)
    if not isinstance(call.get("id", ""), str):
        _refuse("id must be a string", f"{at}.id")
    arguments, place = function.get("arguments", {}), f"{at}.function.arguments"
    if isinstance(arguments, str):
        arguments = _parsed(arguments, place)
    if not isinstance(arguments, Mapping):
        _refuse("arguments must be a JSON object, as a string or as it is", place)
    return {**call, "type": "function", "function": {**function, "arguments": _plain(arguments, place)}}


def _tool(tool: object, at: str) -> dict[str, Any]:
    function = _function(tool, _TOOL_KEYS, _FUNCTION_KEYS, at)
    if not isinstance(function.get("description"), (str, NoneType)):
        _refuse("description must be a string", f"{at}.function.description")
    if not isinstance(function.get("parameters"), (Mapping, NoneType)):
        _refuse("parameters must be an object (a JSON schema)", f"{at}.function.parameters")
    return {"type": "function", "function": _plain(function, f"{at}.function")}


def _function(value: object, keys: frozenset[str], inner: frozenset[str], at: str) -> Mapping[str, Any]:
    """The function of a tool or a call."""
    if not isinstance(value, Mapping) or value.get("type", "function") != "function":
        _refuse('this must be an object with type "function"', at)
    function = value.get("function")
    if not isinstance(function, Mapping):
        _refuse("function must be an object", f"{at}.function")
    for mapping, allowed, place in ((value, keys, at), (function, inner, f"{at}.function")):
        if not mapping.keys() <= allowed:
            _refuse(f"{_first_other(mapping, allowed)!r} is not known here", place)
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _refuse("name must be 1 to 64 letters, digits, _ or -", f"{at}.function.name")
    return function


def _parsed(arguments: str, at: str) -> Any:
    try:
        return json.loads(arguments or "{}", parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # also an integer of too many digits
        raise InvalidRequestError("arguments must be a JSON object, as a string or as it is", param=at) from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _plain(value: Any, at: str) -> Any:
    """A copy made of JSON's own types; nothing with methods of its own reaches a template."""
    left = _MAX_ITEMS

    def copy(item: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _MAX_DEPTH:
            _refuse(f"this is nested deeper than {_MAX_DEPTH} levels or has more than {_MAX_ITEMS} values", at)
        if isinstance(item, Mapping):
            return {_key(key, at): copy(each, depth + 1) for key, each in item.items()}
        if isinstance(item, (list, tuple)):
            return [copy(each, depth + 1) for each in item]
        if item is None or type(item) in {str, bool, int, float}:
            return item
        _refuse("this holds something that JSON has no form for", at)

    return copy(value, 0)


def _key(key: object, at: str) -> str:
    if type(key) is not str:
        _refuse("names in an object must be strings", at)
    return key


def _first_other(mapping: Mapping[Any, Any], allowed: frozenset[str]) -> str:
    return str(next(key for key in mapping if key not in allowed))[:64]


def _refuse(message: str, param: str) -> NoReturn:
    raise InvalidRequestError(message, param=param)
