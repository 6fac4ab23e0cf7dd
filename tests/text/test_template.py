"""Chat templates: they write what Jinja writes, and those that want out or want to hurt get nowhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamkv.errors import InvalidRequestError, ModelLoadError
from streamkv.text.sandbox import MAX_OUTPUT
from streamkv.text.template import ChatTemplate
from tests.text.attacks import CPU_S, LEAKS, corpus
from tests.text.chat_templates import ORDINARY
from tests.text.kinds import CHATML

ROOT = Path(__file__).resolve().parents[2]

TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hi <b>&</b>\n\n  there"},
    {"role": "assistant", "content": "<think>hm</think>Hello"},
    {"role": "user", "content": 'Say "日本"'},
]


@pytest.fixture
def plain() -> ImmutableSandboxedEnvironment:
    """Jinja's own sandbox as transformers sets it up."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])


@pytest.mark.smoke
@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("add", [True, False])
def test_ordinary_templates_write_what_jinja_writes(name: str, add: bool, plain: ImmutableSandboxedEnvironment) -> None:
    names: dict[str, Any] = {"add_generation_prompt": add, "bos_token": "<s>"}
    expected = plain.from_string(ORDINARY[name]).render(messages=TALK, **names)
    written = ChatTemplate(ORDINARY[name]).render(TALK, add_generation_prompt=add, special_tokens={"bos_token": "<s>"})
    assert written == expected
    assert written


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("messages[1]|tojson", '{"role": "user", "content": "Hi <b>&</b>\\n\\n  there"}'),
        ("messages[3].content|tojson", '"Say \\"日本\\""'),
        ("{'b': 1, 'a': [1]}|tojson(sort_keys=true, separators=(',', ':'))", '{"a":[1],"b":1}'),
        ("'é'|tojson(ensure_ascii=true)", '"\\u00e9"'),
        ("{'a': 1}|tojson(indent=2)", '{\n  "a": 1\n}'),
        ("strftime_now('%d %b %Y')", "02 Jan 2026"),
    ],
)
def test_what_transformers_adds(call: str, expected: str) -> None:
    template = ChatTemplate("{{ " + call + " }}", now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert template.render(TALK) == expected


def test_a_template_can_refuse_messages_in_its_own_words() -> None:
    template = ChatTemplate("{% if messages[0].role != 'user' %}{{ raise_exception('start with user') }}{% endif %}ok")
    assert template.render(TALK[1:]) == "ok"
    with pytest.raises(InvalidRequestError, match="start with user") as caught:
        template.render(TALK)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source", ["{{ messages[9].role.x }}", "{{ 1 / 0 }}", "{{ missing.x }}", "{{ 5.upper() }}", "{{ none() }}"]
)
def test_a_template_that_fails_is_this_requests_problem(source: str) -> None:
    with pytest.raises((InvalidRequestError, ModelLoadError)):
        ChatTemplate(source).render(TALK)


def test_long_conversations_are_written_and_too_long_ones_refused() -> None:
    template = ChatTemplate(CHATML)
    many = [{"role": "user", "content": "x" * 100}] * 5000
    assert len(template.render(many)) > 500_000
    with pytest.raises(InvalidRequestError):
        template.render([{"role": "user", "content": "x" * (MAX_OUTPUT // 2)}] * 3)
    assert template.render(TALK), "each rendering has a budget of its own"


def test_contents_are_data_and_never_a_template() -> None:
    messages = [{"role": "user", "content": "{{ 7 * 7 }}{% for x in y %}{{ ''.__class__ }}"}]
    assert messages[0]["content"] in ChatTemplate(CHATML).render(messages)


# -- attacks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[str, str]]:
    """What became of every attack, in a process that the system ends if it takes too much memory or time."""
    listing = tmp_path_factory.mktemp("attacks") / "outcomes.jsonl"
    command = [sys.executable, "-m", "tests.text.attacks", str(listing)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=2 * CPU_S)
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    assert rows, done.stderr
    return {name: (outcome, text) for name, outcome, text, _seconds in rows}


def test_there_are_many_attacks() -> None:
    assert len(corpus()) >= 200


@pytest.mark.parametrize("name", corpus())
def test_no_template_executes_reads_internals_hangs_or_fills_the_memory(
    outcomes: Mapping[str, tuple[str, str]], name: str
) -> None:
    assert name in outcomes, "this one, or the one before it, ended the process"
    outcome, text = outcomes[name]
    assert outcome in ("not loaded", "refused", "rendered")
    if outcome == "rendered":
        assert not [leak for leak in LEAKS if leak in text.lower()]
        assert len(text) < 1000, "nothing of size comes out"
