"""Rounding by inputs and by outputs' gradients, against the plain formula in float64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch

from quantize.nvfp4 import format as nvfp4
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.rounding.gptq import damped, gptq
from quantize.nvfp4.rounding.loss import loss
from quantize.nvfp4.rounding.method import Job
from quantize.nvfp4.rounding.panels import _round
from quantize.nvfp4.rounding.two_sided import (
    DAMPING,
    OUTPUT_DAMPING,
    SWEEPS,
    TwoSided,
    blocks_of,
    together,
    two_sided,
)
from tests.quantize import reference


class Case(NamedTuple):
    """The arguments of a method."""

    weight: torch.Tensor
    hessian: torch.Tensor
    scale: torch.Tensor
    output_hessian: torch.Tensor


def second_moments(size: int, generator: torch.Generator) -> torch.Tensor:
    """Of correlated samples, a few directions of which stand out."""
    mix = torch.randn(size, size, generator=generator) / size**0.5
    x = torch.randn(4 * size, size, generator=generator) @ (torch.eye(size) + mix)
    few = torch.randn(3, size, generator=generator)
    x += 2 * torch.randn(len(x), 3, generator=generator) @ few
    return x.T @ x / len(x)


def case(rows: int, columns: int, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    hessian = second_moments(columns, generator)
    return Case(weight, hessian, nvfp4.global_scale(weight), second_moments(rows, generator))


def trace(difference: np.ndarray, hessian: torch.Tensor, output_hessian: torch.Tensor) -> float:
    return float(
        np.einsum(
            "or,ri,ij,oj->",
            output_hessian.double().numpy(),
            difference,
            hessian.double().numpy(),
            difference,
            optimize=True,
        )
    )


def restored(codes: torch.Tensor, block_scale: torch.Tensor, scale: float = 1.0) -> np.ndarray:
    return reference.dequantize(codes.numpy(), block_scale.view(torch.uint8).numpy(), scale)


def lost(method: str, of: Case, by: Case | None = None) -> float:
    """What ``method`` makes of ``of``, by its own Hessians or by others."""
    codes, block_scale = METHODS[method].round(*of)
    found = restored(codes, block_scale, float(of.scale))
    by = by or of
    return trace(found - of.weight.double().numpy(), by.hessian, by.output_hessian)


class Watched:
    """A ``TwoSided`` that starts at GPTQ's result, as ``two_sided`` does, and its true loss."""

    def __init__(self, of: Case) -> None:
        packed, block_scale = gptq(of.weight, of.hessian, of.scale)
        self.hessian = damped(of.hessian, DAMPING)
        self.output_hessian = damped(of.output_hessian, OUTPUT_DAMPING)
        self.output_hessian /= self.output_hessian.diagonal().mean()
        target = of.weight / of.scale
        self.target = target.double().numpy()
        self.state = TwoSided(
            target, self.hessian, self.output_hessian, nvfp4.unpack(packed), block_scale
        )

    def difference(self) -> np.ndarray:
        return restored(nvfp4.pack(self.state.codes()), self.state.block_scale) - self.target

    def loss(self) -> float:
        return trace(self.difference(), self.hessian, self.output_hessian)


SHAPES = [(1, 64), (7, 16), (33, 48), (48, 192), (70, 96)]
"""Panels have 32 rows."""


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_no_sweep_goes_up_and_each_knows_its_gain(rows: int, columns: int, seed: int) -> None:
    watched = Watched(case(rows, columns, seed))
    before = watched.loss()
    assert watched.state.loss() == pytest.approx(before, rel=1e-3)
    for _ in range(SWEEPS):
        gain = watched.state.sweep()
        after = watched.loss()
        assert gain >= 0
        assert after <= before * (1 + 1e-5)
        assert before - after == pytest.approx(gain, abs=1e-4 * before)
        before = after


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rows", "columns"), [(33, 48), (48, 192), (70, 96)])
def test_it_is_closer_than_the_descent_where_outputs_are_not_alike(
    rows: int, columns: int, seed: int
) -> None:
    of = case(rows, columns, seed)
    assert lost("two-sided", of) < 0.6 * lost("descent", of)


def test_where_they_are_alike_it_is_as_good_as_the_descent() -> None:
    """By the damped Hessians, of which each has its own opinion; both end where they end by chance,
    so what counts is the mean."""
    ratios = []
    for seed, (rows, columns) in itertools.product(range(6), [(48, 192), (70, 96)]):
        of = case(rows, columns, seed)._replace(output_hessian=torch.eye(rows))
        by = of._replace(hessian=damped(of.hessian, DAMPING))
        ratios.append(lost("two-sided", of, by) / lost("descent", of, by))
    assert max(ratios) < 1.03
    assert np.mean(ratios) < 1.01


@pytest.mark.parametrize(
    "output_hessian", [torch.eye(48), 2.0**-60 * torch.eye(48), torch.zeros(48, 48)]
)
def test_no_output_hessian_is_the_identity(output_hessian: torch.Tensor) -> None:
    of = case(48, 96)
    got, want = two_sided(of.weight, of.hessian, of.scale, output_hessian), two_sided(*of[:3])
    assert (restored(*got) == restored(*want)).mean() > 0.95


