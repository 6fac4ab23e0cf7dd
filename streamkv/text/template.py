"""Chat templates in a sandbox. A template comes with the model and never with a request, and is still not trusted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Final, Literal, NoReturn

import jinja2
import structlog

from streamkv.errors import InvalidRequestError, ModelLoadError
from streamkv.text.sandbox import MAX_OUTPUT, BoundedEnvironment, bounded, weigh

__all__ = ["ChatTemplate"]

_MAX_SOURCE: Final = 256 * 1024
_MAX_INDENT: Final = 16
_MAX_TIME_FORMAT: Final = 100

_PROBE: Final = "streamkv_probe"
_PROBE_KEY: Final = "streamkv_key"
_PROBE_NAMES: Final = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "-")
_PROBE_USER: Final[Mapping[str, Any]] = {"role": "user", "content": "-"}
_PROBE_FUNCTION: Final = {"name": _PROBE, "description": "-", "parameters": {"type": "object", "properties": {}}}
_PROBE_TOOL: Final = {"type": "function", "function": _PROBE_FUNCTION}
_PROBE_CALLED: Final = {"name": _PROBE, "arguments": {_PROBE_KEY: "-"}}
_PROBE_CALL: Final[Mapping[str, Any]] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "callprobe", "type": "function", "function": _PROBE_CALLED}],  # Mistral wants nine characters
}

log = structlog.get_logger(__name__)


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Compile.

        Raises:
            ModelLoadError: it is too large or no valid Jinja.
        """
        if len(source) > _MAX_SOURCE:
            raise ModelLoadError("the model's chat template is larger than 256 KiB")
        environment = BoundedEnvironment()
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: now().strftime(str(form)[:_MAX_TIME_FORMAT])
        try:
            with bounded():
                self._template = environment.from_string(source)
        except Exception as error:  # Jinja's own, and whatever its compiler does with deep or strange sources
            raise ModelLoadError("the model's chat template is no valid Jinja") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        special_tokens: Mapping[str, str] | None = None,
    ) -> str:
        """The prompt's text.

        Args:
            messages: as `checked_messages` gives them; so are `tools`, as `checked_tools` does.

        Raises:
            InvalidRequestError: the template refuses these messages (roles in the wrong order, say), fails on them, or has no
                place for tools.
        """
        called = any("tool_calls" in message for message in messages)
        if tools and not self.has_tools:
            raise InvalidRequestError("the model's chat template has no place for tools; send none", param="tools")
        if called and self._call_form == "none":
            raise InvalidRequestError("the model's chat template has no place for tool_calls; send none", param="messages")
        if called and self._call_form == "text":
            messages = [_with_text_arguments(message) for message in messages]
        names = dict(special_tokens or {})
        text = self._rendered(messages=messages, tools=tools or None, add_generation_prompt=add_generation_prompt, **names)
        if not all(tool["function"]["name"] in text for tool in tools or ()):
            raise InvalidRequestError("the model's chat template leaves these tools out of this conversation", param="tools")
        return text

    @cached_property
    def has_tools(self) -> bool:
        """True if tools reach the prompt: found out by trying."""
        talks = ([_PROBE_USER], [{"role": "system", "content": "-"}, _PROBE_USER])
        return any(_PROBE in self._attempt(messages=talk, tools=[_PROBE_TOOL]) for talk in talks)

    @cached_property
    def _call_form(self) -> Literal["object", "text", "none"]:
        """How the template wants the arguments of tool calls: most write an object as JSON, some join a string."""
        talk = [_PROBE_USER, _PROBE_CALL, {"role": "tool", "name": _PROBE, "tool_call_id": "callprobe", "content": "-"}]
        written = self._attempt(messages=talk, tools=[_PROBE_TOOL])
        if _PROBE_KEY in written and f"'{_PROBE_KEY}'" not in written:  # not as Python writes an object
            return "object"
        talk = [_with_text_arguments(message) for message in talk]
        return "text" if _PROBE_KEY in self._attempt(messages=talk, tools=[_PROBE_TOOL]) else "none"

    def _attempt(self, **names: Any) -> str:
        try:
            with bounded():
                return self._render(add_generation_prompt=True, **_PROBE_NAMES, **names)
        except Exception:  # whatever a template does, the answer is no
            return ""

    def _rendered(self, **names: Any) -> str:
        try:
            with bounded():
                return self._render(**names)
        except _RefusedError as error:
            raise InvalidRequestError(f"the model's chat template refuses: {error}", param="messages") from error
        except Exception as error:  # whatever a template does, it must stay this request's problem
            log.warning("chat_template_failed", error=type(error).__name__)  # its words may be those of a message
            raise InvalidRequestError("the model's chat template cannot render these messages", param="messages") from error

    def _render(self, **names: Any) -> str:
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate(documents=None, **names):
            size += len(piece)
            if size > MAX_OUTPUT:
                raise ValueError("the rendered conversation is too long")
            pieces.append(piece)
        return "".join(pieces)


def _with_text_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the arguments of its tool calls as JSON."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


class _RefusedError(jinja2.TemplateError):
    """The template called `raise_exception`."""


def _raise(message: str) -> NoReturn:
    raise _RefusedError(str(message)[:200])


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which models have not been trained on; the arguments are those of transformers.
    if indent is not None and not 0 <= indent <= _MAX_INDENT:
        raise ValueError(f"indent is from 0 to {_MAX_INDENT}")
    weigh(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
