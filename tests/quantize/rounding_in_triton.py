"""The rounding kernels under Triton's interpreter, against the loops in PyTorch: a program that
``test_rounding_on_gpus`` runs, since the interpreter must be chosen before Triton is imported.

It writes one JSON object: for each case, what was found.
"""

from __future__ import annotations

import json
from typing import Any

import torch

import quantize.nvfp4.rounding.descent as descent_module
import quantize.nvfp4.rounding.gptq as gptq_module
import quantize.nvfp4.rounding.two_sided as two_sided_module
from quantize.nvfp4 import format as nvfp4
from quantize.nvfp4.rounding.kernels import descent as kernel_descent
from quantize.nvfp4.rounding.kernels import gptq as kernel_gptq
from quantize.nvfp4.rounding.kernels import two_sided as kernel_two_sided
from tests.quantize import test_rounding, test_two_sided

Found = dict[str, Any]


def same_as_gptq(rows: int, columns: int, how: str = "") -> Found:
    weight, hessian, scale = test_rounding.case(rows, columns)
    if how == "no input":
        hessian.zero_()
    if how == "a column without input":
        hessian[5] = hessian[:, 5] = 0
        weight[:, 20] = 0
    if how == "a row of zeros":
        weight[3] = 0
    factor = gptq_module.compensation(hessian)
    left = weight / scale
    want, want_scale = gptq_module.round_columns(left.clone(), factor)
    got, got_scale = kernel_gptq.round_columns(left.clone(), factor)
    by = hessian if hessian.any() else torch.eye(columns)
    return {
        "same values": share(nvfp4.decode(nvfp4.pack(got)), nvfp4.decode(nvfp4.pack(want))),
        "same scales": share(got_scale.float(), want_scale.float()),
        "loss": [
            test_rounding.lost(weight, by, nvfp4.NvFp4(nvfp4.pack(codes), block_scale, scale))
            for codes, block_scale in ((want, want_scale), (got, got_scale))
        ],
    }


def same_as_descent(rows: int, columns: int) -> Found:
    """The losses after each half-sweep, of the loops in PyTorch and of the kernels."""
    weight, hessian, scale = test_rounding.case(rows, columns)
    packed, block_scale = gptq_module.gptq(weight, hessian, scale)
    hessian = gptq_module.damped(hessian, 1e-4)
    arguments = weight / scale, hessian, nvfp4.unpack(packed), block_scale.float()
    losses = []
    for kind in (descent_module.Descent, kernel_descent.Descent):
        state = kind(*(argument.clone() for argument in arguments))
        steps = [judged(state, weight / scale, hessian)]
        for step in (state.columns, state.blocks, state.columns):
            step()
            steps.append(judged(state, weight / scale, hessian))
        losses.append(steps)
    return {"losses": losses}


def judged(state: Any, target: torch.Tensor, hessian: torch.Tensor) -> float:
    block_scale = state.scales.to(torch.float8_e4m3fn)
    stored = nvfp4.NvFp4(nvfp4.pack(state.codes), block_scale, torch.ones(()))
    return test_rounding.lost(target, hessian, stored)


def beside_two_sided(rows: int, columns: int, weights: int) -> Found:
    """Of each weight, after each sweep: the true loss, and what the kernels say it is."""
    cases = [test_two_sided.case(rows, columns, seed) for seed in range(weights)]
    watched = [test_two_sided.Watched(of) for of in cases]
    chains = kernel_two_sided.Chains(weights, rows, columns, torch.device("cpu"))
    for number, (of, each) in enumerate(zip(cases, watched, strict=True)):
        packed, block_scale = gptq_module.gptq(of.weight, of.hessian, of.scale)
        chains.start(
            number,
            of.weight / of.scale,
            each.hessian,
            each.output_hessian,
            nvfp4.unpack(packed),
            block_scale,
            two_sided_module.blocks_of(each.hessian),
        )

    def now() -> list[list[float]]:
        true = []
        for number, each in enumerate(watched):
            codes, block_scale = chains.result(number)
            difference = test_two_sided.restored(nvfp4.pack(codes), block_scale) - each.target
            true.append(test_two_sided.trace(difference, each.hessian, each.output_hessian))
        return [true, chains.losses.tolist()]

    losses = [now()]
    for _ in range(2):
        chains.sweep()
        losses.append(now())
        for each in watched:
            each.state.sweep()
    return {"losses": losses, "one after another": [each.loss() for each in watched]}


def share(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got == want).double().mean())


# Small panels: the interpreter takes seconds for what a GPU does in microseconds.
SMALL = 32


def main() -> None:
    found: dict[str, Found] = {
        "gptq, 10 x 160": same_as_gptq(10, 160),
    }
    kernel_gptq.PANEL = kernel_descent.PANEL = kernel_two_sided.PANEL = SMALL
    kernel_two_sided.ROWS = 8
    for how in ("", "no input", "a column without input", "a row of zeros"):
        found[f"gptq, {how}"] = same_as_gptq(10 if how else 18, 48, how)
    found["descent, 18 x 48"] = same_as_descent(18, 48)
    found["two-sided, 11 x 48"] = beside_two_sided(11, 48, 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
