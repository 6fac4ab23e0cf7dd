"""What sampling costs: milliseconds per call and as part of a decoding step, beside transformers' processors.

python -m benchmarks.sampling [--rounds 21] [--rows 64] [--vocab-sizes 32000 128000] [--no-step] [--cpu-time]

The step is one decoding step of `ModelRunner` with the 254M bfloat16 model (benchmarks/workloads.py), greedy, rows of 300 tokens.
Rounds are interleaved: in each one the step and every case are timed once, and the fastest round of each counts, because whatever
else the machine does can only add to a time. Two kinds of logits, bfloat16: *peaked*, where
the probability of the r-th token falls as r^-1.5 and top-p 0.95 keeps some hundred tokens, as language models do; and *flat*,
normally distributed with standard deviation 1, where it keeps half of the vocabulary and nothing can be skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, Final

import numpy as np
import torch

from benchmarks.report import print_setting, print_table
from benchmarks.workloads import DEFAULT_MODEL_DIR, build_model
from streamkv.logs import configure_logs
from streamkv.runner.params import RowParams
from streamkv.runner.sampling_tables import RowSampler
from streamkv.sampling_params import Sampling

LENGTH: Final = 300
PROMPT: Final = 200
Run = Callable[[], object]

_CUTS: Final[dict[str, Any]] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.95}
_PENALTIES: Final[dict[str, Any]] = {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1}
_BIAS: Final[dict[str, Any]] = {"logit_bias": tuple((17 * i, 1.0) for i in range(300))}
_WORDS: Final[dict[str, Any]] = {"bad_words": tuple((i, i + 1, i + 2)[: 1 + i % 3] for i in range(3, 131))}
_MINIMUM: Final[dict[str, Any]] = {"min_tokens": 1000, "stop_token_ids": (1, 2, 3, 4)}
_ALLOWED: Final[dict[str, Any]] = {"allowed_token_ids": tuple(range(0, 31 * 1000, 31))}
_EVERYTHING: Final[dict[str, Any]] = {**_CUTS, **_PENALTIES, **_BIAS, **_WORDS, **_MINIMUM}

CASES: Final[dict[str, dict[str, Any]]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"top_k": 50},
    "top_k 200": {"top_k": 200},
    "top_p 0.95": {"top_p": 0.95},
    "min_p 0.02": {"min_p": 0.02},
    "typical_p 0.95": {"typical_p": 0.95},
    "all four cuts": _CUTS,
    "greedy, three penalties": {"temperature": 0.0, **_PENALTIES},
    "greedy, logit_bias of 300": {"temperature": 0.0, **_BIAS},
    "greedy, 128 bad words": {"temperature": 0.0, **_WORDS},
    "greedy, min_tokens": {"temperature": 0.0, **_MINIMUM},
    "greedy, 1000 allowed ids": {"temperature": 0.0, **_ALLOWED},
    "everything": _EVERYTHING,
    "everything, without top_k": {**_EVERYTHING, "top_k": 0},
    "only 20 log-probabilities": {"logprobs": 20},
}


def main() -> None:
    arguments = _arguments()
    configure_logs(level="warning")
    print_setting("streamkv", "torch", "transformers")
    if arguments.cpu_time:
        torch.set_num_threads(1)
    print(f"torch threads: {torch.get_num_threads()}; {arguments.rows} rows, {LENGTH} tokens each\n", flush=True)
    step = None if arguments.no_step else _decoding_step(arguments)
    for vocab_size in arguments.vocab_sizes:
        _report(vocab_size, step, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="cost of sampling")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab-sizes", nargs="+", type=int, default=[32_000, 128_000])
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_MODEL_DIR, help="where the model is kept (%(default)s)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of one thread: for a machine that does other things too"
    )
    parser.add_argument("--no-step", action="store_true", help="without the model: milliseconds only")
    return parser.parse_args()


# -- what is timed -----------------------------------------------------------------------------------------------------


def _decoding_step(arguments: argparse.Namespace) -> Run:
    """One token for every row. The KV pool holds zeros: the time does not depend on what is in it."""
    from streamkv.attention import KVSpec
    from streamkv.backend_registry import load_backend
    from streamkv.core.step import Step
    from streamkv.runner.loader import load_model
    from streamkv.runner.model_runner import ModelRunner

    rows, size = list(range(arguments.rows)), 16
    model = load_model(build_model(arguments.model_dir))
    backend, _ = load_backend("auto")
    blocks = -(-(LENGTH + 1) // size)
    pool = backend.allocate_kv(KVSpec(len(rows) * blocks, size, model.dtype, model.layers))
    runner = ModelRunner(model, backend, pool, max_num_seqs=len(rows), max_model_len=blocks * size)
    made = 0

    def run() -> None:
        nonlocal made
        admitted = [] if made else [(row, str(row)) for row in rows]
        tables = [] if made else [(row, 0, tuple(range(row * blocks, (row + 1) * blocks))) for row in rows]
        params = {row: RowParams(Sampling(max_tokens=9, temperature=0.0), 0, [0] * LENGTH, LENGTH) for row, _ in admitted}
        count = [1] * len(rows)
        step = Step(made, 0.0, rows, [LENGTH - 1] * len(rows), count, [True] * len(rows), count, admitted, tables)
        runner.run(step, params)
        made += 1

    return run


def _peaked(rows: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    falling = -1.5 * torch.arange(1, vocab_size + 1).log()
    order = [torch.randperm(vocab_size, generator=generator) for _ in range(rows)]
    return falling[torch.stack(order)].bfloat16()


def _flat(rows: int, vocab_size: int) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0)).bfloat16()


def _ours(asked: dict[str, Any], logits: torch.Tensor) -> Run:
    """`sample` and `append`, and log-probabilities where they are asked for; allowed ids on every fourth row of *everything*."""
    count, vocab_size = logits.shape
    sampler = RowSampler(num_rows=count, max_len=4096, vocab_size=vocab_size, device=logits.device)
    history = np.random.default_rng(0).integers(0, vocab_size, (count, LENGTH)).tolist()
    for row in range(count):
        own = asked | (_ALLOWED if len(asked) > len(_CUTS | _PENALTIES) and row % 4 == 0 else {})
        sampler.admit(row, RowParams(Sampling(max_tokens=3000, seed=row, **own), 0, history[row], PROMPT))
    rows, positions = np.arange(count), np.full(count, LENGTH, np.int64)

    def run() -> None:
        tokens, _ = sampler.sample(rows, positions, logits)
        sampler.launch_logprobs(rows, logits, tokens).read()
        sampler.append(rows, tokens.tolist())
        positions[:] += 1

    return run


def _theirs(asked: dict[str, Any], logits: torch.Tensor) -> Run:
    """What `generate` does: processors in its order and one draw; the same for all rows, without presence and frequency."""
    import transformers as hf

    ids: Any = torch.randint(logits.shape[1], (len(logits), LENGTH), generator=torch.Generator().manual_seed(0))
    makers: dict[str, Callable[[Any], Any]] = {
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "logit_bias": lambda bias: hf.SequenceBiasLogitsProcessor({(token,): value for token, value in bias}),
        "bad_words": lambda words: hf.NoBadWordsLogitsProcessor([list(word) for word in words]),
        "min_tokens": lambda least: hf.MinNewTokensLengthLogitsProcessor(PROMPT, least, list(asked["stop_token_ids"])),
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
        "typical_p": hf.TypicalLogitsWarper,
    }
    chain = [make(asked[name]) for name, make in makers.items() if asked.get(name)]

    def run() -> None:
        scores: Any = logits.float()
        for processor in chain:
            scores = processor(ids, scores)
        torch.multinomial(torch.softmax(scores, dim=-1), 1)

    return run


# -- the table ---------------------------------------------------------------------------------------------------------


def _report(vocab_size: int, step: Run | None, arguments: argparse.Namespace) -> None:
    kinds = {"peaked": _peaked(arguments.rows, vocab_size), "flat": _flat(arguments.rows, vocab_size)}
    runs: dict[tuple[str, str], Run] = {
        (case, kind): _ours(asked, logits) for case, asked in CASES.items() for kind, logits in kinds.items()
    }
    runs |= {("transformers, everything it has", kind): _theirs(_EVERYTHING, logits) for kind, logits in kinds.items()}
    runs |= {("transformers, top_p 0.95", kind): _theirs({"top_p": 0.95}, logits) for kind, logits in kinds.items()}
    if step is not None:
        runs["the step", ""] = step
    with torch.inference_mode():
        times = _time(runs, arguments.rounds, thread_time if arguments.cpu_time else perf_counter)
    total = times.pop(("the step", ""), None)
    rows = []
    for case in dict.fromkeys(case for case, _ in times):
        peaked, flat = times[case, "peaked"], times[case, "flat"]
        share = [f"{peaked / total:.1%}", f"{flat / total:.1%}"] if total else []
        rows.append((case, f"{peaked * 1e3:.2f}", f"{flat * 1e3:.2f}", *share))
    header = ["all rows ask for", "peaked, ms", "flat, ms", *(["of a step", "of a step, flat"] if total else [])]
    of_step = f"; step of the 254M model (32,000 ids): {total * 1e3:.1f} ms" if total else ""
    print_table(f"Sampling, vocabulary {vocab_size:,}; fastest of {arguments.rounds} rounds{of_step}", header, rows)


def _time(runs: dict[tuple[str, str], Run], rounds: int, clock: Callable[[], float]) -> dict[tuple[str, str], float]:
    """Seconds of the fastest round of each."""
    times: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            start = clock()
            run()
            if turn >= 2:  # the first ones are not timed
                times[name].append(clock() - start)
    return {name: min(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
