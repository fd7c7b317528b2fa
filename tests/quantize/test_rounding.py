"""Rounding by what inputs are, against textbook formulas in float64."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.nvfp4 import format as nvfp4
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.rounding.blocks import codes_of
from quantize.nvfp4.rounding.descent import Descent
from quantize.nvfp4.rounding.gptq import DAMPING, compensation, damped, gptq
from quantize.nvfp4.rounding.loss import loss
from tests.quantize.plain import plainly

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def case(rows: int, columns: int, seed: int = 0, correlation: float = 1.0) -> Case:
    """Weights, second moments of 4 * columns random inputs, global scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator)
    x = x @ (torch.eye(columns) + correlation * mix)
    return weight, x.T @ x / len(x), nvfp4.global_scale(weight)


def lost(weight: torch.Tensor, hessian: torch.Tensor, stored: nvfp4.NvFp4) -> float:
    """Mean squared error of the output, in float64."""
    difference = stored.dequantize().double() - weight.double()
    return float(torch.einsum("oi,ij,oj->", difference, hessian.double(), difference))


def found(method: str, case: Case) -> float:
    weight, hessian, scale = case
    codes, block_scale = METHODS[method].round(weight, hessian, scale)
    assert codes.dtype == torch.uint8
    assert block_scale.dtype == torch.float8_e4m3fn
    assert nvfp4.bad_scales(block_scale) is None
    return lost(weight, hessian, nvfp4.NvFp4(codes, block_scale, scale))


@pytest.mark.parametrize("method", METHODS)
def test_without_correlation_it_is_the_mse_rule(method: str) -> None:
    """Nothing can be made up for, and every column counts the same."""
    weight, _, scale = case(24, 64)
    codes, block_scale = METHODS[method].round(weight, torch.eye(64), scale)
    plain = plainly([weight], "mse")[0]
    stored = nvfp4.NvFp4(codes, block_scale, scale)
    assert torch.equal(block_scale.view(torch.uint8), plain.block_scale.view(torch.uint8))
    assert torch.equal(stored.dequantize(), plain.dequantize())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("correlation", [0.5, 1.0, 3.0])
def test_each_method_is_closer_than_those_before(seed: int, correlation: float) -> None:
    weight, hessian, scale = case(48, 192, seed, correlation)
    plain = lost(weight, hessian, plainly([weight], "mse")[0])
    first, second = (found(method, (weight, hessian, scale)) for method in ("gptq", "descent"))
    assert first < 0.9 * plain
    assert second < 0.95 * first


def test_gptq_is_optimal_brain_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    """With scales that are given: as OBQ does it (arXiv 2208.11580, equation 3), removing one row
    and column of the inverse after another."""
    weight, hessian, scale = case(12, 160)
    step = float(weight.abs().max() / scale / 5)
    step = float(torch.tensor(step).to(torch.float8_e4m3fn))
    module = sys.modules[gptq.__module__]  # the package has a function of its name
    monkeypatch.setattr(module, "best_scale", lambda block, _: torch.full((len(block),), step))
    codes, _ = gptq(weight, hessian, scale)
    got = nvfp4.decode(codes).double() * step

    left = (weight.double() / scale.double()).clone()
    inverse = torch.linalg.inv(
        hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(160)
    )
    want = torch.empty_like(left)
    grid = torch.tensor([*nvfp4.E2M1_VALUES, *(-v for v in nvfp4.E2M1_VALUES)]).double() * step
    for column in range(160):
        now = left[:, column]
        want[:, column] = grid[(now.unsqueeze(1) - grid).abs().argmin(1)]
        share = (now - want[:, column]) / inverse[column, column]
        left -= torch.outer(share, inverse[column])
        row = inverse[column].clone()
        inverse -= torch.outer(row, row) / row[column]
    # A value between two codes, in one precision or the other, may change all after it.
    assert ((got == want).all(1)).double().mean() > 0.8


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.0, 4.0), st.sampled_from([16, 48, 80]))
def test_no_step_of_the_descent_goes_up(seed: int, correlation: float, columns: int) -> None:
    weight, hessian, scale = case(8, columns, seed, correlation)
    packed, block_scale = gptq(weight, hessian, scale)
    hessian = damped(hessian, 1e-4)
    state = Descent(weight / scale, hessian, nvfp4.unpack(packed), block_scale.float())

    def now() -> float:
        stored = nvfp4.NvFp4(
            nvfp4.pack(state.codes), state.scales.to(torch.float8_e4m3fn), torch.ones(())
        )
        return lost(weight / scale, hessian, stored)

    before = now()
    for step in (state.columns, state.blocks, state.columns, state.blocks):
        step()
        after = now()
        assert after <= before * (1 + 1e-4) + 1e-6
        before = after


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = case(8, 96, correlation=3.0)[1]
    inverse = torch.linalg.inv(damped(hessian, DAMPING).double())
    want = torch.linalg.cholesky(inverse, upper=True)
    torch.testing.assert_close(compensation(hessian).double(), want, rtol=1e-6, atol=1e-7)


def test_a_column_without_input_and_an_expert_without_tokens() -> None:
    weight, hessian, scale = case(8, 32)
    hessian[5] = hessian[:, 5] = 0
    for inputs in (hessian, torch.zeros(32, 32)):
        for method in METHODS.values():
            codes, block_scale = method.round(weight, inputs, scale, torch.zeros(8, 8))
            restored = nvfp4.dequantize(codes, block_scale, scale)
            assert torch.isfinite(restored).all()
            assert (restored - weight).norm() < 0.5 * weight.norm()


def test_codes_of_a_column_are_the_formats() -> None:
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    near = [torch.nextafter(middle, torch.tensor(to)) for to in (0.0, 9.0)]
    x = torch.cat((middle, *near, torch.tensor([0.0, 6.0, 1e30]), torch.rand(10**5) * 8))
    x = torch.cat((x, -x))
    assert torch.equal(codes_of(x), nvfp4.round_to_e2m1(x))


def test_loss_is_the_mean_squared_output() -> None:
    weight, _, _ = case(8, 32)
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    direct = float((x.double() @ weight.double().T).square().sum(1).mean())
    assert loss(weight, x.T @ x / 100) == pytest.approx(direct, rel=1e-5)
