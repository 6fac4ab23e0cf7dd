"""What a model must be to be served: each line of the table of needs, broken once by a real family or by a planted fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils
from transformers.models.llama import modeling_llama

from streamkv.attention import LayerSpec
from streamkv.errors import ModelLoadError
from streamkv.runner.arch_needs import NEEDS
from streamkv.runner.architecture import attention_implementation, check_architecture, max_positions, pin_rope, probe_layers
from streamkv.runner.hook import register
from tests.runner.families import COMMON, FAMILIES, MORE, WINDOW, Family, spread_weights
from tests.runner.models_page import PAGE, page
from tests.runner.refusals import BY_CONFIG, BY_PROBE, sentence_of

CPU = torch.device("cpu")


def load(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A module as the loader makes it, not yet probed."""
    register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention_implementation(config))
    spread_weights(module, 1)
    return module.eval()


def probe(config: Any, dtype: torch.dtype = torch.float32) -> tuple[LayerSpec, ...]:
    module = load(config, dtype)
    pin_rope(module, config, None)
    return probe_layers(module, config, CPU)


def refusal(need: str) -> re.Pattern[str]:
    """What the sentence of a need looks like, whatever fills its braces."""
    reason = re.sub(r"\\\{.*?\\\}", ".+", re.escape(NEEDS[need].reason))
    return re.compile(rf"^\w+ is not served: {reason}$")


@pytest.mark.parametrize("architecture", BY_CONFIG)
def test_refused_by_its_configuration(architecture: str) -> None:
    sentence = sentence_of(architecture)
    assert refusal(BY_CONFIG[architecture][2]).match(sentence), sentence
    assert sentence.startswith(architecture)
    assert "\n" not in sentence


@pytest.mark.parametrize("architecture", BY_PROBE)
def test_refused_by_the_probe(architecture: str) -> None:
    model_type, settings, need, _ = BY_PROBE[architecture]
    config = AutoConfig.for_model(model_type, **(COMMON | settings), architectures=[architecture])
    assert check_architecture(config) == architecture
    with pytest.raises(ModelLoadError, match=refusal(need)) as raised:
        probe(config)
    assert raised.value.message.startswith(architecture)


class Planted:
    """A tiny Llama with something wrong in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.config = FAMILIES["Llama"].config()
        self.config.attention_chunk_size = 5

    def attention(self, change: Callable[..., tuple[Any, ...]]) -> None:
        """Between the layers and the interface: (module, q, k, v, mask, kwargs) -> the same, changed."""
        real = modeling_llama.ALL_ATTENTION_FUNCTIONS

        class Between:
            def get_interface(self, name: str, default: Any) -> Callable[..., Any]:
                def call(*tensors: Any, **kwargs: Any) -> Any:
                    *tensors, kwargs = change(*tensors, kwargs)
                    return real.get_interface(name, default)(*tensors, **kwargs)

                return call

        self.patch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Between())

    def masks(self, make: Callable[..., Any]) -> None:
        self.patch.setattr(modeling_llama, "create_causal_mask", make)

    def mlp(self, change: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        """After the feed-forward part of each layer: (its config, output) -> output."""
        real = modeling_llama.LlamaMLP.forward
        self.patch.setattr(modeling_llama.LlamaMLP, "forward", lambda mlp, x: change(mlp.config, real(mlp, x)))

    def arguments(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Of the whole model's forward pass."""
        real = modeling_llama.LlamaForCausalLM.forward

        def forward(model: Any, *, position_ids: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
            kwargs |= {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
            change(kwargs)
            return real(model, **kwargs)

        self.patch.setattr(modeling_llama.LlamaForCausalLM, "forward", forward)


def another_argument(planted: Planted) -> None:
    bias = torch.zeros(1)
    planted.attention(lambda *given: (*given[:-1], given[-1] | {"position_bias": bias}))


def keys_of_the_first_layer(planted: Planted) -> None:
    first: list[Any] = []

    def share(module: Any, query: Any, key: Any, value: Any, mask: Any, kwargs: Any) -> tuple[Any, ...]:
        if module.layer_idx == 0:
            first[:] = [key]
        return module, query, first[0], value, mask, kwargs

    planted.attention(share)


def chunked_mask(planted: Planted) -> None:
    planted.masks(masking_utils.create_chunked_causal_mask)


def window_that_the_layers_do_not_know(planted: Planted) -> None:
    """No fault: the mask is what the model's own attention obeys."""
    planted.config.sliding_window = WINDOW
    planted.masks(masking_utils.create_sliding_window_causal_mask)


def mask_by_token(planted: Planted) -> None:
    real = masking_utils.create_causal_mask
    together = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, -1]])
    planted.masks(lambda **kwargs: real(**(kwargs | {"block_sequence_ids": together[:, : kwargs["inputs_embeds"].shape[1]]})))


