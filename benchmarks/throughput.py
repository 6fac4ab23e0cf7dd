"""StreamKV beside transformers' static `generate` and its continuous batching: same model, same requests, same run.

python -m benchmarks.throughput [--rounds 3] [--workloads single mixed32 prefix32] [--engines ...] [--quick]

Rounds are interleaved: in each one every engine serves the same requests once, with token ids that no engine has seen before.
Each engine first runs the same shape untimed. Only the tokens that a request asked for are counted. All are greedy.
Each engine lives in a process of its own, as it would in use: several OpenMP teams in one process slow each other down even
while they are idle, because libgomp stops spinning once a process has more threads than there are cores.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

from benchmarks.report import print_setting, print_table
from benchmarks.workloads import DEFAULT_MODEL_DIR, WORKLOADS, Job, build_model, jobs
from streamkv.llm import LLM
from streamkv.logs import configure_logs
from streamkv.sampling_params import SamplingParams

QUICK_SCALE: Final = 8
Outputs = list[list[int]]
Serve = Callable[[Sequence[Job]], tuple[float, Outputs]]
"""Serve requests that arrive together: (seconds, output tokens of each)."""


def main() -> None:
    arguments = _arguments()
    folder = build_model(arguments.model_dir, tiny=arguments.quick)
    dtype = "float32" if arguments.quick else "bfloat16"
    configure_logs(level="warning")
    print_setting("streamkv", "torch", "transformers")
    _print_threads()
    with ExitStack() as stack:
        engines = {name: stack.enter_context(_apart(name, folder, dtype, arguments)) for name in arguments.engines}
        for workload in arguments.workloads:
            results = _measure(engines, workload, arguments)
            _report(workload, results, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="tokens per second beside transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_MODEL_DIR, help="where the model is kept (%(default)s)")
    parser.add_argument("--backend", default="auto", help="StreamKV's backend")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=512, help="token budget of a step, both engines that have one"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the token ids")
    parser.add_argument("--quick", action="store_true", help="a tiny float32 model: all engines must agree on every token")
    return parser.parse_args()


def _print_threads() -> None:
    import torch

    print(f"torch threads: {torch.get_num_threads()}, CPU capability {torch.backends.cpu.get_cpu_capability()}\n", flush=True)


# -- processes --------------------------------------------------------------------------------------------------------


@contextmanager
def _apart(name: str, folder: Path, dtype: str, arguments: argparse.Namespace) -> Iterator[Serve]:
    """An engine in a process of its own."""
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_work, args=(there, name, folder, dtype, arguments), daemon=True)
    process.start()
    there.close()

    def serve(batch: Sequence[Job]) -> tuple[float, Outputs]:
        here.send(list(batch))
        answer: tuple[float, Outputs] = here.recv()
        return answer

    try:
        yield serve
    finally:
        here.close()
        process.join(30)


def _work(connection: Connection, name: str, folder: Path, dtype: str, arguments: argparse.Namespace) -> None:
    """The other end: serve what comes until nothing more can come."""
    configure_logs(level="warning")
    with ENGINES[name](folder, dtype, arguments) as serve:
        while True:
            try:
                batch = connection.recv()
            except EOFError:
                return
            gc.collect()
            connection.send(serve(batch))


# -- engines ----------------------------------------------------------------------------------------------------------


@contextmanager
def _streamkv(folder: Path, dtype: str, arguments: argparse.Namespace) -> Iterator[Serve]:
    """`LLM`, prefix cache on. The pool holds all requests of every workload."""
    llm = LLM(
        str(folder),
        dtype=dtype,
        backend=arguments.backend,
        num_blocks=2560,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
    )

    def serve(batch: Sequence[Job]) -> tuple[float, Outputs]:
        params = [SamplingParams(temperature=0.0, max_tokens=job.max_tokens, ignore_eos=True) for job in batch]
        prompts = [job.prompt for job in batch]
        start = perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return perf_counter() - start, [output.outputs[0].token_ids for output in outputs]

    with llm:
        yield serve


@contextmanager
def _generate(folder: Path, dtype: str, arguments: argparse.Namespace) -> Iterator[Serve]:
    """`generate`: one left-padded batch; every row runs until the longest is done."""
    import torch

    model = _load(folder, dtype)

    def serve(batch: Sequence[Job]) -> tuple[float, Outputs]:
        start = perf_counter()
        width = max(len(job.prompt) for job in batch)
        ids = torch.tensor([[0] * (width - len(job.prompt)) + job.prompt for job in batch])  # [rows, width]
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
        longest = max(job.max_tokens for job in batch)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=0)
        rows = output[:, width:].tolist()
        return perf_counter() - start, [row[: job.max_tokens] for row, job in zip(rows, batch, strict=True)]

    yield serve


@contextmanager
def _continuous(folder: Path, dtype: str, arguments: argparse.Namespace) -> Iterator[Serve]:
    """Continuous batching of transformers, each request with its own length.

    Its manager lives as long as one measurement, because an idle one keeps a thread awake; starting it is not counted.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _load(folder, dtype)
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def serve(batch: Sequence[Job]) -> tuple[float, Outputs]:
        config = ContinuousBatchingConfig(num_blocks=176, max_batch_tokens=arguments.max_num_batched_tokens)
        with model.continuous_batching_context_manager(generation_config=greedy, continuous_batching_config=config) as manager:
            _collect(manager, [Job(batch[0].prompt[:1], 1)], "first")
            start = perf_counter()
            outputs = _collect(manager, batch, "timed")
            return perf_counter() - start, outputs

    yield serve


