"""Templates that want out, or want to hurt; ``python -m tests.text.attacks FILE`` runs them all within hard limits of the system.

Each must be refused or render harmlessly. What must not be seen in any output is in `LEAKS`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

from streamkv.errors import InvalidRequestError, ModelLoadError
from streamkv.text import sandbox
from streamkv.text.template import ChatTemplate

CANARY = "canary-5d1c"  # in the environment and in this module
LEAKS = (CANARY, "<class", "<function", "<bound", "<built-in", "<module", " at 0x", "uid=", "root:", "jinja2.", "executed")

MEMORY_BYTES, CPU_S = 1 << 30, 240

WALK = [
    "''.__class__",
    "''.__class__.__mro__",
    "''.__class__.__mro__[1].__subclasses__()",
    "''['__class__']",
    "()|attr('__class__')",
    "''|attr('__cla' ~ 'ss__')",
    "''|attr('\\x5f\\x5fclass\\x5f\\x5f')",
    "[''.__class__][0]",
    "{}.__class__.__bases__[0]",
    "(1).__class__",
    "1.0.__class__",
    "true.__class__",
    "none.__class__",
    "[]['__class__']",
    "messages.__class__",
    "self.__dict__",
    "self._TemplateReference__context",
    "self.__init__.__globals__",
    "messages.__init__.__globals__",
    "range.__globals__",
    "dict.__mro__",
    "dict.mro()",
    "dict.__base__.__subclasses__()",
    "namespace.__init__.__globals__",
    "namespace().__class__",
    "lipsum.__globals__",
    "lipsum.__globals__['os'].popen('echo exe''cuted').read()",
    "cycler.__init__.__globals__.os.environ",
    "joiner.__init__.__globals__",
    "raise_exception.__globals__",
    "raise_exception.__closure__",
    "strftime_now.__globals__",
    "strftime_now.__code__.co_consts",
    "strftime_now.__closure__[0].cell_contents",
    "undefined_name.__class__",
    "undefined_name.__init__.__globals__",
    "messages[0].get.__self__",
    "messages.append.__self__.__class__",
    "range(3).__class__",
    "(messages|map('upper')).gi_frame",
    "(messages|map('upper')).gi_code",
    "['']|map(attribute='__class__')|list",
    "['']|map('attr', '__class__')|list",
    "['']|groupby('__class__')",
    "['']|selectattr('__class__')|list",
    "['']|sort(attribute='__class__')",
    "['']|unique(attribute='__class__')|list",
    "['']|max(attribute='__class__')",
    "['']|sum(attribute='__class__')",
    "['']|join(attribute='__class__')",
    "[{}]|join(attribute='items')",
    "[{'a': ''}]|map(attribute='a.__class__')|list",
    "''|map(attribute='__len__')|list",
    "messages|tojson|attr('__class__')",
    "''.join.__self__.__class__",
    "''.format.__self__",
    "().__doc__",
    "''.__doc__",
]

PRINTED = [
    "range",
    "dict",
    "namespace",
    "namespace()",
    "raise_exception",
    "strftime_now",
    "messages.append",
    "''.join",
    "{}.items",
    "messages|map('upper')",
    "[range]",
    "{'a': range}",
    "range ~ ''",
    "[range]|string",
    "[range]|join",
    "range|string",
    "self",
    "dict|string",
    "range|e",
    "range|upper",
    "(messages|map('upper'))|string",
    "[messages|map('upper')]|string",
    "range|replace('x', 'y')",
    "range|indent",
    "range|trim",
    "range|urlencode",
    "range|tojson",
    "range|default('x')",
    "x|default(range)",
    "range|items",
    "''.upper|tojson",
    "range|list ~ dict",
    "''.format",
    "[dict]|first",
    "loop",
    "caller",
    "environ",
    "context",
    "environment",
    "config",
    "request",
    "url_for",
    "get_flashed_messages",
    "app",
    "settings",
    "g",
    "__import__('os')",
    "open('/etc/passwd').read()",
    "eval('1')",
    "exec('1')",
    "globals()",
    "locals()",
    "vars()",
    "dir()",
    "type('')",
    "getattr('', 'x')",
    "print('exe' ~ 'cuted')",
    "import('os')",
    "os.environ",
    "builtins",
    "__builtins__",
    "_budget",
    "environment.finalize",
]

FORMAT = [
    "'{0.__class__}'.format(1)",
    "'{0.__class__.__mro__[1]}'.format('')",
    "'{a.__init__}'.format(a=messages)",
    "'%s' % dict",
    "'%(a)s' % {'a': range}",
    "'%s'|format(range)",
    "'{0.__class__}'.format_map({'0': 1})",
    "'%1000000000s' % 'x'",
    "'{:>1000000000}'.format('x')",
    "'{0:{1}}'.format('x', 10**9)",
    "'%*s' % (1000000000, 'x')",
    "'%1000000000d'|format(1)",
    "''.format.__func__",
    "('{0.__class__}'|e).format(1)",
    "('%1000000000s'|e) % 'x'",
    "(''|e).__class__",
    "(''|safe).__html__.__self__",
]

GROWTH = [
    "'x' * 10**10",
    "10**10 * 'x'",
    "['x'] * 10**10",
    "('x',) * 10**10",
    "'x' * 1000000000",
    "[1, 2] * 900000000",
    "10**10**10",
    "9**9**9",
    "(2**255)**99",
    "1000000000 * [messages]",
    "'x'.ljust(10**9)",
    "'x'.rjust(1000000000)",
    "'x'.center(10**9)",
    "'1'.zfill(1000000000)",
    "'\t'.expandtabs(10**9)",
    "'x'|center(1000000000)",
    "'x'|indent(1000000000)",
    "'x\n'|indent('x' * 10**9)",
    "'x x'|wordwrap(1, wrapstring='y' * 10**9)",
    "[1]|batch(1000000000, 'x')|list",
    "[1]|slice(1000000000)|list",
    "(1).to_bytes(1000000000, 'big')",
    "'x'.encode().ljust(10**9)",
    "messages|tojson(indent=1000000000)",
    "{}|xmlattr",
    "range(10**9)|list",
    "range(99999)|list|string * 99999",
    "('x' * 10**6).replace('', 'x' * 10**6)|length",
    "('x' * 10**6)|replace('x', 'x' * 10**6)|length",
    "('x' * 10**6).join(range(99999)|map('string'))|length",
    "range(99999)|join('x' * 10**6)|length",
    "lipsum(n=100000)",
    "'x'|urlize",
    "strftime_now('%1000000000d')",
    "strftime_now('%Y' * 10**7)|length",
    "raise_exception('x' * 10**10)",
    "'x'.translate({120: 'y' * 10**9})",
    "range(99999)|sum(start=[])",
    "dict.fromkeys(range(99999), 'x' * 10**6)|string|length",
    "namespace(x='x' * 10**10)",
    "(range(99999)|list + range(99999)|list) * 99",
    "'x'|filesizeformat",
    "1|round(10**9)",
    "1.5|round(400, 'ceil')",
    "'x'|pprint",
    "'x' ~ ('y' * 10**10)",
    "['x' * 10**6] * 10**6",
    "[range(99999)|list] * 99999",
]

NESTED = "{% set x = ['lol'] %}{% set y = ['lol'] %}" + "{% set x = [x, x] %}{% set y = [y, y] %}" * 50

BLOCKS = {
    "nested loops with output": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "nested loops in silence": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that filter": "{% for a in range(99999) %}{% for b in range(99999) if false %}x{% endfor %}{% endfor %}",
    "nested loops that continue": "{% for a in range(99999) %}{% for b in range(99999) %}{% continue %}{% endfor %}{% endfor %}",
    "loop over the loop": "{% for a in range(99999) %}{% for b in range(99999) %}{{ loop.length }}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "endless recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "branching recursive loop": "{% for a in [1, 2] recursive %}"
    "{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "endless call block": "{% macro m() %}{{ caller() }}{% endmacro %}"
    "{% macro k() %}{% call m() %}{{ k() }}{% endcall %}{% endmacro %}{{ k() }}",
    "doubling with ~": "{% set x = 'xxxxxxxx' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    "doubling with +": "{% set x = 'xxxxxxxx' %}" + "{% set x = x + x %}" * 40 + "{{ x }}",
    "doubling lists": "{% set x = [1] %}" + "{% set x = x + x %}" * 40 + "{{ x }}",
    "doubling numbers": "{% set x = 9 %}" + "{% set x = x * x %}" * 60 + "{{ x }}",
    "doubling in a namespace": "{% set n = namespace(x='x') %}"
    "{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling in a block": "{% set x %}xxxx{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40 + "{{ x }}",
    "doubling in macros": "{% macro a0() %}x{% endmacro %}"
    + "".join(f"{{% macro a{i + 1}() %}}{{{{ a{i}() }}}}{{{{ a{i}() }}}}{{% endmacro %}}" for i in range(50))
    + "{{ a50() }}",
    "doubling with escapes": "{% set x = '&' * 10**6 %}" + "{% set x = x|e %}" * 40 + "{{ x|length }}",
    "doubling markup": "{% autoescape true %}{% set x = '&'|e %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}{% endautoescape %}",
    "one long concatenation": "{% set x = 'x' * 10**6 %}{% set y = " + " ~ ".join(["x"] * 20000) + " %}{{ y|length }}",
    "billion laughs, printed": "{% set x = ['lol'] %}" + "{% set x = [x, x] %}" * 50 + "{{ x }}",
    "billion laughs, as JSON": "{% set x = ['lol'] %}" + "{% set x = {'a': x, 'b': x} %}" * 50 + "{{ x|tojson }}",
    "billion laughs, joined": "{% set x = ['lol'] %}" + "{% set x = [x, x] %}" * 50 + "{{ [x]|join }}",
    "billion laughs, as text": "{% set x = ['lol'] %}"
    + "{% set x = (x, x) %}" * 50
    + "{{ (x ~ '')|length }}{{ x|string|length }}",
    "billion laughs, refused": "{% set x = ['lol'] %}" + "{% set x = [x, x] %}" * 50 + "{{ raise_exception(x) }}",
    "comparing what is nested": NESTED + "{{ x == y }}",
    "comparing tuples": NESTED.replace("[", "(").replace("]", ",)") + "{{ x == y }}",
    "comparing inside a list": NESTED + "{{ x in [y] }}{{ [y].index(x) }}{{ [y].count(x) }}",
    "comparing with a test": NESTED + "{{ x is eq(y) }}{{ [x]|selectattr(0, 'eq', y)|list|length }}",
    "comparing to sort": NESTED + "{{ [x, y]|sort|length }}{{ [x, y]|unique|list|length }}{{ ([x, y]|max)|length }}",
    "comparing in a condition": NESTED + "{% if x != y %}a{% elif x < y %}b{% else %}c{% endif %}{{ 'd' if x >= y }}",
    "comparing in a loop": NESTED + "{% for z in [x] if z == y %}a{% endfor %}{{ loop }}",
    "hashing what is nested": NESTED.replace("[", "(").replace("]", ",)") + "{{ {x: 1}|length }}{{ {'a': 1}[x] }}{{ x in {} }}",
    "hashing through calls": NESTED.replace("[", "(").replace("]", ",)") + "{{ {'a': 1}.get(x) }}{{ dict([(x, 1)])|length }}",
    "slow calls in a loop": "{% set x = 'ab' * 10**6 %}{% for i in range(99999) %}{% set y = x.replace('a', 'b') %}{% endfor %}",
    "slow filters in a row": "{% set x = 'ab' * 10**6 %}" + "{% set y = x|replace('a', 'bb')|upper|e %}" * 5000,
    "import": "{% import 'os' as os %}{{ os }}",
    "from import": "{% from 'os' import environ %}{{ environ }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "do": "{% do messages.append(1) %}",
    "change the messages": "{% set _ = messages.append('x') %}{% set _ = messages[0].update({'role': 'system'}) %}",
    "change a name": "{% set messages = 5 %}{% set raise_exception = 6 %}{{ messages }}",
    "set a class": "{% set n = namespace() %}{% set n.__class__ = 5 %}{{ n.x }}",
    "read the namespace": "{% set n = namespace(a=1) %}{{ n._Namespace__attrs }}{{ n.__dict__ }}",
    "read a macro": "{% macro m() %}{% endmacro %}{{ m._environment }}{{ m._func.__globals__ }}",
    "read the loop": "{% for m in messages %}{{ loop._iterable }}{{ loop.__class__ }}{{ loop.changed.__func__ }}{% endfor %}",
    "read the caller": "{% macro m() %}{{ caller.__init__.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "read a block": "{% block b %}{{ self.b.__self__ }}{{ super.__class__ }}{% endblock %}",
    "keyword tricks": "{{ dict(**{'__class__': 1}).__class__.__mro__ }}",
    "filter block": "{% filter attr('__class__') %}x{% endfilter %}",
    "with": "{% with x = ''.__class__ %}{{ x }}{% endwith %}",
    "the guard by its name": "{{ messages|streamkv_turns }}{{ messages|streamkv_turns|attr('gi_frame') }}",
    "line statements": "# for x in range(3)\n%% ''.__class__\n",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "deep blocks": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "broken": "{{ ''.__class__",
    "unknown tag": "{% python %}print('exe' ~ 'cuted'){% endpython %}",
}


def corpus() -> dict[str, str]:
    """Name -> template."""
    return {expression: "{{ " + expression + " }}" for expression in [*WALK, *PRINTED, *FORMAT, *GROWTH]} | BLOCKS


def attempt(source: str) -> tuple[str, str]:
    """(what happened, what was written)."""
    messages = [{"role": "user", "content": "hello"}]
    try:
        text = ChatTemplate(source).render(messages)
    except (InvalidRequestError, ModelLoadError) as error:
        if isinstance(error.__cause__, MemoryError):
            return "out of memory", "only the system's limit has stopped it"
        return "not loaded" if isinstance(error, ModelLoadError) else "refused", str(error)
    if messages != [{"role": "user", "content": "hello"}]:
        return "changed the messages", text
    return "rendered", text


def main() -> None:
    """One JSON line per attack, written as it ends: [name, what happened, text, seconds]."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    os.environ["STREAMKV_CANARY"] = CANARY
    sandbox._MAX_SECONDS = 1.0  # that there is a limit can be seen sooner
    attempt("warm up")
    with Path(sys.argv[1]).open("w") as results:
        for name, source in corpus().items():
            started = time.process_time()
            try:
                outcome, text = attempt(source)
            except BaseException as error:  # anything that gets out is a finding
                outcome, text = type(error).__name__, str(error)
            results.write(json.dumps([name, outcome, text[:100_000], time.process_time() - started]) + "\n")
            results.flush()


if __name__ == "__main__":
    main()