def cut_mask(planted: Planted) -> None:
    real = masking_utils.create_causal_mask
    planted.masks(lambda **kwargs: None if (mask := real(**kwargs)) is None else mask[..., :])


def window_of_nothing(planted: Planted) -> None:
    planted.config.sliding_window = 0
    planted.masks(masking_utils.create_sliding_window_causal_mask)


def bias_in_the_eager_function(planted: Planted) -> None:
    real = modeling_llama.eager_attention_forward

    def alibi(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        slope = 0.01 * torch.arange(key.shape[2])
        return real(module, query, key, value, mask + slope, **kwargs)

    planted.patch.setattr(modeling_llama, "eager_attention_forward", alibi)


def another_path_for_eager(planted: Planted) -> None:
    planted.mlp(lambda config, x: x * (1.01 if config._attn_implementation == "eager" else 1.0))


def token_shift(planted: Planted) -> None:
    """The shortest recurrent state: each token adds a little of the one before it."""
    planted.mlp(lambda _, x: x + 0.01 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


def mean_over_the_batch(planted: Planted) -> None:
    planted.mlp(lambda _, x: x - 0.01 * x.mean(dim=(0, 1)))


def positions_of_its_own(planted: Planted) -> None:
    planted.arguments(lambda kwargs: kwargs.update(position_ids=torch.arange(kwargs["input_ids"].shape[1])[None]))


def all_logits(planted: Planted) -> None:
    planted.arguments(lambda kwargs: kwargs.update(logits_to_keep=0))


def no_positions(planted: Planted) -> None:
    planted.patch.setattr(modeling_llama.LlamaForCausalLM, "forward", lambda _, input_ids: input_ids)


PLANTED: dict[str, tuple[Callable[[Planted], None], str]] = {
    "an argument that nobody knows": (another_argument, "arguments"),
    "keys of another layer": (keys_of_the_first_layer, "own_kv"),
    "chunked attention": (chunked_mask, "mask"),
    "a mask by token": (mask_by_token, "mask"),
    "a mask that was cut": (cut_mask, "mask"),
    "a window of nothing": (window_of_nothing, "mask"),
    "ALiBi in its own attention": (bias_in_the_eager_function, "equation"),
    "another path for eager": (another_path_for_eager, "alone"),
    "a token shift": (token_shift, "isolated"),
    "a mean over the batch": (mean_over_the_batch, "isolated"),
    "positions of its own": (positions_of_its_own, "isolated"),
    "logits of all tokens": (all_logits, "runs"),
    "no positions": (no_positions, "runs"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = Planted(monkeypatch)
    plant, need = PLANTED[fault]
    plant(planted)
    with pytest.raises(ModelLoadError, match=refusal(need)):
        probe(planted.config)


def test_a_window_is_read_from_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = Planted(monkeypatch)
    assert {layer.window for layer in probe(planted.config)} == {None}
    window_that_the_layers_do_not_know(planted)
    assert {layer.window for layer in probe(planted.config)} == {WINDOW}


def test_a_window_as_long_as_the_longest_sequence_is_none() -> None:
    family = FAMILIES["Mistral"]
    for window, seen in ((255, 255), (256, None), (4096, None)):
        layers = probe(Family(family.model_type, family.settings | {"sliding_window": window}).config())
        assert {layer.window for layer in layers} == {seen}


def test_rope_that_follows_the_batch_is_refused_for_longer_requests_only() -> None:
    config = FAMILIES["Llama, rope dynamic"].config()
    pin_rope(load(config), config, 256)
    with pytest.raises(ModelLoadError, match=refusal("rope")):
        pin_rope(load(config), config, 257)


def test_a_model_without_a_longest_sequence_is_refused() -> None:
    assert max_positions(AutoConfig.for_model("llama", max_position_embeddings=256)) == 256
    assert max_positions(AutoConfig.for_model("gpt2", n_positions=77)) == 77
    with pytest.raises(ModelLoadError, match=refusal("length")):
        max_positions(AutoConfig.for_model("mamba", architectures=["MambaForCausalLM"]))


def test_every_need_is_broken_by_a_test() -> None:
    broken = {need for *_, need in (*BY_CONFIG.values(), *PLANTED.values())} | {need for _, _, need, _ in BY_PROBE.values()}
    broken |= {"rope", "length"}
    assert broken == set(NEEDS)


@pytest.mark.parametrize("name", FAMILIES | MORE)
def test_families_pass_the_probe_in_16_bits(name: str) -> None:
    assert probe((FAMILIES | MORE)[name].config(), torch.bfloat16)


def test_the_page_is_generated() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.runner.models_page"
