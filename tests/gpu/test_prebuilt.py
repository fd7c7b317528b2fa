"""Kernels that ``python -m vllm_nvfp4_moe.build`` has made serve a GPU without a compiler."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.plugin.test_jit import as_nobody
from vllm_nvfp4_moe import build, settings

CODE = """
from itertools import product
import torch
from quantize.native import jit
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS
from vllm_nvfp4_moe.kernels.hopper.source import FORMS
def nobody():
    raise jit.KernelError("a compiler was looked for")
jit.nvcc = nobody
for kernel, form in product(KERNELS.values(), FORMS):
    kernel.library(torch.cuda.current_device(), form)
print("all", len(KERNELS) * len(FORMS))
"""


def test_all_of_them_as_another_user() -> None:
    """``library`` also compares structs and tile shapes, and asks CUDA for shared memory."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(place, "kernels")
        assert build.main(["--cuda", "--to", str(folder)]) == 0
        done = as_nobody(CODE, Path(place), f"{settings.CACHE}={folder}", "TMPDIR=/proc")
        assert done.stdout.splitlines()[-1:] == ["all 8"], done.stderr
