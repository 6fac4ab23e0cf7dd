"""`streamkv generate FILE.jsonl`: complete a file of prompts offline, one JSON object a line.

in    {"prompt": "Once upon a time", "max_tokens": 64}
      {"id": "q7", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
      {"id": "ids", "prompt": [5, 17, 9], "logprobs": 2, "prompt_logprobs": 0}
out   {"id": "q7", "text": "Hi!", "num_tokens": 3, "finish_reason": "stop", "usage": {"prompt": 9, "completion": 3, "cached": 0}}

Results are written as they finish. Run again with the same OUT, it goes on: what has its line is not generated again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, Final

from tqdm import tqdm

from streamkv.cli.engine_options import add_engine_arguments, engine_config
from streamkv.errors import ConfigError, InvalidRequestError, StreamKVError
from streamkv.logs import configure_logs
from streamkv.outputs import CompletionOutput
from streamkv.sampling_params import SamplingParams, TokenLogprobs

__all__ = ["add_arguments", "run"]

_MAX_REPORTED: Final = 20
_SAMPLING: Final = tuple(field.name for field in fields(SamplingParams))
_FIELDS: Final = ("id", "prompt", "messages", "tools", *_SAMPLING)
_START: Final = b'{"id": '
"""How every result begins."""

Key = str | int
"""What names a line in both files."""


@dataclass(frozen=True, slots=True)
class _Line:
    """One request of the file; everything that needs no model is checked."""

    number: int
    id: Key
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    params: SamplingParams


class _Failures:
    """Collects what is wrong, by line, and says it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.count = 0

    def add(self, number: int, message: str) -> None:
        """Report one line; only the first few are printed."""
        self.count += 1
        if self.count <= _MAX_REPORTED:
            tqdm.write(f"streamkv: {self._file} line {number}: {message}", file=sys.stderr)

    def close(self) -> None:
        """Say how many more there are."""
        if self.count > _MAX_REPORTED:
            print(f"streamkv: and {self.count - _MAX_REPORTED} more lines", file=sys.stderr)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("file", type=Path, metavar="FILE.jsonl", help="one JSON object a line, with prompt or messages")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="OUT.jsonl", help="results, continued if the file is there (default: stdout)"
    )
    parser.add_argument("--max-tokens", type=int, help="for lines without max_tokens (default: what fits)")
    parser.add_argument("--temperature", type=float, default=1.0, help="for lines without temperature (%(default)s)")
    parser.add_argument("--model", dest="model_folder", metavar="FOLDER", help="the same as MODEL")
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Generate; 0 if every line has its result, 1 if not."""
    configure_logs(level="warning")
    if arguments.model_folder is not None:
        if arguments.model is not None:
            raise ConfigError("give MODEL or --model, not both", param="model")
        arguments.model = arguments.model_folder
    config = engine_config(arguments)
    if arguments.output is not None and arguments.output.resolve() == arguments.file.resolve():
        raise ConfigError("OUT must be another file than FILE", param="output")
    failures = _Failures(arguments.file)
    defaults = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    SamplingParams(**defaults)  # a wrong option is no line's fault
    lines = list(_read(arguments.file, defaults, failures))
    done = _finished(arguments.output) if arguments.output is not None else set()
    if failures.count:
        failures.close()
        return 1
    todo = [line for line in lines if line.id not in done]
    if len(todo) < len(lines):
        print(f"{len(lines) - len(todo)} of {len(lines)} are done already", file=sys.stderr)
    if todo:
        output = arguments.output
        with nullcontext(sys.stdout) if output is None else _writable(output, "a", encoding="utf-8", newline="\n") as file:
            asyncio.run(_generate(config, todo, len(lines), failures, file))
    failures.close()
    return 1 if failures.count else 0


# -- files ------------------------------------------------------------------------------------------------------------


def _read(file: Path, defaults: Mapping[str, Any], failures: _Failures) -> Iterator[_Line]:
    """The lines that are right; the others are reported."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", param="file") from error
    numbers: dict[Key, int] = {}
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not raw.strip():
            continue
        try:
            line = _parsed(raw, number, defaults)
            _check_new(line, numbers)
        except InvalidRequestError as error:
            failures.add(number, error.message)
        else:
            numbers[line.id] = number
            yield line


def _parsed(raw: bytes, number: int, defaults: Mapping[str, Any]) -> _Line:
    try:
        entry = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("this is not JSON in UTF-8") from error
    if not isinstance(entry, dict):
        raise InvalidRequestError("write a JSON object with prompt or messages")
    unknown = next((name for name in entry if name not in _FIELDS), None)
    if unknown is not None:
        raise InvalidRequestError(f"unknown field {unknown!r}; known are {', '.join(_FIELDS)}", param=unknown)
    given = {name: value for name, value in entry.items() if value is not None}
    if ("prompt" in given) == ("messages" in given):
        raise InvalidRequestError("give prompt or messages, one of them", param="prompt")
    given["logit_bias"] = _bias(given.get("logit_bias", {}))
    params = SamplingParams(**{**defaults, **{name: given[name] for name in _SAMPLING if name in given}})
    key = given.get("id", f"line-{number}")
    if type(key) not in (str, int) or not str(key).isprintable():
        raise InvalidRequestError("id must be printable text or an integer", param="id")
    prompt, messages = given.get("prompt"), given.get("messages")
    if messages is None:
        _check_prompt(prompt)
    else:
        _check_messages(messages)
    tools = given.get("tools")
    if tools is not None and messages is None:
        raise InvalidRequestError("tools go with messages", param="tools")
    return _Line(number, key, prompt, messages, tools, params)


