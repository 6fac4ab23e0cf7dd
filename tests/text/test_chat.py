"""Conversations with tools: written as transformers writes them, bounded, and never a way to place a control token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from streamkv.errors import ContextLengthError, InvalidRequestError
from streamkv.text.chat import checked_messages
from streamkv.text.template import ChatTemplate
from streamkv.text.tokenizer import TextTokenizer, load_tokenizer
from tests.text.folders import write
from tests.text.kinds import CHATML, KINDS, SPECIAL, raw
from tests.text.model_templates import SPECIAL_OF, TEMPLATES

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather "now"\nin a place',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Zürich", "日本"]}},
            "required": ["city"],
        },
    },
}
TIME = {
    "type": "function",
    "function": {"name": "get_time", "description": "", "parameters": {"type": "object", "properties": {}}},
}
ARGUMENTS = {"city": "Zürich", "days": [1, 2.5, None, True], "deep": {"a": {"b": "</x>"}}}


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


USER = {"role": "user", "content": " What is the weather?\n"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [call(json.dumps(ARGUMENTS))]}
RESULT = {"role": "tool", "content": '{"temperature": 21}', "tool_call_id": "call12345", "name": "get_weather"}
ANSWER = {"role": "assistant", "content": "It is 21 degrees."}
SYSTEM = {"role": "system", "content": "Be brief. "}

TALKS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, USER],
    "called": [USER, CALLED, RESULT],
    "called and answered": [SYSTEM, USER, CALLED, RESULT, ANSWER, USER],
    "thought": [USER, ANSWER | {"reasoning_content": "hm"}, USER],
    "developer": [{"role": "developer", "content": "x"}, USER],
    "assistant first": [ANSWER, USER],
}


@cache
def both(name: str) -> tuple[TextTokenizer, Any]:
    """(ours, transformers') of one folder with the template."""
    tokenizer = Tokenizer.from_str(raw("byte_level").to_str())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_OF[name]])
    names = {"bos_token": SPECIAL_OF[name][0], "eos_token": SPECIAL_OF[name][1]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATES[name]} | names
    with TemporaryDirectory() as folder:
        write(Path(folder), "llama", config, {"tokenizer.json": tokenizer.to_str()})
        return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def reference(name: str, talk: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None, add: bool) -> list[int] | None:
    """What transformers makes of it; None = the template refuses. The arguments are in the form that the template wants."""
    theirs = both(name)[1]
    form = json.dumps if name == "deepseek" else (lambda arguments, **_: arguments)
    talk = json.loads(json.dumps(talk))
    for message in talk:
        for each in message.get("tool_calls", ()):
            each["function"]["arguments"] = form(json.loads(each["function"]["arguments"]), ensure_ascii=False)
    try:
        ids = theirs.apply_chat_template(talk, tools=tools, add_generation_prompt=add, tokenize=True, return_dict=False)
    except Exception:  # jinja2's TemplateError, and TypeError where the template adds None
        return None
    return list(ids)


WITH_TOOLS = {"qwen 2.5", "llama 3.1", "mistral"}
WITH_CALLS = WITH_TOOLS | {"deepseek"}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("tools", [None, [WEATHER, TIME]], ids=["", "tools"])
@pytest.mark.parametrize("add", [True, False])
def test_conversations_are_written_as_transformers_writes_them(name: str, talk: str, tools: Any, add: bool) -> None:
    ours, messages = both(name)[0], TALKS[talk]
    called = any("tool_calls" in message for message in messages)
    expected = reference(name, messages, tools, add)
    if expected is None or (tools and name not in WITH_TOOLS) or (called and name not in WITH_CALLS):
        with pytest.raises(InvalidRequestError):
            ours.encode_chat(messages, tools=tools, add_generation_prompt=add)
    else:
        assert ours.encode_chat(messages, tools=tools, add_generation_prompt=add) == expected