def _collect(manager: Any, batch: Sequence[Job], name: str) -> Outputs:
    names = [f"{name}-{index}" for index in range(len(batch))]
    for request_id, job in zip(names, batch, strict=True):
        manager.add_request(job.prompt, request_id=request_id, max_new_tokens=job.max_tokens)
    finished: dict[str, list[int]] = {}
    while len(finished) < len(names):
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("continuous batching of transformers stopped")
        elif result.is_finished():
            finished[result.request_id] = list(result.generated_tokens)
    return [finished[request_id] for request_id in names]


def _load(folder: Path, dtype: str) -> Any:
    """A model of its own for each engine: continuous batching replaces the attention of its model."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()


ENGINES: Final[dict[str, Callable[..., Any]]] = {
    "streamkv": _streamkv,
    "generate": _generate,
    "continuous": _continuous,
}
_TITLES: Final = {
    "streamkv": "StreamKV",
    "generate": "transformers `generate`, static batch",
    "continuous": "transformers continuous batching",
}


# -- rounds -----------------------------------------------------------------------------------------------------------


@dataclass
class _Result:
    """Rates of one engine, one per round."""

    rates: list[float] = field(default_factory=list)


def _measure(engines: dict[str, Serve], workload: str, arguments: argparse.Namespace) -> dict[str, _Result]:
    results = {name: _Result() for name in engines}
    size = {"vocab_size": 512, "scale": QUICK_SCALE} if arguments.quick else {"vocab_size": 32_000}
    for turn in range(arguments.rounds + 1):
        batch = jobs(workload, arguments.seed + turn, **size)
        outputs: dict[str, Outputs] = {}
        for name, serve in engines.items():
            seconds, outputs[name] = serve(batch)
            print(f"{workload}, round {turn or 'untimed'}: {name} took {seconds:.1f} s", file=sys.stderr, flush=True)
            for job, tokens in zip(batch, outputs[name], strict=True):
                if len(tokens) != job.max_tokens:
                    raise RuntimeError(f"{name} gave {len(tokens)} tokens where {job.max_tokens} were asked for")
            if turn:  # the first one is not timed
                results[name].rates.append(sum(job.max_tokens for job in batch) / seconds)
        if arguments.quick and any(other != outputs[next(iter(outputs))] for other in outputs.values()):
            raise RuntimeError(f"the engines disagree on {workload}")
    return results


def _report(workload: str, results: dict[str, _Result], arguments: argparse.Namespace) -> None:
    base = "generate" if "generate" in results else next(iter(results))
    rows = []
    for name, result in results.items():
        ratio = median(mine / theirs for mine, theirs in zip(result.rates, results[base].rates, strict=True))
        spread = f"{min(result.rates):.1f}–{max(result.rates):.1f}"
        rows.append((_TITLES[name], f"{median(result.rates):.1f}", spread, f"{ratio:.2f} ×"))
    scale = f"; lengths divided by {QUICK_SCALE}" if arguments.quick else ""
    title = f"*{workload}*: {WORKLOADS[workload][0]}; {arguments.rounds} rounds{scale}"
    print_table(title, ["engine", "useful tok/s, median", "range", f"to {base}"], rows)


if __name__ == "__main__":
    main()