def _bias(given: object) -> object:
    """JSON has only text for keys; what is no number stays for the check of the parameters."""
    if not isinstance(given, dict):
        return given
    return {int(name) if name.isascii() and name.isdigit() else name: value for name, value in given.items()}


def _check_new(line: _Line, numbers: Mapping[Key, int]) -> None:
    if line.id in numbers:
        raise InvalidRequestError(f"id {line.id!r} is that of line {numbers[line.id]} already", param="id")


def _check_prompt(prompt: object) -> None:
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
        return
    raise InvalidRequestError("prompt must be text or a list of token ids", param="prompt")


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError("messages must be a list with at least one message", param="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"messages[{index}] must be an object with role and content", param="messages")


def _finished(output: Path) -> set[Key]:
    """Ids of the results in OUT. A last line that was torn by a crash is cut off; a file of something else is left alone."""
    try:
        content = output.read_bytes() if output.exists() else b""
    except OSError as error:
        raise ConfigError(f"{output} cannot be read: {error.strerror}", param="output") from error
    whole = content.rfind(b"\n") + 1
    torn = content[whole:]
    done: set[Key] = set()
    for number, raw in enumerate(content[:whole].splitlines(), 1):
        try:
            result = json.loads(raw)
            done.add(result["usage"] and result["id"])
        except (ValueError, TypeError, KeyError) as error:
            raise _foreign(output, number) from error
    if not torn.startswith(_START[: len(torn)]):
        raise _foreign(output, content.count(b"\n") + 1)
    if torn:
        with _writable(output, "r+b") as file:
            file.truncate(whole)
    return done


def _foreign(output: Path, number: int) -> ConfigError:
    return ConfigError(f"{output} line {number} is no result of `streamkv generate`; choose another OUT", param="output")


def _writable(output: Path, mode: str, **options: Any) -> IO[Any]:
    try:
        return output.open(mode, **options)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}", param="output") from error


# -- generating -------------------------------------------------------------------------------------------------------


async def _generate(config: Any, todo: Sequence[_Line], total: int, failures: _Failures, output: IO[str]) -> None:
    """Check every line against the model, then generate all, a bounded number at a time."""
    from streamkv.runner.imports import import_transformers

    import_transformers()
    from streamkv.async_engine import Engine

    async with Engine(config) as engine:
        for line in todo:
            try:
                prompt = line.messages if line.messages is not None else line.prompt
                assert prompt is not None
                await engine.streams.prepare(prompt, line.params, is_chat=line.messages is not None, tools=line.tools)
            except InvalidRequestError as error:
                failures.add(line.number, error.message)
        if failures.count:
            return
        waiting = iter(todo)
        with tqdm(total=total, initial=total - len(todo), desc="generating", unit="prompt", disable=None) as bar:

            async def work() -> None:
                for line in waiting:  # shared by all workers: each takes the next one
                    try:
                        result = await _result(engine, line)
                    except StreamKVError as error:
                        failures.add(line.number, error.message)
                    else:
                        output.write(json.dumps(result, ensure_ascii=False) + "\n")
                        output.flush()
                    bar.update()

            broken: OSError | None = None
            try:
                async with asyncio.TaskGroup() as group:
                    # Twice as many as fit a step: whoever finishes finds the next one tokenised and queued.
                    for _ in range(min(len(todo), 2 * config.max_num_seqs)):
                        group.create_task(work())
            except* OSError as errors:
                broken = next(error for error in errors.exceptions if isinstance(error, OSError))
            if broken is not None:
                raise ConfigError(f"results cannot be written: {broken.strerror}", param="output") from broken


async def _result(engine: Any, line: _Line) -> dict[str, Any]:
    """Generate one line; the object that is written."""
    if line.messages is not None:
        outputs = engine.chat(line.messages, line.params, tools=line.tools)
    else:
        outputs = engine.generate(line.prompt, line.params)
    async for output in outputs:
        final = output
    samples = [_sample(sample) for sample in final.outputs]
    usage = {
        "prompt": len(final.prompt_token_ids),
        "completion": sum(len(sample.token_ids) for sample in final.outputs),
        "cached": final.num_cached_tokens,
    }
    own = samples[0] if line.params.n == 1 else {"samples": samples}
    scored = {} if final.prompt_logprobs is None else {"prompt_logprobs": _logprobs(final.prompt_logprobs)}
    return {"id": line.id, **own, **scored, "usage": usage}


def _sample(sample: CompletionOutput) -> dict[str, Any]:
    plain = {"text": sample.text, "num_tokens": len(sample.token_ids), "finish_reason": sample.finish_reason}
    return plain if sample.logprobs is None else plain | {"logprobs": _logprobs(sample.logprobs)}


def _logprobs(entries: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    return [None if entry is None else {"chosen": entry.chosen, "rank": entry.rank, "top": entry.top} for entry in entries]
