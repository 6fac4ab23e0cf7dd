"""`streamkv chat` in a terminal, against a real server whose engine generates only as much as the test allows."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from streamkv.cli.chat import _Interrupts
from tests.server.serving import Serving, eventually, serving
from tests.server.terminal import CTRL_C, CTRL_D, terminal


def prompts(served: Serving) -> list[str]:
    return [served.tokenizer.decode(request.prompt, skip_special_tokens=False) for request in served.engine.requests]


async def run(*arguments: str, stdin: int | Path = asyncio.subprocess.DEVNULL, text: bytes | None = None) -> tuple[int, str, str]:
    """`streamkv chat` without a terminal: exit status, output, errors."""
    source = stdin.open("rb") if isinstance(stdin, Path) else stdin
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "streamkv",
            "chat",
            *arguments,
            stdin=source,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate(text)
    finally:
        if not isinstance(source, int):
            source.close()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def test_it_answers_and_remembers_until_ctrl_d():
    async with serving() as served, terminal("chat", "--url", served.url, "--max-tokens", "21", "--temperature", "0") as chat:
        assert "fake at" in await chat.expect("> ")
        chat.type("hi\n")
        assert (await chat.expect(" [cut at the length limit]")).splitlines()[-1] == "hihihihi"
        await chat.expect("> ")
        chat.type("you\n")
        await chat.expect("[cut at the length limit]")
        await chat.expect("> ")
        first, second = prompts(served)
        assert first == "<|user|>hi<|end|><|assistant|>"
        assert second == "<|user|>hi<|end|><|user|>hihihihi<|end|><|user|>you<|end|><|assistant|>", "not the whole conversation"
        chat.type(CTRL_D)
        assert await chat.exit_status() == 0


async def test_ctrl_c_ends_the_answer_and_not_the_program():
    async with serving() as served, terminal("chat", "--url", served.url, "--max-tokens", "60") as chat:
        await chat.expect("> ")
        served.engine.hold = 9
        chat.type("hello\n")
        await chat.expect("hello\r\n")
        await chat.expect("hello")
        chat.type(CTRL_C)
        await chat.expect("[stopped]")
        await chat.expect("> ")
        await eventually(lambda: not served.engine.live)
        served.engine.hold = None
        chat.type("again\n")
        await chat.expect("[cut at the length limit]")
        await chat.expect("> ")
        assert "<|user|>again<|end|>" in prompts(served)[1]
        chat.type(CTRL_C)
        assert await chat.exit_status() == 0


async def test_ctrl_c_between_an_answer_and_the_prompt_is_told_to_who_listens_next():
    """It ended the program with a traceback, when nobody listened."""
    interrupts, told = _Interrupts(), []
    try:
        os.kill(os.getpid(), signal.SIGINT)
        await eventually(lambda: interrupts._pressed)
        for name in ("prompt", "answer"):
            with interrupts.heard_by(lambda name=name: told.append(name)):
                pass
        assert told == ["prompt"]
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)


async def test_a_refused_message_is_explained_and_forgotten():
    async with serving() as served, terminal("chat", "--url", served.url, "--max-tokens", "5") as chat:
        await chat.expect("> ")
        chat.type("x" * 250 + "\n")
        await chat.expect("[context_length_exceeded]")
        await chat.expect("> ")
        chat.type("hi\n")
        await chat.expect("[cut at the length limit]")
        assert prompts(served) == ["<|user|>hi<|end|><|assistant|>"]


async def test_a_server_that_goes_away_ends_the_program_in_one_sentence():
    async with serving() as served, terminal("chat", "--url", served.url) as chat:
        await chat.expect("> ")
        served.engine.hold = 3
        chat.type("hi\n")
        await eventually(lambda: bool(served.engine.live))
        (connection,) = served.server.stream_door.connections
        connection.abort("test")
        await chat.expect("streamkv: the server closed the connection")
        assert await chat.exit_status() == 1
        assert "Traceback" not in chat.seen


async def test_once_prints_the_answer_and_leaves():
    async with serving() as served:
        status, output, errors = await run("--url", served.url, "--once", "hi", "--max-tokens", "9", "--system", "be brief")
        assert (status, errors) == (0, "")
        assert output == "be brief [cut at the length limit]\n"
        assert prompts(served) == ["<|user|>be brief<|end|><|user|>hi<|end|><|assistant|>"]


async def test_once_says_why_it_was_refused():
    async with serving() as served:
        status, output, errors = await run("--url", served.url, "--once", "hi", "--temperature", "1000")
        assert (status, output) == (1, "")
        assert errors.startswith("[invalid_request] temperature")


async def test_no_server_is_one_sentence():
    status, output, errors = await run("--url", "ws://127.0.0.1:9/v1/stream", "--once", "hi")
    assert (status, output) == (1, "")
    assert errors.startswith("streamkv: no server at ws://127.0.0.1:9/v1/stream")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("source", ["pipe", "file"])
async def test_lines_of_a_pipe_or_a_file_are_all_answered(source: str, tmp_path: Path):
    lines = b"eins\nzwei\n\ndrei"
    async with serving() as served:
        options = ["--url", served.url, "--max-tokens", "2"]
        if source == "pipe":
            status, _, errors = await run(*options, stdin=asyncio.subprocess.PIPE, text=lines)
        else:
            (tmp_path / "lines").write_bytes(lines)
            status, _, errors = await run(*options, stdin=tmp_path / "lines")
        assert (status, errors) == (0, "")
        assert [prompt.rpartition("<|user|>")[2] for prompt in prompts(served)] == [
            f"{word}<|end|><|assistant|>" for word in ("eins", "zwei", "drei")
        ]