@pytest.mark.parametrize("seed", range(3))
def test_at_the_end_no_other_code_and_no_other_scale_is_better(seed: int) -> None:
    """All 15 other codes of each weight; and each scale near a block's, with the same codes."""
    watched = Watched(case(9, 32, seed))
    while watched.state.sweep() > 0:
        pass
    difference, before = watched.difference(), watched.loss()
    codes, bits = watched.state.codes().numpy(), watched.state.block_scale.view(torch.uint8).numpy()
    steps = reference.E4M3[bits].repeat(16, 1)
    residual = (
        watched.output_hessian.double().numpy() @ difference @ watched.hessian.double().numpy()
    )

    def after(where: tuple[int, slice], change: np.ndarray) -> float:
        row, part = where
        own = change @ watched.hessian[part, part].double().numpy() @ change
        return before + 2 * change @ residual[where] + float(watched.output_hessian[row, row]) * own

    # A block's own part of the loss is not above the whole, of which 1e-5 count as rounding.
    least = before * (1 - 2e-5)
    for row, column in np.ndindex(*codes.shape):
        for code in range(16):
            change = reference.E2M1[code] - reference.E2M1[codes[row, column]]
            where = (row, slice(column, column + 1))
            assert after(where, np.array([change * steps[row, column]])) >= least
    for row, block in np.ndindex(*bits.shape):
        part = slice(16 * block, 16 * block + 16)
        for candidate in {max(1, bits[row, block] - 1), min(126, bits[row, block] + 1)}:
            other = reference.E4M3[candidate] - reference.E4M3[bits[row, block]]
            assert after((row, part), reference.E2M1[codes[row, part]] * other) >= least
    # What the above takes for granted.
    changed = difference.copy()
    changed[3, 5] += 0.25
    assert after((3, slice(5, 6)), np.array([0.25])) == pytest.approx(
        trace(changed, watched.hessian, watched.output_hessian)
    )


@pytest.mark.parametrize("seed", range(6))
def test_a_small_weight_is_near_the_best_of_all(seed: int) -> None:
    """Two rows, and three columns that have inputs: all pairs of rows, at the scales found."""
    of = case(2, 16, seed)
    of.hessian[3:] = of.hessian[:, 3:] = 0  # no code of the three changes what the others lose
    watched = Watched(of)
    while watched.state.sweep() > 0:
        pass
    hessian, output_hessian = watched.hessian[:3, :3], watched.output_hessian.double().numpy()
    steps = reference.E4M3[watched.state.block_scale.view(torch.uint8).numpy()]
    table = np.array(list(itertools.product(np.unique(reference.E2M1), repeat=3)))
    first, second = (steps[row] * table - watched.target[row, :3] for row in range(2))
    inner = hessian.double().numpy()
    best = (
        output_hessian[0, 0] * ((first @ inner) * first).sum(1)[:, None]
        + output_hessian[1, 1] * ((second @ inner) * second).sum(1)
        + 2 * output_hessian[0, 1] * (first @ inner @ second.T)
    ).min()
    got = trace(watched.difference()[:, :3], hessian, watched.output_hessian)
    assert best * (1 - 1e-6) <= got < 2 * best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rows", "columns"), [(70, 16), (70, 96)])
def test_panels_are_only_for_speed(rows: int, columns: int, seed: int) -> None:
    found = []
    for panel in (1, 32, 64):
        watched = Watched(case(rows, columns, seed))
        watched.state.sweep(panel)
        found.append((watched.loss(), watched.state.codes()))
    for value, codes in found[1:]:
        # A value between two codes, in one rounding or the other, may change all after it.
        assert value == pytest.approx(found[0][0], rel=0.01)
        assert (codes == found[0][1]).double().mean() > 0.9


@pytest.mark.parametrize("seed", range(5))
def test_errors_in_a_block_are_made_up_for(seed: int) -> None:
    """A column's ideal is the least squares solution, given those before it."""
    generator = torch.Generator().manual_seed(seed)
    hessian = damped(second_moments(16, generator), DAMPING)
    ideal, step = torch.randn(16, generator=generator).numpy(), np.float32(0.5)
    feedback = blocks_of(hessian)[2][0].numpy()
    trial, rest = np.empty(16, np.float32), np.empty(16, np.float32)
    assert _round(ideal, feedback, step, np.float32(np.inf), trial, rest)

    inner, want = hessian.double().numpy(), np.zeros(16)
    for j in range(16):
        error = want[:j] - ideal[:j]
        best = ideal[j:] - np.linalg.solve(inner[j:, j:], inner[j:, :j] @ error)
        want[j] = reference.E2M1[reference.nearest_e2m1(best[:1] / step)[0]] * step
    np.testing.assert_array_equal(trial, want)
    error = np.float32((want - ideal) @ inner @ (want - ideal))
    assert _round(ideal, feedback, step, error * np.float32(1.001), trial, rest)
    assert not _round(ideal, feedback, step, error * np.float32(0.999), trial, rest)


