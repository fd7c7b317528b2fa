"""What could take the cost of rounded activations off, where the answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import activations
from tests.quantize import families


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cost_is_the_mean_square_of_what_the_loss_is_told() -> None:
    noise, gradient = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 1], [1, -1]])
    assert activations.cost(noise, gradient) == pytest.approx((9 + 1) / 2)


def test_scaling_helps_where_a_large_channel_does_not_matter() -> None:
    """One channel of a block takes its scale, and nobody looks at it."""
    x, gradient = normal(4096, 16), normal(4096, 16, seed=1)
    x[:, 3] *= 40
    gradient[:, 3] *= 1e-3
    plain = activations.cost(activations.rounded(x) - x, gradient)
    assert activations.cost(activations.scaled(x, gradient), gradient) < 0.1 * plain


def test_scaling_and_rotating_change_nothing_where_all_channels_are_alike() -> None:
    x, gradient = normal(8192, 64), normal(8192, 64, seed=1)
    plain = activations.cost(activations.rounded(x) - x, gradient)
    for lost in (activations.scaled(x, gradient), activations.rotated(x)):
        assert activations.cost(lost, gradient) == pytest.approx(plain, rel=0.1)


def test_the_best_weights_find_elsewhere_what_rounding_loses() -> None:
    """A channel too small for its block's scale, which a large one knows all about."""
    x, weight, gradient = normal(8192, 16), torch.zeros(8, 16), normal(8192, 8, seed=2)
    x[:, 0] *= 100
    x[:, 1] = 0.01 * x[:, 0]
    weight[:, 1] = 1
    plain, best = activations.best_weights(x, gradient, weight)
    assert best < 0.1 * plain
    even = activations.best_weights(normal(8192, 16), gradient, normal(8, 16, seed=1))
    assert even[1] == pytest.approx(even[0], rel=0.05)


def test_a_models_layers(tmp_path: Path) -> None:
    folder = families.save(
        families.build("qwen3_moe"), "qwen3_moe", families.LAYOUTS[0], tmp_path / "m"
    )
    rows = torch.randint(1, 60, (8, 64), generator=torch.Generator().manual_seed(0))
    found = activations.measure(folder, rows)
    assert sorted(found) == [0, 1]
    for remains in found.values():
        assert 0.003 < remains.noise < 0.02
        assert all(0.5 < each < 2 for each in remains[1:3])
    lines = list(activations.table(found))
    assert len(lines) == 4
    assert lines[2].startswith("| 0 | 0.0")
