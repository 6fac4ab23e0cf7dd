"""What the attention hook needs of a model, how that is looked at when a model is loaded, and what is said when it is missing.

The table is the whole list: `refuse` takes its sentences from here, docs/models.md is generated from it, and a test breaks each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NoReturn

from streamkv.errors import ModelLoadError

__all__ = ["NEEDS", "Need", "refuse"]


@dataclass(frozen=True, slots=True)
class Need:
    """One line of the table.

    Attributes:
        need: what must hold.
        probed: how it is looked at; `config` = before any weight is read, `pass` = in a forward pass over a few tokens.
        reason: what follows "{architecture} is not served: " when it does not hold; names in braces are filled in.
    """

    need: str
    probed: str
    reason: str


NEEDS: Final[dict[str, Need]] = {
    "class": Need(
        "transformers has it as a causal language model",
        "config: `architectures` names the class that transformers' table of causal language models has for `model_type`",
        "transformers has {known} for model type {model_type!r}",
    ),
    "decoder_only": Need(
        "a decoder and nothing else",
        "config: `is_encoder_decoder`, `add_cross_attention`, `is_causal`, `use_bidirectional_attention`",
        "{what}, and only decoders that stand alone are",
    ),
    "text": Need(
        "one text model, not a wrapper around several",
        "config: it is its own text configuration",
        "it wraps a text model together with others ({parts}), and only text models are",
    ),
    "interface": Need(
        "attention goes through transformers' interface, or through a method `_attn(query, key, value, attention_mask)`",
        "config: the file that defines the class",
        "its attention does not go through transformers' attention interface",
    ),
    "stateless": Need(
        "nothing is kept between tokens but keys and values",
        "config: the class is not stateful, `layer_types` names attention only",
        "it keeps a recurrent state ({what}), and only keys and values are kept between steps",
    ),
    "layer_types": Need(
        "each layer attends fully or within a sliding window",
        "config: `layer_types`",
        "its layers use {what}, and only full and sliding-window attention are supported",
    ),
    "own_kv": Need(
        "each layer has keys and values of its own",
        "config: `num_kv_shared_layers`; pass: no two layers hand over the same tensor",
        "its layers share keys and values across layers, which is not supported",
    ),
    "no_alibi": Need(
        "positions enter by rope or by an embedding",
        "config: `alibi`, `position_embedding_type`",
        "its attention adds a bias for distance ({what}), which the paged attention does not have",
    ),
    "length": Need(
        "a longest sequence",
        "config: `max_position_embeddings` or the family's name for it",
        "its config.json names no max_position_embeddings, so nobody knows how long a request may be",
    ),
    "rope": Need(
        "rope tables do not follow the running batch",
        "after loading: tables of type `dynamic` and `longrope` are fixed for `max_model_len`",
        "beyond {length} tokens its rope ({kind}) follows the longest sequence of a batch; set max_model_len to {length} or less",
    ),
    "runs": Need(
        "takes `input_ids`, `position_ids` and `logits_to_keep`, and returns logits for just those tokens",
        "pass",
        "it cannot be run over packed tokens ({what})",
    ),
    "layers": Need(
        "each attention layer is entered once in a pass, with a `layer_idx` that counts from 0",
        "pass",
        "its attention layers are {what}, and each must be entered once in a pass and be numbered from 0",
    ),
    "width": Need(
        "keys and values of equal width",
        "pass",
        "layer {index} has keys and values of different width ({key} and {value}), which is not supported",
    ),
    "arguments": Need(
        "nothing changes the scores but scale, window, soft-cap and sinks",
        "pass: every argument that a layer hands to the interface is a known one, or None",
        "layer {index} hands {what} to its attention, which is not supported",
    ),
    "mask": Need(
        "the mask is causal, or causal within a sliding window",
        "pass: the mask's own function is asked about the last position and those around the window's border",
        "layer {index} has {what}, and only causal and sliding-window attention are supported",
    ),
    "equation": Need(
        "attention is the softmax of the scaled scores",
        "after the pass: the layer's own eager function on random vectors, many and few keys, gives what ours gives",
        "layer {index} computes something else than softmax attention",
    ),
    "alone": Need(
        "nothing else in the model depends on how attention is carried out",
        "pass: the logits equal those of the same module with its own eager attention",
        "through the hook its logits differ from those of its own attention by {error:.1e}",
    ),
    "isolated": Need(
        "a token depends on its own sequence alone, by its explicit position, in whatever chunks it is computed",
        "pass: a sequence cut in two, packed behind one at the highest positions, gets the logits that it gets alone",
        "a sequence's logits change by {error:.1e} with what is packed beside it or with how it is cut into chunks",
    ),
}


def refuse(need: str, module: Any, **facts: object) -> NoReturn:
    """Raise the sentence of a need that does not hold.

    Args:
        need: key of NEEDS.
        module: the model, or the name of its architecture.
        facts: what fills the braces of the sentence.
    """
    name = module if isinstance(module, str) else type(module).__name__
    raise ModelLoadError(f"{name} is not served: {NEEDS[need].reason.format(**facts)}")
