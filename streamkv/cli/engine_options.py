"""Options that every command which loads a model shares; the names are those that vLLM's users know."""

from __future__ import annotations

import argparse
from dataclasses import fields

from streamkv.engine.config import EngineConfig, parse_bytes
from streamkv.errors import ConfigError

__all__ = ["add_engine_arguments", "engine_config"]


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them."""
    defaults = EngineConfig()
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder in Hugging Face's layout, or an id of the hub such as org/name (default: the model in the box)",
    )
    group.add_argument("--revision", help="branch, tag or commit of a model of the hub (default: its default branch)")
    group.add_argument("--served-model-name", help="what clients call the model")
    group.add_argument(
        "--backend", default=defaults.backend, help="auto, cpu, torch, cuda, an entry point, or package.module:Class"
    )
    group.add_argument("--device", default=defaults.device, help="torch device (default: what the backend wants)")
    group.add_argument("--dtype", default=defaults.dtype, choices=["auto", "float32", "bfloat16", "float16"])
    group.add_argument(
        "--quantization", default=defaults.quantization, choices=["int8", "int4"], help="of the weights (default: none)"
    )
    group.add_argument(
        "--load-format", default=defaults.load_format, choices=["safetensors", "dummy"], help="dummy = random weights"
    )
    group.add_argument("--block-size", type=int, default=defaults.block_size, help="tokens per KV block (%(default)s)")
    group.add_argument("--num-blocks", type=int, help="size of the KV pool in blocks")
    group.add_argument("--kv-cache-memory", type=_size, metavar="SIZE", help="size of the KV pool, such as 2GiB")
    group.add_argument(
        "--memory-fraction",
        type=float,
        help="share of the free memory for the KV pool, if neither size is given (default: 0.9 on a GPU, else 0.5)",
    )
    group.add_argument(
        "--swap-memory",
        type=_size,
        metavar="SIZE",
        help="host memory for what preempted requests held, 0 = compute it again (default: 0 on the CPU, up to 4GiB on a GPU)",
    )
    group.add_argument(
        "--swap-block-tokens",
        type=float,
        metavar="N",
        help="prompt tokens computed while a block is moved out and in; the cheaper is done (default: measured at start)",
    )
    group.add_argument("--max-model-len", type=int, help="most tokens of a request (default: what the model was made for)")
    group.add_argument("--max-num-seqs", type=int, default=defaults.max_num_seqs, help="most requests in a step (%(default)s)")
    group.add_argument(
        "--max-num-batched-tokens", type=int, default=defaults.max_num_batched_tokens, help="token budget of a step (%(default)s)"
    )
    group.add_argument("--max-queued-requests", type=int, default=defaults.max_queued_requests, help="(%(default)s)")
    group.add_argument("--max-queued-tokens", type=int, default=defaults.max_queued_tokens, help="(%(default)s)")
    group.add_argument("--no-enable-prefix-caching", dest="enable_prefix_caching", action="store_false", help="share no blocks")
    group.add_argument("--scheduling-policy", default=defaults.scheduling_policy, choices=["fcfs", "priority"])
    group.add_argument(
        "--speculation",
        default=defaults.speculation,
        choices=["off", "ngram"],
        help="ngram = check drafts looked up in a request's own tokens, several in a step; same tokens (%(default)s)",
    )
    group.add_argument("--seed", type=int, default=defaults.seed, help="of the random weights of --load-format dummy")
    group.add_argument(
        "--logits-processor",
        dest="logits_processors",
        metavar="NAME",
        action="append",
        default=[],
        help="one that requests may ask for, an entry point or package.module:Class; may be repeated",
    )
    group.add_argument("--no-look-ahead", dest="look_ahead", action="store_false", help="do not plan while a step runs")
    group.add_argument(
        "--poison", action="store_true", help="debug: fill new KV blocks with NaN and prove invariants after each step"
    )


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """The configuration that the options describe.

    Raises:
        ConfigError: a value is out of its bounds.
    """
    given = {field.name: getattr(arguments, field.name) for field in fields(EngineConfig)}
    return EngineConfig(**given | {"logits_processors": tuple(given["logits_processors"])})


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.message) from error
