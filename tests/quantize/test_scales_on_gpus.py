"""The GPU's kernel for scale rules, on a CPU: what it computes, and that it compiles for an H200.

What it computes, Triton's interpreter says; the judge is the reference kernel. On a machine with a
GPU ``test_kernels`` runs it there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.nvfp4.format import BLOCK
from quantize.nvfp4.scales import RULES
from quantize.nvfp4.scales.mse import HIGHEST, LOWEST

pytest.importorskip("triton")


def test_it_gives_the_references_bits() -> None:
    """About 5 s."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.quantize.scales_in_triton"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 8
    assert all(found.values()), found


@pytest.mark.parametrize("rule", ["max", "mse"])
def test_it_compiles_for_an_h200_and_spills_nothing(rule: str, tmp_path: Path) -> None:
    from quantize.nvfp4.kernels import triton_gpu
    from tests.quantize.cross_compile import usage

    types = {"source": "*bf16", "global_scale": "*fp32", "packed": "*u8", "scales": "*u8",
             "sums": "*fp32", "blocks": "i32"}  # fmt: skip
    below, above, least = RULES[rule].reach or (0, 0, 0)
    constants = {"SIZE": BLOCK, "BELOW": below, "ABOVE": above, "LEAST": least, "LOWEST": LOWEST,
                 "HIGHEST": HIGHEST, "LANES": triton_gpu._LANES}  # fmt: skip
    got = usage(triton_gpu._encode, types, constants, tmp_path, num_warps=4, enable_fp_fusion=False)
    print(rule, got)
    assert got.spilled == 0
    assert got.registers <= 64  # a multiprocessor's 65,536 are then enough for 8 programs
