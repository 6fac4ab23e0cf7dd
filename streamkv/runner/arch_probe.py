"""A loaded model under the hook, over a few tokens: what its layers ask for, and whether the answers are the model's own.

Four passes, whatever the model: one that writes down what each layer asks for (`arch_survey`), one with the model's own eager
attention, two with a sequence that is cut in two and packed behind another one. Nobody asks for names: a model that does
something the hook does not know gives other logits in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import structlog
import torch

from streamkv.attention import LayerSpec
from streamkv.errors import ModelLoadError
from streamkv.runner.arch_needs import refuse
from streamkv.runner.arch_plain import PlainPool
from streamkv.runner.arch_survey import Survey
from streamkv.runner.hook import HOOK_NAME, AttentionContext, attend_by

__all__ = ["probe_module"]

_NUM_TOKENS: Final = 8
_NUM_BESIDE: Final = 3
_TOLERANCE: Final = 3e-4
"""Of the logits in float32, relative; rounding gave up to 4e-6 in three layers of 80 architectures."""
_TOLERANCE_16_BIT: Final = 0.1
"""Two ways to round differ by some percent, and an expert may be chosen otherwise."""

log = structlog.get_logger(__name__)


def probe_module(module: Any, max_len: int, device: torch.device) -> tuple[LayerSpec, ...]:
    """What each attention layer asks for, checked.

    Args:
        module: attached to the hook.
        max_len: most tokens of a sequence.
        device: of the module.

    Raises:
        ModelLoadError: something that the hook needs is missing; one sentence says what.
    """
    try:
        with torch.inference_mode():
            return _probe(module, max_len, device)
    except ModelLoadError:
        raise
    except Exception as error:  # whatever the modules of a family raise
        log.exception("probe_failed")
        refuse("runs", module, what=f"{type(error).__name__} in its forward pass, the log says more")


def _probe(module: Any, max_len: int, device: torch.device) -> tuple[LayerSpec, ...]:
    num_tokens, beside = min(_NUM_TOKENS, max_len), min(_NUM_BESIDE, max_len)
    both = _probe_tokens(module, num_tokens + beside).to(device)
    tokens, neighbour = both[:num_tokens], both[num_tokens:]
    positions = torch.arange(num_tokens, device=device)
    survey = Survey(module, max_len)
    logits = _forward(module, tokens, positions, survey)  # [num_tokens, vocab_size]
    layers = survey.specs()
    with _own_attention(module):
        own = module(input_ids=tokens[None], use_cache=False).logits[0]
    _compare("alone", module, logits, own)
    high = torch.arange(max_len - beside, max_len, device=device)
    _compare("isolated", module, _packed(module, PlainPool(layers), tokens, positions, neighbour, high), logits)
    return layers


def _probe_tokens(module: Any, count: int) -> torch.Tensor:
    """Ids spread over the vocabulary, without those that may mean padding."""
    size = int(module.get_input_embeddings().weight.shape[0])
    named = [getattr(module.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "unk")]
    special = {token for ids in named for token in (ids if isinstance(ids, list) else [ids])}
    spread = [token for index in range(1, 4 * count) if (token := index * 7919 % size) not in special]
    return torch.tensor((spread * count)[:count], dtype=torch.long)


def _forward(module: Any, tokens: torch.Tensor, positions: torch.Tensor, context: AttentionContext) -> torch.Tensor:
    """[num_tokens, vocab_size], called as the runner calls it."""
    last = len(tokens) - 1
    keep = torch.tensor([*range(last, -1, -1), last], device=tokens.device)  # any order, any choice
    logits: torch.Tensor = module(
        input_ids=tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep, streamkv_context=context
    ).logits[0]
    if len(logits) != len(keep):
        refuse("runs", module, what="it does not honour logits_to_keep")
    return logits[:-1].flip(0)


def _packed(
    module: Any, pool: PlainPool, tokens: torch.Tensor, positions: torch.Tensor, neighbour: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """Logits of `tokens`, computed in two chunks, the first behind a neighbour at the highest positions."""
    cut, beside = (len(tokens) + 1) // 2, len(neighbour)
    pool.parts = [("neighbour", 0, beside), ("tokens", beside, beside + cut)]
    first = _forward(module, torch.cat([neighbour, tokens[:cut]]), torch.cat([high, positions[:cut]]), pool)[beside:]
    if cut == len(tokens):
        return first
    pool.parts = [("tokens", 0, len(tokens) - cut)]
    return torch.cat([first, _forward(module, tokens[cut:], positions[cut:], pool)])


def _compare(need: str, module: Any, logits: torch.Tensor, reference: torch.Tensor) -> None:
    """Refuse if the logits of some token differ; in 16 bits, of most tokens."""
    scale = reference.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    difference = (logits.float() - reference.float()).norm(dim=-1) / scale
    difference = difference[torch.isfinite(scale)]  # broken weights are found when they are used
    if not len(difference):
        return
    exact = reference.dtype is torch.float32
    error = float(difference.max() if exact else difference.median())
    log.debug("probed", need=need, error=error)
    if not error <= (_TOLERANCE if exact else _TOLERANCE_16_BIT):
        refuse(need, module, error=error)


@contextmanager
def _own_attention(module: Any) -> Iterator[None]:
    attend_by(module, "eager")
    try:
        yield
    finally:
        attend_by(module, HOOK_NAME)
