"""The model in the box, served by CUDA kernels in the emulator: the same tokens as torch computes in the same dtype."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from streamkv import LLM, Engine, SamplingParams
from streamkv.attention import StepTensors
from streamkv.client import connect
from streamkv.engine.config import EngineConfig
from streamkv.sampling_params import TokenLogprobs
from streamkv.server.app import Server
from streamkv.server.config import ServerConfig
from streamkv_backends.cuda.backend import CudaBackend, CudaMetadata

SETTINGS = {"dtype": "float16", "num_blocks": 96, "max_model_len": 512, "max_num_seqs": 8}
EMULATED = SETTINGS | {"backend": "cuda", "device": "emulated"}
QUESTIONS = ["Hello, who are you?", "What is 17 + 25?", "Tell me a short story about a fox.", "What is a KV cache?"]
CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]
TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def cache(libraries: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMKV_CACHE", str(libraries))
        yield


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    with LLM(backend="torch", **SETTINGS) as llm:
        yield llm


async def test_a_server_on_emulated_kernels_says_what_torch_says(plain: LLM) -> None:
    greedy = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    expected = [plain.chat(chat, greedy).outputs[0].text for chat in CHATS]
    async with Engine(EngineConfig(**EMULATED)) as engine:
        assert engine.streams.client is not None
        server = Server(engine.streams, ServerConfig(port=0))
        async with server.listening(), connect(f"ws://127.0.0.1:{server.port}/v1/stream") as client:
            streams = [client.chat(chat, max_tokens=TOKENS, temperature=0.0) for chat in CHATS]
            texts = [await stream.result() for stream in streams]
    assert texts == expected
    assert all(texts)


def test_every_clear_choice_is_torchs(plain: LLM) -> None:
    """Teacher-forced: both read the same texts, and agree on every token that leads by more than twice the error."""
    greedy = SamplingParams(max_tokens=40, temperature=0.0)
    written = [plain.chat(chat, greedy) for chat in CHATS]
    texts = [output.prompt_token_ids + output.outputs[0].token_ids for output in written]
    read = SamplingParams(max_tokens=0, prompt_logprobs=5)
    with LLM(**EMULATED) as emulated:
        pairs = [
            pair
            for ours, theirs in zip(
                emulated.generate(texts, read, use_tqdm=False), plain.generate(texts, read, use_tqdm=False), strict=True
            )
            for pair in zip(positions(ours.prompt_logprobs), positions(theirs.prompt_logprobs), strict=True)
        ]
    error = max(abs(value - dict(b.top)[token]) for a, b in pairs for token, value in a.top if token in dict(b.top))
    assert error < 0.1, "log-probabilities of float16 kernels"
    clear = [(a, b) for a, b in pairs if b.top[0][1] - b.top[1][1] > 2 * error]
    assert len(clear) > 0.8 * len(pairs) > 80
    assert [a.top[0][0] for a, b in clear] == [b.top[0][0] for a, b in clear]


def test_streams_with_one_beginning_say_what_torch_says(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """They attend to it together, in steps that are recorded and replayed."""
    greedy = SamplingParams(max_tokens=TOKENS, min_tokens=TOKENS, temperature=0.0)
    story = "A fox lived in a wood. It was red, it was quick, and every evening it told the other animals a story. " * 3
    texts = [story + question for question in [*QUESTIONS, "Why?", "And then?"]]
    expected = [output.outputs[0].text for output in plain.generate(texts, greedy, use_tqdm=False)]
    shared = 0

    def prepare(backend: CudaBackend, tensors: StepTensors) -> CudaMetadata:
        nonlocal shared
        metadata = prepare_one(backend, tensors)
        shared += any(work.shared for work in metadata.work.values())
        return metadata

    prepare_one = CudaBackend.prepare
    monkeypatch.setattr(CudaBackend, "prepare", prepare)
    with LLM(**EMULATED) as emulated:
        found = [output.outputs[0].text for output in emulated.generate(texts, greedy, use_tqdm=False)]
    assert found == expected
    assert shared > TOKENS // 2


def positions(entries: list[TokenLogprobs | None] | None) -> list[TokenLogprobs]:
    assert entries is not None
    return [entry for entry in entries if entry is not None]
