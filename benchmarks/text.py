"""Text, for every kind of tokenizer: tokens to text with stop strings, text to tokens, conversations to prompts.

python -m benchmarks.text [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import streamkv
from benchmarks.report import print_setting, print_table
from streamkv.text.detokenizer import IncrementalDetokenizer
from streamkv.text.stop import StopStrings
from streamkv.text.template import ChatTemplate
from streamkv.text.tokenizer import TextTokenizer, load_tokenizer
from tests.text.kinds import CHATML, KINDS, LINES, text_tokenizer
from tests.text.model_templates import TEMPLATES

US = 1e6
MIB = 1024 * 1024
STOPS = ("\n\nUser:", "<end>", "###", "</answer>")
NEAR_MISS = ("a " * 31 + "b", "a a b", " a" * 31 + "c", "a !")
TALK = [{"role": "user", "content": "the quick brown fox jumps over"}, {"role": "assistant", "content": "so it does."}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a place", "parameters": {"type": "object"}}}


def main() -> None:
    parser = argparse.ArgumentParser(description="measure text")
    parser.add_argument("--quick", action="store_true", help="few repetitions: shows that it runs, not how fast")
    quick = parser.parse_args().quick
    print_setting("tokenizers", "jinja2")
    repeats, size = (1, MIB // 32) if quick else (5, MIB)
    box = load_tokenizer(Path(streamkv.__file__).parent / "demo" / "model")
    tokenizers = {"the model in the box": box} | {kind: text_tokenizer(kind) for kind in KINDS}
    rows = [(name, *out(tokenizer, size // 8, repeats)) for name, tokenizer in tokenizers.items()]
    header = ["tokenizer", "alone", "4 stop strings", "held back all the time", "after a prompt"]
    print_table("Tokens to text: µs for one token, one at a time", header, rows)
    rows = [(name, *into(tokenizer, size, repeats)) for name, tokenizer in tokenizers.items()]
    print_table("Text to tokens: MiB/s", ["tokenizer", "text", "one character", "special tokens typed"], rows)
    print_table("Conversation to text: µs for one message", ["template", "2 messages", "200 messages"], rendering(repeats))


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run."""

    def once() -> float:
        started = perf_counter()
        run()
        return perf_counter() - started

    return min(once() for _ in range(repeats))


def out(tokenizer: TextTokenizer, size: int, repeats: int) -> list[str]:
    tokens = tokenizer.encode(sample(size))

    def stream(stops: tuple[str, ...], ids: list[int], prompt: list[int]) -> None:
        detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids=prompt)
        stop = StopStrings(stops)
        for token in ids:
            stop.push(detokenizer.push((token,)))

    near = tokenizer.encode("a " * (len(tokens) // 2))
    cases = [((), tokens, []), (STOPS, tokens, []), (NEAR_MISS, near, []), ((), tokens, tokens)]
    return [f"{best(partial(stream, *case), repeats) / len(case[1]) * US:.2f}" for case in cases]


def into(tokenizer: TextTokenizer, size: int, repeats: int) -> list[str]:
    texts = [text * (size // len(text.encode())) for text in (sample(4096), "a", "<|im_start|>")]
    return [f"{size / MIB / best(partial(tokenizer.encode, text), repeats):.1f}" for text in texts]


def rendering(repeats: int) -> list[tuple[str, str, str]]:
    rows = []
    for name, template, tools in (
        ("ChatML", ChatTemplate(CHATML), None),
        ("Qwen 2.5, one tool", ChatTemplate(TEMPLATES["qwen 2.5"]), [TOOL]),
        ("Llama 3.1, one tool", ChatTemplate(TEMPLATES["llama 3.1"]), [TOOL]),
    ):
        costs = []
        for talk in (TALK, TALK * 100):
            template.render(talk, tools=tools)
            costs.append(best(partial(template.render, talk, tools=tools), repeats * 3) / len(talk) * US)
        rows.append((name, *(f"{cost:.0f}" for cost in costs)))
    return rows


def sample(size: int) -> str:
    text = "\n".join(LINES)
    return (text * (size // len(text.encode()) + 1))[: size // 2]


if __name__ == "__main__":
    main()
