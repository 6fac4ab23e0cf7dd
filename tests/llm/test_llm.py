"""`LLM.generate`: every form of prompt and parameters, the outputs' order and contents, and errors that say what is wrong."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from streamkv import LLM, RequestOutput, SamplingParams
from streamkv.engine.api import EngineStats
from streamkv.errors import ConfigError, ContextLengthError, EngineError, InvalidRequestError, ModelLoadError
from tests.llm.conftest import SETTINGS
from tests.runner.tiny import generate
from tests.text.kinds import text_tokenizer

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
TEXT = "the quick brown fox"


def ask(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def stats(llm: LLM) -> EngineStats:
    return asyncio.run_coroutine_threadsafe(llm._engine.streams.client.stats(), llm._loop).result(30)


@pytest.mark.smoke
def test_text_and_its_token_ids_are_the_same_prompt(llm: LLM, folder: Path) -> None:
    ids = text_tokenizer("byte_level").encode(TEXT)
    forms = [TEXT, ids, {"prompt": TEXT}, {"prompt_token_ids": ids}, {"prompt_token_ids": tuple(ids)}]
    outputs = ask(llm, forms)
    expected = generate(folder, ids, 8)
    for output in outputs:
        assert output.prompt_token_ids == ids
        assert output.finished
        (sample,) = output.outputs
        assert sample.token_ids == expected
        assert sample.text == text_tokenizer("byte_level").decode(expected)
        assert (sample.index, sample.finish_reason, sample.logprobs) == (0, "length", None)
    assert [output.prompt for output in outputs] == [TEXT, None, TEXT, None, None]


@pytest.mark.parametrize("prompt", [TEXT, [5, 6, 7], (5, 6, 7), {"prompt_token_ids": [5, 6, 7]}, {"prompt": TEXT}])
def test_one_prompt_needs_no_list(llm: LLM, prompt: Any) -> None:
    (output,) = ask(llm, prompt)
    assert len(output.outputs[0].token_ids) == 8
    assert output.prompt_token_ids == (text_tokenizer("byte_level").encode(TEXT) if "q" in str(prompt) else [5, 6, 7])


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    """The first prompts run longest, so that they end last."""
    prompts = [[10 + index, 20, 30] for index in range(12)]
    params = [SamplingParams(max_tokens=30 - 2 * index, temperature=0.0) for index in range(12)]
    outputs = ask(llm, prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [30 - 2 * index for index in range(12)]
    assert len({output.request_id for output in outputs}) == 12


def test_more_prompts_than_the_queue_takes_at_once(llm: LLM) -> None:
    outputs = ask(llm, [[7 + index % 300] for index in range(300)], SamplingParams(max_tokens=1))
    assert [output.prompt_token_ids for output in outputs] == [[7 + index % 300] for index in range(300)]


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert ask(llm, []) == []
    assert ask(llm, [], []) == []


def test_n_samples_share_a_prompt_and_differ(llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=10, seed=7)
    (output,) = ask(llm, TEXT, params)
    assert [sample.index for sample in output.outputs] == [0, 1, 2]
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 3
    (again,) = ask(llm, TEXT, params)
    assert [s.token_ids for s in again.outputs] == [s.token_ids for s in output.outputs], "the seed decides"
    (other,) = ask(llm, TEXT, SamplingParams(n=3, max_tokens=10, seed=8))
    assert [s.token_ids for s in other.outputs] != [s.token_ids for s in output.outputs]


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_one_per_token_with_the_most_probable_first(llm: LLM, top: int) -> None:
    (output,) = ask(llm, TEXT, SamplingParams(max_tokens=5, temperature=0.0, logprobs=top))
    (sample,) = output.outputs
    assert sample.logprobs is not None
    assert len(sample.logprobs) == len(sample.token_ids) == 5
    for token, logprobs in zip(sample.token_ids, sample.logprobs, strict=True):
        assert logprobs.chosen <= 0.0
        assert len(logprobs.top) == top
        assert [value for _, value in logprobs.top] == sorted((value for _, value in logprobs.top), reverse=True)
        if top:
            assert logprobs.top[0] == (token, pytest.approx(logprobs.chosen)), "greedy takes the most probable"


def test_a_repeated_prompt_comes_from_the_cache(llm: LLM) -> None:
    prompt = list(range(100, 140))
    (cold,) = ask(llm, prompt)
    (warm,) = ask(llm, prompt)
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 39), "all but the last token, which is recomputed"
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids


def test_stop_strings_and_stop_tokens(llm: LLM) -> None:
    (free,) = ask(llm, TEXT, SamplingParams(max_tokens=20, temperature=0.0))
    text, tokens = free.outputs[0].text, free.outputs[0].token_ids
    stop = text[len(text) // 2 :][:3]
    (cut,) = ask(llm, TEXT, SamplingParams(max_tokens=20, temperature=0.0, stop=(stop,)))
    assert cut.outputs[0].text == text[: text.index(stop)]
    assert cut.outputs[0].finish_reason == "stop"
    (ended,) = ask(llm, TEXT, SamplingParams(max_tokens=20, temperature=0.0, stop_token_ids=(tokens[5],)))
    assert ended.outputs[0].token_ids == tokens[: tokens.index(tokens[5]) + 1]
    assert ended.outputs[0].finish_reason == "stop"


def test_chat_writes_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    output = llm.chat(messages, GREEDY)
    assert output.prompt_token_ids == text_tokenizer("byte_level").encode_chat(messages)
    assert len(output.outputs[0].token_ids) == 8


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "params", "error", "match"),
    [
        (5, GREEDY, InvalidRequestError, "prompt"),
        (None, GREEDY, InvalidRequestError, "prompt"),
        (b"bytes", GREEDY, InvalidRequestError, "prompt"),
        ("", GREEDY, InvalidRequestError, "empty"),
        ([[]], GREEDY, InvalidRequestError, "empty"),
        ([None], GREEDY, InvalidRequestError, "prompt is a string"),
        ([1.5], GREEDY, InvalidRequestError, "prompt is a string"),
        ([[1, "a"]], GREEDY, InvalidRequestError, "token id"),
        ([[1, 512]], GREEDY, InvalidRequestError, "token id"),
        ([-1, 5], GREEDY, InvalidRequestError, "token id"),
        ([True, False], GREEDY, InvalidRequestError, "token id"),
        ([{}], GREEDY, InvalidRequestError, "prompt_token_ids or prompt"),
        ({"prompt": 5}, GREEDY, InvalidRequestError, "prompt_token_ids or prompt"),
        ({"prompt_token_ids": None}, GREEDY, InvalidRequestError, "prompt_token_ids or prompt"),
        ({"prompt_token_ids": 5}, GREEDY, InvalidRequestError, "list"),
        ({"prompt_token_ids": "abc"}, GREEDY, InvalidRequestError, "list"),
        ([1] * 300, GREEDY, ContextLengthError, "256"),
        ([1] * 250, GREEDY, ContextLengthError, "256"),
        ("half \ud800", GREEDY, InvalidRequestError, "surrogate"),
        (["a", "b"], [GREEDY], InvalidRequestError, "2 prompts and 1"),
        (["a"], [GREEDY, GREEDY], InvalidRequestError, "1 prompts and 2"),
        (["a"], [], InvalidRequestError, "1 prompts and 0"),
        (["a"], 5, InvalidRequestError, "SamplingParams"),
        (["a"], {"max_tokens": 5}, InvalidRequestError, "SamplingParams"),
        (["a", "b"], [GREEDY, {"max_tokens": 5}], InvalidRequestError, "SamplingParams"),
        (["a", "b"], "ab", InvalidRequestError, "SamplingParams"),
        (["a"], SamplingParams(stop_token_ids=(512,)), InvalidRequestError, "stop_token_ids"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(llm: LLM, prompts: Any, params: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        ask(llm, prompts, params)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_one_bad_prompt_refuses_the_batch_and_leaves_nothing_running(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="token id"):
        ask(llm, [[1, 2, 3]] * 5 + [[9999]], SamplingParams(max_tokens=200))
    assert llm._engine.streams.num_open == 0 or stats(llm).running == 0
    assert len(ask(llm, [TEXT])) == 1, "and it still serves"
    assert stats(llm).running == stats(llm).waiting == 0


@pytest.mark.parametrize(
    ("messages", "match"),
    [("hi", "list"), ([], "at least one"), ([{"role": "user"}], "content"), ([{"role": "im_end", "content": ""}], "role")],
)
def test_chat_refuses_what_is_no_conversation(llm: LLM, messages: Any, match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        llm.chat(messages, GREEDY)


@pytest.mark.parametrize(
    ("model", "settings", "error"),
    [
        ("no/such/folder", {}, ModelLoadError),
        (None, {"backend": "no-such-backend"}, ConfigError),
        (None, {"num_blocks": 0}, ConfigError),
        (None, {"max_model_len": 10**6}, ConfigError),
        (None, {"no_such_setting": 1}, TypeError),
    ],
)
def test_a_start_that_fails_raises_and_leaves_no_thread(
    folder: Path, model: str | None, settings: dict[str, Any], error: type[Exception]
) -> None:
    before = set(threading.enumerate())
    with pytest.raises(error):
        LLM(model or str(folder), **(SETTINGS | settings))
    assert {thread for thread in threading.enumerate() if thread.name.startswith("streamkv")} <= before


# -- life -------------------------------------------------------------------------------------------------------------


def test_ctrl_c_cancels_the_batch_and_the_llm_goes_on(llm: LLM) -> None:
    caught = threading.Event()
    before = stats(llm).output_tokens

    async def interrupt() -> None:
        client, main = llm._engine.streams.client, threading.main_thread().ident
        while not (await client.stats()).running:
            await asyncio.sleep(0)
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        assert caught.wait(30)  # holds the loop, so that the batch cannot end by itself meanwhile

    async def rest() -> None:
        while llm._engine.streams.num_open:
            await asyncio.sleep(0)

    pressed = asyncio.run_coroutine_threadsafe(interrupt(), llm._loop)
    with pytest.raises(KeyboardInterrupt):
        ask(llm, [[1, 2, 3], [4, 5]], SamplingParams(max_tokens=250, n=2))
    caught.set()
    pressed.result(30)
    asyncio.run_coroutine_threadsafe(asyncio.wait_for(rest(), 30), llm._loop).result(60)
    after = stats(llm)
    assert after.running == after.waiting == 0
    assert after.output_tokens - before < 1000, "nobody has computed the rest"
    assert len(ask(llm, TEXT)[0].outputs[0].token_ids) == 8


def test_close_is_idempotent_ends_its_threads_and_later_calls_say_so(folder: Path) -> None:
    before = set(threading.enumerate())
    llm = LLM(str(folder), **SETTINGS)
    ask(llm, [[1, 2, 3]])
    llm.close()
    llm.close()
    with llm:
        pass
    with pytest.raises(EngineError, match="closed"):
        ask(llm, [[1, 2, 3]])
    with pytest.raises(EngineError, match="closed"):
        llm.chat([{"role": "user", "content": "x"}])
    left = set(threading.enumerate()) - before
    assert not {thread for thread in left if thread.name.startswith(("streamkv-llm", "streamkv-runner"))}


def test_the_progress_bar_is_shown_only_if_asked_for(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate([TEXT], GREEDY, use_tqdm=False)
    assert "generating" not in capsys.readouterr().err
