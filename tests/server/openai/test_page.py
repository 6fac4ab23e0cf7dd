"""docs/openai.md: its tables are the code's, and its examples run as they stand; only the port is another one."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from streamkv.protocol.body_structs import REFUSED, ChatBody, CompletionBody
from streamkv.server import guard
from streamkv.server.openai.requests import ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from streamkv.server.openai.sse import HEARTBEAT_S
from tests.server.bad_values import encoded_fields
from tests.server.openai.dialect import door, door_of
from tests.server.serving import DEADLINE_S, Serving

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "openai.md").read_text()
STRUCTS = {"chat": ChatCompletionRequest, "completions": CompletionRequest, "embeddings": EmbeddingRequest}
BODIES = {"chat": ChatBody, "completions": CompletionBody}
ROWS = [
    (name, api.strip(), status)
    for name, apis, status in re.findall(r"^\| `(\w+)` \| ([a-z, ]+) \| (.+) \|$", PAGE, re.MULTILINE)
    for api in apis.split(",")
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_every_field_has_one_row_for_each_api() -> None:
    assert len(ROWS) == len({(name, api) for name, api, _ in ROWS})
    assert {(name, api) for name, api, _ in ROWS} == {
        (name, api) for api, struct in STRUCTS.items() for name in encoded_fields(struct)
    }


def test_what_is_said_to_be_refused_is_what_the_code_refuses() -> None:
    for name, api, status in ROWS:
        harmless = REFUSED[BODIES[api]].get(name) if api in BODIES else None
        assert status.startswith("served") == (harmless is None), (name, api)
        if harmless is not None:
            assert status.startswith("refused")
            excepted = [json.loads(value) for value in re.findall(r"`([^`]+)`", status) if value != "tools"]
            assert excepted == list(harmless), (name, api)


async def test_every_route_is_on_the_page() -> None:
    async with door() as served:
        routes = {f"`{route.method} {route.path.replace(':.+}', '}')}`" for route in door_of(served).routes()}
    assert set(re.findall(r"^\| (`(?:GET|POST) [^`]+`) \|", PAGE, re.MULTILINE)) == routes


def test_every_code_of_the_guard_is_on_the_page() -> None:
    source = Path(guard.__file__).read_text()
    codes = set(re.findall(r'code="([a-z_]+)"', source)) | {code for code, _ in guard._SENTENCES.values()}
    named = PAGE + (Path(__file__).resolve().parents[3] / "docs" / "protocol.md").read_text()
    assert {code for code in codes if f"`{code}`" not in named} == set()


def test_figures_on_the_page() -> None:
    assert f"for {HEARTBEAT_S:g} seconds, the comment" in PAGE


async def output_of(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    out, errors = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode == 0, errors.decode()
    return out.decode()


async def curl(served: Serving, line: str) -> str:
    """As the command would: by it if it is there, else what these few options mean."""
    words = [word.replace("http://127.0.0.1:8000", served.base) for word in shlex.split(line)]
    if shutil.which("curl"):
        return await output_of("curl", "-sS", *words[1:])
    url = next(word for word in words if word.startswith("http"))
    headers = dict(words[index + 1].split(": ") for index, word in enumerate(words) if word == "-H")
    data = next((words[index + 1] for index, word in enumerate(words) if word == "-d"), None)
    async with served.http.request("POST" if data else "GET", url, data=data, headers=headers) as response:
        return await response.text()


def test_commands_as_written() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]

    async def run() -> list[str]:
        async with door() as served:
            return [await curl(served, line) for line in lines]

    chat, streamed, models, tokens = asyncio.run(run())
    assert json.loads(chat)["choices"][0]["message"]["content"]
    assert streamed.endswith("data: [DONE]\n\n")
    assert '"choices":[],"usage":{"prompt_tokens":7' in streamed
    assert json.loads(models)["data"][0]["id"] == "fake"
    assert json.loads(tokens)["count"] == 7


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_programs_as_written(number: int) -> None:
    async def run() -> str:
        async with door() as served:
            program = blocks("python")[number].replace("http://127.0.0.1:8000", served.base)
            return await output_of(sys.executable, "-c", program)

    assert len(asyncio.run(run())) > 20
