"""Jinja for templates nobody has read: no Python internals, and bounds on time, memory and output.

Jinja's own sandbox stops attribute walks; it does not stop `'x' * 10**10`, nested loops or a filter that pads to a gigabyte.
Here every operation that can make a value larger than its operands looks at the sizes first, and every loop turn, call, filter
and operator counts against one budget per rendering. What is compared or looked up is weighed before, because a list can hold
itself many times over at no cost, and a comparison would walk all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Final

from jinja2 import Environment, nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["MAX_OUTPUT", "BoundedEnvironment", "bounded", "weigh"]

MAX_OUTPUT: Final = 16 * 1024 * 1024
"""Most characters of any string."""

_MAX_ITEMS: Final = 1_000_000
_MAX_TURNS: Final = 1_000_000
_MAX_SECONDS: Final = 5.0
_MAX_BITS: Final = 256
_MAX_INDENT: Final = 64

_REMOVED_GLOBALS: Final = ("lipsum", "cycler", "joiner")
# They pad, repeat or look attributes up, and no chat template needs them.
_REMOVED_FILTERS: Final = (
    "attr", "batch", "center", "filesizeformat", "format", "pprint", "random", "slice", "sum", "urlize", "wordwrap", "xmlattr",
)  # fmt: skip
# Their result is the text of whatever they get.
_TEXT_FILTERS: Final = {
    "capitalize", "e", "escape", "forceescape", "lower", "safe", "string", "striptags", "title", "trim", "truncate", "upper",
    "urlencode",
}  # fmt: skip
_REMOVED_METHODS: Final = {"center", "encode", "expandtabs", "ljust", "rjust", "translate", "zfill", "format", "format_map"}


class _Budget:
    """What one rendering may still do."""

    __slots__ = ("deadline", "turns")

    def __init__(self) -> None:
        self.turns = _MAX_TURNS
        self.deadline = time.monotonic() + _MAX_SECONDS

    def spend(self) -> None:
        self.turns -= 1
        if self.turns < 0 or time.monotonic() > self.deadline:
            raise SecurityError("the template takes too long")


_budget: ContextVar[_Budget] = ContextVar("streamkv_template_budget")


@contextmanager
def bounded() -> Iterator[None]:
    """Whatever is compiled and rendered inside shares one fresh budget."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