def test_the_result_is_an_nvfp4_weight() -> None:
    of = case(33, 64)
    codes, block_scale = two_sided(*of)
    assert codes.dtype == torch.uint8
    assert codes.shape == (33, 32)
    assert block_scale.dtype == torch.float8_e4m3fn
    assert block_scale.shape == (33, 4)
    assert set(np.unique(block_scale.view(torch.uint8).numpy())) <= set(reference.POSITIVE_E4M3)
    own = nvfp4.dequantize(codes, block_scale, of.scale).double().numpy()
    np.testing.assert_allclose(restored(codes, block_scale, float(of.scale)), own, rtol=1e-6)


def test_arguments_are_left_as_they_are() -> None:
    of = case(9, 32)
    before = [argument.clone() for argument in of]
    two_sided(*of)
    assert all(torch.equal(*pair) for pair in zip(of, before, strict=True))


def test_any_multiple_and_any_order_in_memory_will_do() -> None:
    of = case(16, 48)
    want = two_sided(*of)
    other = Case(
        of.weight.T.contiguous().T,
        of.hessian.T,
        of.scale,
        (of.output_hessian * 2.0**-60).T.contiguous(),
    )
    got = two_sided(*other)
    assert lost("two-sided", other) * 2.0**60 == pytest.approx(lost("two-sided", of), rel=0.02)
    assert (restored(*got) == restored(*want)).mean() > 0.9


@pytest.mark.parametrize("dead", ["outputs", "inputs", "both", "all outputs", "all inputs"])
def test_what_has_no_gradient_or_no_input_is_rounded_all_the_same(dead: str) -> None:
    of = case(12, 48)
    if dead in ("outputs", "both"):
        of.output_hessian[3] = of.output_hessian[:, 3] = 0
    if dead in ("inputs", "both"):
        of.hessian[5] = of.hessian[:, 5] = 0
        of.hessian[16:32] = of.hessian[:, 16:32] = 0
    if dead == "all outputs":
        of.output_hessian.zero_()
    if dead == "all inputs":
        of.hessian.zero_()
    codes, block_scale = two_sided(*of)
    assert nvfp4.bad_scales(block_scale) is None
    difference = restored(codes, block_scale, float(of.scale)) - of.weight.numpy()
    assert np.isfinite(difference).all()
    assert np.linalg.norm(difference) < np.linalg.norm(of.weight.numpy())


def test_a_weight_of_zeros_stays_one() -> None:
    of = case(8, 32)
    zeros = torch.zeros_like(of.weight)
    codes, block_scale = two_sided(zeros, of.hessian, nvfp4.global_scale(zeros), of.output_hessian)
    assert nvfp4.bad_scales(block_scale) is None
    assert not restored(codes, block_scale).any()


def test_the_registry_says_who_looks_at_outputs() -> None:
    of = case(16, 32)
    for name, method in METHODS.items():
        same = torch.equal(method.round(*of)[0], method.round(*of[:3])[0])
        assert same == (not METHODS[name].needs_output_hessian)
    assert any(method.needs_output_hessian for method in METHODS.values())


def test_loss_is_the_mean_product_with_the_gradient() -> None:
    of = case(8, 32)
    generator = torch.Generator().manual_seed(1)
    x, g = torch.randn(60, 32, generator=generator), torch.randn(50, 8, generator=generator)
    every = g.double() @ of.weight.double() @ x.double().T
    got = loss(of.weight, x.T @ x / 60, g.T @ g / 50)
    assert got == pytest.approx(float(every.square().mean()), rel=1e-5)
    assert loss(of.weight, of.hessian, torch.eye(8)) == pytest.approx(loss(of.weight, of.hessian))


class _Chains:
    """What ``kernels.two_sided.Chains`` does on a GPU, by the loops on a CPU."""

    def __init__(self, count: int, *_: object) -> None:
        self._states: list[TwoSided] = []
        self.losses = torch.zeros(count, dtype=torch.float64)

    def start(self, number: int, *arguments: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        self._states.append(TwoSided(*arguments[:-1]))  # type: ignore[arg-type]
        self.losses[number] = self._states[-1].loss()

    def sweep(self) -> torch.Tensor:
        gains = torch.tensor([state.sweep() for state in self._states], dtype=torch.float64)
        self.losses -= gains
        return gains

    def result(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        state = self._states[number]
        return state.codes(), state.block_scale.clone()


def test_what_becomes_of_a_weight_does_not_depend_on_those_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some stop after fewer sweeps than others."""
    pytest.importorskip("triton")
    monkeypatch.setattr("quantize.nvfp4.rounding.kernels.two_sided.Chains", _Chains)
    monkeypatch.setattr("quantize.nvfp4.rounding.two_sided._ENOUGH", 1e-2)
    jobs = [Job(*case(48, 96, seed)) for seed in range(6)]
    alone = [together([job], 1)[0] for job in jobs]
    for beside in (jobs, jobs[2:]):
        for (codes, scales), want in zip(
            together(beside, len(beside)), alone[-len(beside) :], strict=True
        ):
            assert torch.equal(codes, want[0])
            assert torch.equal(scales.view(torch.uint8), want[1].view(torch.uint8))
