"""`streamkv generate`: every line gets its result once, whatever happens on the way; bad lines are named before anything runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from streamkv.cli import main
from streamkv.text.tokenizer import load_tokenizer
from tests.runner.tiny import generate as reference

DEADLINE_S = 120.0
ENGINE = ["--num-blocks", "200", "--dtype", "float32"]

pytestmark = pytest.mark.usefixtures("no_log_setup")


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> dict[Any, dict[str, Any]]:
    """Results by id; each id only once."""
    results = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({result["id"] for result in results}) == len(results), "an id has two results"
    return {result["id"]: result for result in results}


def run(file: Path, out: Path, model: Path, *options: str) -> int:
    return main(["generate", str(file), "-o", str(out), "--model", str(model), *ENGINE, *options])


@pytest.mark.smoke
def test_every_kind_of_line_gets_its_result(tmp_path: Path, model: Path) -> None:
    ids = [5, 17, 200, 40]  # the last one ends a character: an unfinished one would come with the output
    file = write(
        tmp_path / "in.jsonl",
        {"id": "ids", "prompt": ids, "max_tokens": 6, "temperature": 0},
        "",
        {"prompt": "Once", "max_tokens": 4, "temperature": 0},
        {"id": 7, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "seed": 1},
        {"id": "three", "prompt": "ab", "n": 3, "max_tokens": 2, "seed": 2, "stop": None},
        {"id": "default", "prompt": "cd"},
        {"id": "scored", "prompt": ids, "max_tokens": 2, "temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
        {"id": "biased", "prompt": ids, "max_tokens": 2, "temperature": 0, "logit_bias": {"7": 100}},
    )
    assert run(file, tmp_path / "out.jsonl", model, "--max-tokens", "5", "--temperature", "0") == 0
    results = read(tmp_path / "out.jsonl")
    assert list(results["ids"]) == ["id", "text", "num_tokens", "finish_reason", "usage"]
    assert results["ids"]["text"] == load_tokenizer(model).decode(reference(model, ids, 6))
    assert results["ids"]["usage"] == {"prompt": 4, "completion": 6, "cached": 0}
    assert results["line-3"]["usage"]["prompt"] == len("Once")
    scored = results["scored"]
    assert [len(entry["top"]) for entry in scored["logprobs"]] == [2, 2]
    assert scored["prompt_logprobs"][0] is None
    assert [len(entry["top"]) for entry in scored["prompt_logprobs"][1:]] == [1, 1, 1]
    assert results["biased"]["text"] == load_tokenizer(model).decode([7, 7])
    assert results[7]["usage"]["prompt"] == len("user: Hi\n")
    assert [sample["num_tokens"] for sample in results["three"]["samples"]] == [2, 2, 2]
    assert results["default"]["num_tokens"] == 5
    assert all(result.get("finish_reason", "length") == "length" for result in results.values())


def test_results_on_stdout_are_all_that_is_there(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "in.jsonl", {"prompt": "a", "max_tokens": 1}, {"prompt": "b", "max_tokens": 1})
    command = [sys.executable, "-m", "streamkv", "generate", str(file), "--model", str(model), *ENGINE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert {json.loads(line)["id"] for line in done.stdout.splitlines()} == {"line-1", "line-2"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "this is not JSON"),
        ('{"prompt": "' + chr(0xDC80) + '"}', "this is not JSON in UTF-8"),
        ("[1]", "write a JSON object"),
        ({"prompt": "a", "max_token": 3}, "unknown field 'max_token'"),
        ({"prompt": "a", "logprobs": 21}, "logprobs must be an integer from 0 to 20"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias must be an integer"),
        ({"prompt": "a", "tools": []}, "tools go with messages"),
        ({"id": "x"}, "give prompt or messages"),
        ({"prompt": "a", "messages": []}, "give prompt or messages"),
        ({"prompt": 3}, "prompt must be text or a list of token ids"),
        ({"prompt": [1, True]}, "prompt must be text or a list of token ids"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [{"content": "a"}]}, "messages[0] must be an object with role and content"),
        ({"prompt": "a", "top_p": 2}, "top_p must be a number from 0 to 1"),
        ('{"prompt": "a", "temperature": NaN}', "temperature must be a number"),
        ({"prompt": "a", "id": 1.5}, "id must be"),
        ({"prompt": "a", "id": "\ud800"}, "id must be"),
        ({"prompt": "a", "id": "first"}, "id 'first' is that of line 1 already"),
    ],
)
def test_a_bad_line_is_named_before_a_model_is_loaded(
    line: dict[str, Any] | str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "in.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    file.write_bytes(b'{"id": "first", "prompt": "a"}\n' + text.encode(errors="surrogateescape") + b"\n")
    out = tmp_path / "out.jsonl"
    assert run(file, out, tmp_path / "there is no model") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith(f"streamkv: {file} line 2: {sentence}")
    assert not out.exists()


def test_what_only_the_model_can_tell_is_told_before_anything_is_generated(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": [300]}, {"prompt": "a", "max_tokens": 9999}, {"prompt": ""})
    assert run(file, tmp_path / "out.jsonl", model) == 1
    errors = capsys.readouterr().err
    assert [number for number in range(1, 5) if f"line {number}:" in errors] == [2, 3, 4]
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_a_request_that_cannot_be_served_leaves_the_others_alone_and_is_tried_again(tmp_path: Path, model: Path) -> None:
    file = write(
        tmp_path / "in.jsonl",
        {"id": "big", "prompt": [1] * 100, "max_tokens": 2},
        {"id": "small", "prompt": [1], "max_tokens": 2},
    )
    arguments = ["generate", str(file), "-o", str(tmp_path / "out.jsonl"), "--model", str(model), "--num-blocks"]
    assert main([*arguments, "3"]) == 1
    assert set(read(tmp_path / "out.jsonl")) == {"small"}
    assert main([*arguments, "20"]) == 0
    assert set(read(tmp_path / "out.jsonl")) == {"big", "small"}


def test_killed_and_run_again_every_line_has_exactly_the_result_of_an_undisturbed_run(tmp_path: Path, model: Path) -> None:
    count = 20  # all results fit one buffer of a file: what is there when the first line is seen has been flushed
    requests = [{"id": index, "prompt": [index, 3, index + 1], "max_tokens": 80, "temperature": 0} for index in range(count)]
    file = write(tmp_path / "in.jsonl", *requests)
    out = tmp_path / "out.jsonl"
    # One request at a time: when the first result is there, most of them are not.
    command = [sys.executable, "-m", "streamkv", "generate", str(file), "-o", str(out), "--model", str(model), *ENGINE]
    process = subprocess.Popen([*command, "--max-num-seqs", "1"], stderr=subprocess.DEVNULL)
    limit = time.monotonic() + DEADLINE_S
    while not (out.exists() and b"\n" in out.read_bytes()):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < limit
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = out.read_bytes()
    survived = before[: before.rfind(b"\n") + 1]
    num_survived = survived.count(b"\n")
    assert 1 <= num_survived < count
    out.write_bytes(survived + b'{"id": 19, "text": "to')  # as if it had been killed in the middle of a write

    assert run(file, out, model) == 0
    assert out.read_bytes().startswith(survived)
    assert run(file, tmp_path / "undisturbed.jsonl", model) == 0
    undisturbed = read(tmp_path / "undisturbed.jsonl")
    results = read(out)
    assert {key: result["text"] for key, result in results.items()} == {
        key: result["text"] for key, result in undisturbed.items()
    }
    size = out.stat().st_size
    assert size < 8192
    assert run(file, out, tmp_path / "no model is needed for nothing") == 0
    assert out.stat().st_size == size


@pytest.mark.parametrize("content", ['{"id": 1}\n', "notes\n", "notes without a newline", '{"id": 1, "usage": {}}\nnotes'])
def test_a_file_of_something_else_is_never_written(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "in.jsonl", {"prompt": "a"})
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    assert run(file, out, tmp_path) == 1
    assert "is no result of `streamkv generate`" in capsys.readouterr().err
    assert out.read_text() == content


def test_input_and_output_must_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "in.jsonl", {"prompt": "a"})
    assert run(file, tmp_path / "." / "in.jsonl", tmp_path) == 1
    assert "another file than FILE" in capsys.readouterr().err


def test_exit_codes_of_a_wrong_command_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as wrong:
        main(["generate"])
    assert wrong.value.code == 2
    assert main(["generate", str(tmp_path / "missing.jsonl")]) == 1
    assert main(["generate", str(write(tmp_path / "in.jsonl")), "--temperature", "-1"]) == 1
