"""The start of training: two heads that copy, set by construction.

A name told early must be repeated late, and stories must be about what was asked for. The two-layer
circuit that does this ("find where this token stood before, say what came next") forms by itself only
after far more text than an hour on two cores affords: it was tried, with 3 million tokens it had not
begun. So the first head of layer 0 starts as "look at the token before" and the first head of layer 1 as
"look where the token before was the present one, and say that token". Training goes on from there.

See Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021), and Olsson et al.,
"In-context Learning and Induction Heads" (2022).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

_MARK = 4.0  # value of dimension 0 of every embedding: what a head reads that looks at places, not at words
_NOTE = 64  # last dimensions of the residual stream, empty in the embedding: hold the token before
_FAST = 6  # rotary pairs that turn fast enough to tell neighbours apart
_SLOW = 12  # rotary pairs that hardly turn over a few hundred tokens: fit to compare words far apart
_LOOK_BACK = 1.9  # sharpness of "the token before": 7 nats over its neighbours
_COMPARE = 2.6  # sharpness of "the same word"
_SAY = 5.0  # loudness of what is copied


def initialise(model: LlamaForCausalLM) -> None:
    """Set the embedding, let every layer begin as a no-op, and build the two heads."""
    config = model.config
    size, head = config.hidden_size, config.head_dim
    words = slice(1, size - _NOTE)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight.normal_()  # [vocab_size, size]
        embedding[:, 0] = _MARK
        embedding[:, size - _NOTE :] = 0.0
        model.model.norm.weight.fill_(size**-0.75)  # embeddings of size one would make logits of hundreds
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        read = torch.nn.init.orthogonal_(torch.empty(_NOTE, size - _NOTE - 1))
        turns = config.rope_parameters["rope_theta"] ** (-torch.arange(head // 2) / (head // 2))
        _look_back(model.model.layers[0].self_attn, turns, read, words, head)
        _say_next(model.model.layers[1].self_attn, read, words, head)


def _look_back(attention: Any, turns: Tensor, read: Tensor, words: slice, head: int) -> None:
    """Head 0 attends to the position before and notes its word in the last dimensions."""
    query, key, value, out = _first_head(attention, head)
    for pair in range(_FAST):
        # A rotary pair is (i, i + head / 2); the query lags by one position's turn.
        query[pair, 0] = _LOOK_BACK * torch.cos(turns[pair])
        query[pair + head // 2, 0] = -_LOOK_BACK * torch.sin(turns[pair])
        key[pair, 0] = _LOOK_BACK
    value[:, words] = read
    out[-_NOTE:, :] = torch.eye(_NOTE)


def _say_next(attention: Any, read: Tensor, words: slice, head: int) -> None:
    """Head 0 attends to where the noted word is the present one, and adds the word found there."""
    query, key, value, out = _first_head(attention, head)
    slow = [*range(head // 2 - _SLOW, head // 2), *range(head - _SLOW, head)]
    for line, row in enumerate(slow):
        query[row, words] = _COMPARE * read[line]
        key[row, query.shape[1] - _NOTE + line] = _COMPARE
    carry = torch.nn.init.orthogonal_(torch.empty_like(read))
    value[:, words] = carry
    out[words, :] = _SAY * carry.T


def _first_head(attention: Any, head: int) -> list[Tensor]:
    """Return zeroed views of head 0: query, key, value [head, size] and output [size, head]."""
    views = [attention.q_proj.weight[:head], attention.k_proj.weight[:head], attention.v_proj.weight[:head]]
    views.append(attention.o_proj.weight[:, :head])
    for view in views:
        view.zero_()
    return views