def test_refusals_say_why() -> None:
    for name, talk, tools, match, param in [
        ("gemma", [SYSTEM, USER], None, "System role not supported", "messages"),
        ("mistral", [ANSWER, USER], None, "must alternate", "messages"),
        ("gemma", [USER], [WEATHER], "no place for tools", "tools"),
        ("phi 3", [USER], [WEATHER], "no place for tools", "tools"),
        ("deepseek", [USER], [WEATHER], "no place for tools", "tools"),
        ("phi 3", [USER, CALLED, RESULT], None, "no place for tool_calls", "messages"),
    ]:
        with pytest.raises(InvalidRequestError, match=match) as caught:
            both(name)[0].encode_chat(talk, tools=tools)
        assert caught.value.param == param


def test_a_template_that_leaves_tools_out_of_one_conversation_is_noticed() -> None:
    source = "{% if messages|length == 1 and tools %}{{ tools|tojson }}{% endif %}{{ messages[-1].content }}"
    template = ChatTemplate(source)
    assert "get_time" in template.render([USER], tools=[TIME])
    with pytest.raises(InvalidRequestError, match="leaves these tools out"):
        template.render([USER, ANSWER, USER], tools=[TIME])


def test_templates_that_print_arguments_get_them_as_json() -> None:
    talk = checked_messages([USER, CALLED])
    shown = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    assert ChatTemplate(shown).render(talk) == json.dumps(ARGUMENTS, ensure_ascii=False)
    looped = shown.replace("{{ c.function.arguments }}", "{% for k, v in c.function.arguments|items %}<{{ k }}>{% endfor %}")
    assert ChatTemplate(looped).render(talk) == "<city><days><deep>"


# -- special tokens ---------------------------------------------------------------------------------------------------

ALL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
bits = st.lists(st.sampled_from([*SPECIAL, "hello", " ", "\n", "<|im_", "start|>", '"', "\\", "{", "🙂"]), max_size=5).map(
    "".join
)
values = st.recursive(
    st.one_of(bits, st.integers(), st.booleans(), st.none()),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(bits, inner, max_size=2),
    max_leaves=4,
)


def control(kind: str, tokens: Sequence[int]) -> list[str]:
    names = {raw(kind).token_to_id(name): name for name in ALL}
    return [names[token] for token in tokens if token in names]


@cache
def with_tools(kind: str) -> TextTokenizer:
    return TextTokenizer(raw(kind), template=ChatTemplate(TEMPLATES["qwen 2.5"]))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(text=bits, value=st.dictionaries(bits, values, max_size=2))
def test_nothing_in_tools_or_results_places_a_control_token(kind: str, text: str, value: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": value}}
    talk = [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "tool_calls": [call(json.dumps(value)) | {"id": text}]},
        {"role": "tool", "content": text, "tool_call_id": text, "name": text},
    ]
    tokens = with_tools(kind).encode_chat(talk, tools=[tool])
    assert control(kind, tokens) == ["<|im_start|>", "<|im_end|>"] * 4 + ["<|im_start|>"]


def test_what_is_typed_into_tools_reaches_the_model_as_typed() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "no <|im_end|> here"}}
    tokenizer = with_tools("byte_level")
    text = tokenizer.decode(tokenizer.encode_chat([USER], tools=[tool]), skip_special_tokens=False)
    assert '"description": "no <|im_end|> here"' in text


# -- bounds -----------------------------------------------------------------------------------------------------------

LONG = "9" * 10_000
deep: Any = {}
for _ in range(40):
    deep = {"x": deep}


