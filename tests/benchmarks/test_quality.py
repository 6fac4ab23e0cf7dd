"""What quantised weights may cost on the model in the box: the promise of docs/quantization.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("benchmarks.quality", reason="benchmarks are not there beside an installed wheel")

from benchmarks.quality import FORMATS, Reader, held_out, measure
from streamkv.backend_registry import load_backend
from streamkv.demo import model_path
from streamkv.errors import BackendError

if TYPE_CHECKING:
    from benchmarks.quality import Quality


@pytest.fixture(scope="module")
def readers() -> list[Reader]:
    try:
        load_backend("cpu")
    except BackendError as error:
        pytest.skip(str(error))
    return [Reader(model_path(), kind) for kind in FORMATS]


@pytest.fixture(scope="module")
def found(readers: Sequence[Reader]) -> list[Quality]:
    return measure(readers, held_out(12))


# Measured over 300 dialogues: perplexity 1.0000 × and 1.0020 ×, KL 6e-5 and 1.9e-3 nats, equal favourites 99.55 % and 98.15 %.
@pytest.mark.parametrize(
    ("name", "perplexity", "kl", "agreed"),
    [("bfloat16", 1.002, 1e-4, 0.99), ("int8", 1.005, 3e-4, 0.985), ("int4", 1.01, 5e-3, 0.965)],
)
def test_quantised_weights_predict_as_well(found: list[Quality], name: str, perplexity: float, kl: float, agreed: float) -> None:
    exact = found[0]
    own = found[[kind.name for kind in FORMATS].index(name)]
    assert exact.count == own.count > 2000
    assert own.perplexity <= perplexity * exact.perplexity
    assert 0 < own.kl / own.count <= kl
    assert own.agreed / own.count >= agreed


def test_fewer_bits_are_fewer_bytes(readers: Sequence[Reader]) -> None:
    exact, half, eight, four = (reader.num_bytes for reader in readers)
    embedding = 3072 * 256
    layers = exact // 4 - embedding  # tied: the head is no further weight, until it is packed
    assert half == 2 * (layers + 2 * embedding)
    assert 1.0 < (eight - 2 * embedding) / (layers + embedding) < 1.05
    assert 4.5 / 8 < (four - 2 * embedding) / (layers + embedding) < 0.6


class Fixed:
    """Predicts the same at every position."""

    def __init__(self, *probabilities: float) -> None:
        self._rows = torch.tensor(probabilities).log()

    def predict(self, token_ids: Sequence[int]) -> torch.Tensor:
        return self._rows.expand(len(token_ids), -1)


def test_figures_are_those_of_the_positions_that_count() -> None:
    readers: list[Reader] = [Fixed(0.5, 0.25, 0.25), Fixed(0.25, 0.5, 0.25)]  # type: ignore[list-item]  # a fake
    exact, other = measure(readers, iter([([2, 0, 1, 1], [True, True, False, True])]))
    assert (exact.count, exact.agreed, exact.kl) == (2, 2, 0.0)
    assert exact.perplexity == pytest.approx((0.5 * 0.25) ** -0.5)
    assert other.perplexity == pytest.approx((0.25 * 0.5) ** -0.5)
    assert other.agreed == 0
    assert other.kl / 2 == pytest.approx(0.25 * torch.tensor(2.0).log().item())
