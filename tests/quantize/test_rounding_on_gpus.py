"""The rounding kernels for GPUs, on a CPU: what they compute, and that they compile for an H200.

What they compute, Triton's interpreter says; the judges are the loops in PyTorch and numba, and the
loss in float64. ``tests/gpu/test_rounding.py`` runs them on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.calibration.room import _share_out
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.rounding.kernels.launch import on

pytest.importorskip("triton")

KINDS = ["", "no input", "a column without input", "a row of zeros"]


@functools.cache
def found() -> dict[str, Any]:
    """Run all cases; about 20 s."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.quantize.rounding_in_triton"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("case", ["gptq, 10 x 160", *(f"gptq, {kind}" for kind in KINDS)])
def test_gptq_is_the_same(case: str) -> None:
    """Blocks pass on what they lose as one product, which adds up in another order: a value between
    two codes may change all after it."""
    got = found()[case]
    want, loss = got["loss"]
    assert loss == pytest.approx(want, rel=1e-4)
    assert got["same values"] > 0.99
    assert got["same scales"] > 0.99


def test_the_descent_is_the_same_and_never_goes_up() -> None:
    want, got = found()["descent, 18 x 48"]["losses"]
    assert got == pytest.approx(want, rel=1e-4)
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(got))
    assert got[-1] < 0.95 * got[0]


def test_no_sweep_of_the_chains_goes_up_and_each_knows_its_gain() -> None:
    case = found()["two-sided, 11 x 48"]
    for before, after in itertools.pairwise(case["losses"]):
        for old, new, said in zip(before[0], *after, strict=True):
            assert new <= old * (1 + 1e-5)
            assert said == pytest.approx(new, abs=1e-4 * old)
    first, last = case["losses"][0][0], case["losses"][-1][0]
    assert all(new < 0.6 * old for old, new in zip(first, last, strict=True))
    # The steps come in another order, so they end elsewhere, but not at a larger loss.
    assert sum(last) < 1.15 * sum(case["one after another"])


SIZES = dict.fromkeys(("rows", "columns", "first", "blocks"), "i32")
HALF_SWEEP = dict.fromkeys(
    ("residual", "hessian", "inverse", "values", "changes"), "*fp32"
) | {"scales": "*u8"}  # fmt: skip
FLOATS = ["both", "outputs", "hessian", "values", "changes", "inner", "inverse", "feedback"]
KERNELS = {
    "gptq._panel": {"left": "*fp32", "factor": "*fp32", "lost": "*fp32", "codes": "*u8",
                    "scales": "*u8"} | SIZES,
    "descent._columns": HALF_SWEEP | SIZES,
    "descent._blocks": HALF_SWEEP | SIZES,
    "two_sided._panel": dict.fromkeys(FLOATS, "*fp32") | SIZES
    | {"bits": "*u8", "gains": "*fp64", "first_row": "i32", "count": "i32"},
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_each_compiles_for_an_h200_and_spills_nothing(name: str, tmp_path: Path) -> None:
    import importlib

    from tests.quantize.cross_compile import usage

    file, function = name.split(".")
    module = importlib.import_module(f"quantize.nvfp4.rounding.kernels.{file}")
    kernel = getattr(module, function)
    constants = {"PANEL": module.PANEL, "ROWS": module.ROWS, "LOWEST": module.LOWEST,
                 "HIGHEST": module.HIGHEST, "PASSES": 4}  # fmt: skip
    constants = {key: constants[key] for key in kernel.arg_names if key in constants}
    got = usage(
        kernel, KERNELS[name], constants, tmp_path,
        num_warps=module.WARPS, enable_fp_fusion=file != "gptq",
    )  # fmt: skip
    print(name, got)
    assert got.spilled == 0
    assert got.shared < 48 * 1024


def test_products_are_in_full_float32_whatever_the_caller_has_set() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with on(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("experts", [1, 7, 128])
def test_as_many_experts_wait_as_fit(experts: int) -> None:
    method = METHODS["two-sided"]
    found = [
        _share_out(experts, 6144, 3072, method, free) for free in (0, 2e10, 6e10, 1.1e11, 1e13)
    ]
    assert found == sorted(found)
    assert found[0] == 1
    assert found[-1] == experts
    if experts == 128:
        assert found[3] == 64  # on an H200
        # Rounds are equally large: no last one of a few chains, which takes as long.
        assert all(-(-128 // each) * each - 128 < -(-128 // each) for each in found)