class _Generation(Extension):
    """`{% generation %}`, with which trainers mark the model's own words: a block that writes what is in it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way to declare it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox; use it inside `bounded()` only."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], finalize=_printable)
        self.concat = _concat  # type: ignore[method-assign]  # Jinja's own knob: what joins the text of a macro or a block
        for name in _REMOVED_GLOBALS:
            del self.globals[name]
        self.filters = {
            name: _measured(each, printable=name in _TEXT_FILTERS)
            for name, each in self.filters.items()
            if name not in _REMOVED_FILTERS
        }
        self.filters |= {"replace": _replace, "join": _join, "indent": _indent}
        self.filters |= {"streamkv_turns": _turns, "streamkv_weighed": _weighed}
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: _measured(each, printable=False) for name, each in tests.items()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "streamkv_turns")
        for comparison in tree.find_all(nodes.Compare):
            comparison.expr = _filtered(comparison.expr, "streamkv_weighed")
            for operand in comparison.ops:
                operand.expr = _filtered(operand.expr, "streamkv_weighed")
        for pair in tree.find_all(nodes.Pair):
            pair.key = _filtered(pair.key, "streamkv_weighed")
        return tree

    def from_string(self, *args: Any, **kwargs: Any) -> Any:
        """As Jinja's; the functions with which compiled code joins strings are replaced by bounded ones."""
        template = super().from_string(*args, **kwargs)
        joins = {"str_join": _concat, "markup_join": _concat_markup(template)}
        template.root_render_func.__globals__.update(joins)
        return template

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Looking a key up hashes it and compares it."""
        return super().getitem(obj, _weighed(None, argument))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Nothing of numbers, and no method of strings that pads or formats."""
        if isinstance(obj, (int, float)) or (isinstance(obj, str) and attr in _REMOVED_METHODS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """`"...".format` in any disguise."""
        return None if super().wrap_str_format(value) is None else _refuse_format

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call a template makes."""
        weigh((args, kwargs))
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, (list, tuple, dict)):
            weigh(owner)  # `count` and `index` compare with everything in it
        if isinstance(owner, str) and name == "replace" and len(args) > 1:
            _check_replace(owner, args[0], args[1])
        if isinstance(owner, str) and name == "join" and args:
            args = (_joinable(owner, args[0]), *args[1:])
        return _fits(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """+ * ** %, sizes first."""
        _spend()
        size = _size(left) + _size(right)
        if operator == "%" and isinstance(left, str):
            _refuse_format()
        if operator == "*":
            size = (_size(left) or _size(right)) * max(_magnitude(left), _magnitude(right))
        if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_BITS:
            raise SecurityError("a number is too large")
        if size > MAX_OUTPUT:
            raise SecurityError("a value is too large")
        return _fits(super().call_binop(context, operator, left, right))


# -- sizes ------------------------------------------------------------------------------------------------------------


def _spend() -> None:
    _budget.get().spend()


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _magnitude(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 1


def _fits(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_OUTPUT:
        raise SecurityError("a text is too long")
    if isinstance(value, (list, tuple, dict)) and len(value) > _MAX_ITEMS:
        raise SecurityError("a list is too long")
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise SecurityError("a number is too large")
    return value


def weigh(value: Any, *, printable: bool = False) -> None:
    """Refuse containers whose text is too long: a list can hold itself many times over at no cost.

    Args:
        printable: refuse functions and other objects too, whose text tells about the process.
    """
    _spend()
    stack, items, characters = [value], 0, 0
    while stack:
        item = stack.pop()
        items += 1
        if isinstance(item, str):
            characters += len(item)
        elif isinstance(item, Mapping):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            stack += item
        elif printable and not isinstance(item, (int, float, Undefined)) and item is not None:
            raise SecurityError("only texts, numbers, lists and objects can be written")
        if items > _MAX_ITEMS or characters > MAX_OUTPUT:
            raise SecurityError("a value is too large")


# -- what replaces Jinja's own ----------------------------------------------------------------------------------------


def _printable(value: Any) -> Any:
    if not isinstance(value, str):
        weigh(value, printable=True)
    return value


def _measured(function: Callable[..., Any], *, printable: bool) -> Callable[..., Any]:
    @wraps(function)  # with the marks by which Jinja knows what to pass
    def measured(*args: Any, **kwargs: Any) -> Any:
        own = [arg for arg in args if not isinstance(arg, (Context, nodes.EvalContext, BoundedEnvironment))]
        weigh((own, kwargs), printable=printable)
        return _fits(function(*args, **kwargs))

    return measured


def _filtered(expression: Any, name: str) -> Any:
    """The expression through one of our own filters; a constant can do no harm."""
    if isinstance(expression, nodes.Const):
        return expression
    return nodes.Filter(expression, name, [], [], None, None, lineno=expression.lineno)


@pass_context
def _weighed(_context: Context | None, value: Any) -> Any:
    if isinstance(value, (list, tuple, dict)):
        weigh(value)
    return value


@pass_context  # so that it is never evaluated while compiling
def _turns(_context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend()
        yield item


def _concat(pieces: Iterable[Any]) -> str:
    _spend()
    texts = [str(_printable(piece)) for piece in pieces]
    if sum(map(len, texts)) > MAX_OUTPUT:
        raise SecurityError("a text is too long")
    return "".join(texts)


def _concat_markup(template: Any) -> Callable[[Iterable[Any]], str]:
    join = template.root_render_func.__globals__["markup_join"]

    def concat(pieces: Iterable[Any]) -> str:
        pieces = [_printable(piece) for piece in pieces]
        _concat(pieces)
        return _fits(join(pieces))  # type: ignore[no-any-return]  # Jinja's own function

    return concat


def _joinable(separator: str, items: Iterable[Any]) -> list[str]:
    texts = [str(_printable(item)) for item in items]
    if sum(map(len, texts)) + len(separator) * len(texts) > MAX_OUTPUT:
        raise SecurityError("a text is too long")
    return texts


@pass_environment
def _join(environment: Environment, items: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
    _spend()
    if attribute is not None:
        items = map(make_attrgetter(environment, attribute), items)
    return str(separator).join(_joinable(str(separator), items))


def _check_replace(text: str, old: object, new: object) -> None:
    if len(text) + text.count(str(old)) * len(str(new)) > MAX_OUTPUT:
        raise SecurityError("a text is too long")


def _replace(text: Any, old: str, new: str, count: int = -1) -> str:
    weigh((text, old, new), printable=True)
    _check_replace(str(text), old, new)
    return str(text).replace(str(old), str(new), count)


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    """As Jinja's, for widths in spaces."""
    _spend()
    if not 0 <= width <= _MAX_INDENT:
        raise SecurityError("indent is from 0 to 64")
    pad = " " * width
    lines = str(text).splitlines(keepends=True)
    if len(text) + width * len(lines) > MAX_OUTPUT:
        raise SecurityError("a text is too long")
    return "".join((pad if (index or first) and (blank or line.strip()) else "") + line for index, line in enumerate(lines))


def _refuse_format(*_args: Any, **_kwargs: Any) -> None:
    raise SecurityError("a template may not format strings; use ~")
