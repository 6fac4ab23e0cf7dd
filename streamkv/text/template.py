"""Chat templates in a sandbox. A template comes with the model and never with a request, and is still not trusted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

import jinja2
import structlog
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamkv.errors import InvalidRequestError, ModelLoadError

__all__ = ["ChatTemplate"]

_MAX_SOURCE: Final = 256 * 1024
_MAX_OUTPUT: Final = 16 * 1024 * 1024

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
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
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
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=messages, add_generation_prompt=add_generation_prompt, **(special_tokens or {})
            ):
                size += len(piece)
                if size > _MAX_OUTPUT:
                    break
                pieces.append(piece)
        except _RefusedError as error:
            raise InvalidRequestError(f"the model's chat template refuses: {error}", param="messages") from error
        except Exception as error:  # whatever a template does, it must stay this request's problem
            log.warning("chat_template_failed", error=repr(error))
            raise InvalidRequestError("the model's chat template cannot render these messages", param="messages") from error
        if size > _MAX_OUTPUT:
            raise InvalidRequestError("the rendered conversation is too long", param="messages")
        return "".join(pieces)


class _RefusedError(jinja2.TemplateError):
    """The template called `raise_exception`."""


def _raise(message: str) -> NoReturn:
    raise _RefusedError(str(message)[:200])


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which models have not been trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)
