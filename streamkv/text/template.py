"""Chat templates in a sandbox. A template comes with the model and never with a request, and is still not trusted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

import jinja2
import structlog

from streamkv.errors import InvalidRequestError, ModelLoadError
from streamkv.text.sandbox import MAX_OUTPUT, BoundedEnvironment, bounded, weigh

__all__ = ["ChatTemplate"]

_MAX_SOURCE: Final = 256 * 1024
_MAX_INDENT: Final = 16
_MAX_LOGGED: Final = 500
_MAX_TIME_FORMAT: Final = 100

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
        add_generation_prompt: bool = True,
        special_tokens: Mapping[str, str] | None = None,
    ) -> str:
        """The prompt's text.

        Raises:
            InvalidRequestError: the template refuses these messages (roles in the wrong order, say) or fails on them.
        """
        try:
            with bounded():
                return self._render(messages=messages, add_generation_prompt=add_generation_prompt, **(special_tokens or {}))
        except _RefusedError as error:
            raise InvalidRequestError(f"the model's chat template refuses: {error}", param="messages") from error
        except Exception as error:  # whatever a template does, it must stay this request's problem
            log.warning("chat_template_failed", error=repr(error)[:_MAX_LOGGED])
            raise InvalidRequestError("the model's chat template cannot render these messages", param="messages") from error

    def _render(self, **names: Any) -> str:
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate(**names):
            size += len(piece)
            if size > MAX_OUTPUT:
                raise ValueError("the rendered conversation is too long")
            pieces.append(piece)
        return "".join(pieces)


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