def with_call(**changes: Any) -> list[Any]:
    return [USER, {"role": "assistant", "content": "", "tool_calls": [call({}) | changes]}]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([USER] * 5000, "messages"),
        ([{"role": "user", "content": None}], "messages[0]"),
        ([{"role": "user", "content": "x", "tool_calls": [call({})]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": None}], "messages[0]"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "messages[0]"),
        ([{"role": "assistant", "content": None, "tool_calls": "x"}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": None, "tool_calls": [call({})] * 200}], "messages[0].tool_calls"),
        ([{"role": "tool", "content": "x", "tool_call_id": 5}], "messages[0].tool_call_id"),
        ([{"role": "user", "content": "x", "name": ["x"]}], "messages[0].name"),
        ([{"role": "assistant", "content": "x", "reasoning_content": {}}], "messages[0].reasoning_content"),
        (with_call(id=7), "messages[1].tool_calls[0].id"),
        (with_call(type="code"), "messages[1].tool_calls[0]"),
        (with_call(x=7), "messages[1].tool_calls[0]"),
        (with_call(function="f"), "messages[1].tool_calls[0].function"),
        (with_call(function={"name": "f f"}), "messages[1].tool_calls[0].function.name"),
        (with_call(function={"name": "f", "parameters": {}}), "messages[1].tool_calls[0].function"),
        (with_call(function={"name": "f", "arguments": "["}), "messages[1].tool_calls[0].function.arguments"),
        (with_call(function={"name": "f", "arguments": "[1]"}), "messages[1].tool_calls[0].function.arguments"),
        (with_call(function={"name": "f", "arguments": '{"x": NaN}'}), "messages[1].tool_calls[0].function.arguments"),
        (with_call(function={"name": "f", "arguments": "[" * 100_000}), "messages[1].tool_calls[0].function.arguments"),
        (with_call(function={"name": "f", "arguments": f'{{"x": {LONG}}}'}), "messages[1].tool_calls[0].function.arguments"),
        (with_call(function={"name": "f", "arguments": deep}), "messages[1].tool_calls[0].function.arguments"),
        (with_call(function={"name": "f", "arguments": {"x": [0] * 200_000}}), "messages[1].tool_calls[0].function.arguments"),
        (with_call(function={"name": "f", "arguments": {"x": object()}}), "messages[1].tool_calls[0].function.arguments"),
        (with_call(function={"name": "f", "arguments": {5: 1}}), "messages[1].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_messages_out_of_bounds_are_refused_by_name(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        with_tools("byte_level").encode_chat(messages)
    assert caught.value.param == param


def with_function(**changes: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f"} | changes}]


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ("x", "tools"),
        ([TIME] * 200, "tools"),
        (["x"], "tools[0]"),
        ([TIME, {"type": "code", "function": {"name": "f"}}], "tools[1]"),
        ([{"type": "function"}], "tools[0].function"),
        ([TIME | {"x": 1}], "tools[0]"),
        (with_function(name="<s>"), "tools[0].function.name"),
        (with_function(name=None), "tools[0].function.name"),
        (with_function(name="x" * 65), "tools[0].function.name"),
        (with_function(description=5), "tools[0].function.description"),
        (with_function(parameters=[]), "tools[0].function.parameters"),
        (with_function(parameters=deep), "tools[0].function"),
        (with_function(code="x"), "tools[0].function"),
        (with_function(description="half \ud800"), "tools"),
    ],
)
def test_tools_out_of_bounds_are_refused_by_name(tools: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        with_tools("byte_level").encode_chat([USER], tools=tools)
    assert caught.value.param == param


def test_tools_count_towards_what_can_fit() -> None:
    tokenizer = TextTokenizer(raw("byte_level"), template=ChatTemplate(TEMPLATES["qwen 2.5"]), max_tokens=100)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x" * 500: "y" * 500}}}
    with pytest.raises(ContextLengthError) as caught:
        tokenizer.encode_chat([USER], tools=[tool])
    assert caught.value.param == "tools"


def test_no_tools_are_no_tools() -> None:
    said = [USER, ANSWER]
    assert (
        checked_messages([USER, ANSWER | {"tool_calls": []}]) == checked_messages([USER, ANSWER | {"tool_calls": None}]) == said
    )
    tokenizer = TextTokenizer(raw("byte_level"), template=ChatTemplate(CHATML))
    assert tokenizer.encode_chat([USER], tools=[]) == tokenizer.encode_chat([USER]) == tokenizer.encode_chat([USER], tools=None)
