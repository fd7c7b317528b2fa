"""The rounding kernels on a GPU, against the loops on the host, by the loss in float64.

    pytest tests/gpu/test_rounding.py

The interpreter runs the same comparisons on a CPU at smaller sizes
(``tests/quantize/test_rounding_on_gpus.py``); here are true panels, and races if there are any.
"""

from __future__ import annotations

import pytest
import torch

from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.rounding.method import Job
from tests.quantize import test_rounding, test_two_sided

SIZES = [(33, 64), (64, 128), (200, 144), (384, 640)]


def on_gpu(*arguments: torch.Tensor) -> list[torch.Tensor]:
    return [argument.cuda() for argument in arguments]


@pytest.mark.parametrize("method", ["gptq", "descent"])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_losses_are_those_of_the_loops(method: str, rows: int, columns: int) -> None:
    weight, hessian, scale = test_rounding.case(rows, columns)
    want = test_rounding.found(method, (weight, hessian, scale))
    arguments = on_gpu(weight, hessian, scale)
    codes, block_scale = METHODS[method].round(*arguments)
    stored = test_rounding.nvfp4.NvFp4(codes.cpu(), block_scale.cpu(), scale)
    assert test_rounding.lost(weight, hessian, stored) == pytest.approx(want, rel=2e-3)
    again = METHODS[method].round(*arguments)
    assert torch.equal(codes, again[0])
    assert torch.equal(block_scale.view(torch.uint8), again[1].view(torch.uint8))


@pytest.mark.parametrize("count", [1, 3, 200])
@pytest.mark.parametrize(("rows", "columns"), [(33, 64), (96, 192)])
def test_chains_side_by_side_are_as_good_as_one_after_another(
    count: int, rows: int, columns: int
) -> None:
    cases = [test_two_sided.case(rows, columns, seed) for seed in range(min(count, 3))]
    together = METHODS["two-sided"].together
    assert together is not None
    jobs = (Job(*on_gpu(*cases[number % 3])) for number in range(count))
    results = together(jobs, count)
    got = []
    for of, (codes, block_scale) in zip(cases, results, strict=False):
        found = test_two_sided.restored(codes.cpu(), block_scale.cpu(), float(of.scale))
        difference = found - of.weight.double().numpy()
        got.append(test_two_sided.trace(difference, of.hessian, of.output_hessian))
    want = [test_two_sided.lost("two-sided", of) for of in cases]
    assert sum(got) < 1.05 * sum(want)
    # Equal weights have equal results, whichever program had them.
    for number in range(3, count):
        assert torch.equal(results[number][0], results[number % 3][0])


@pytest.mark.parametrize("method", METHODS)
def test_no_input_and_no_gradient(method: str) -> None:
    weight, hessian, scale = test_rounding.case(40, 144)
    hessian[5] = hessian[:, 5] = 0
    for inputs in (hessian, torch.zeros_like(hessian)):
        arguments = on_gpu(weight, inputs, scale, torch.zeros(40, 40))
        codes, block_scale = (each.cpu() for each in METHODS[method].round(*arguments))
        found = test_rounding.nvfp4.dequantize(codes, block_scale, scale)
        assert torch.isfinite(found).all()
        assert (found - weight).norm() < 0.5 * weight.norm()
