"""The CPU's kernel in C++ refuses what it would read wrong: experts, tensors, shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantize.experts.gates import Gate
from tests.plugin.cpu_kernels import EXPERTS, TOP_K, Case, kernel
from tests.plugin.test_layer import routing
from vllm_nvfp4_moe.kernels.cpu.kernel import Kernel

__all__ = ["kernel"]  # a fixture


def test_an_expert_that_there_is_not(kernel: Kernel) -> None:
    case = Case(16, 16)
    ids = torch.tensor([[0, EXPERTS]], dtype=torch.int32)
    numbers = [None, torch.arange(EXPERTS, dtype=torch.int32)]
    for expert_map in numbers:
        with pytest.raises(RuntimeError, match=f"an expert beyond the last of {EXPERTS}"):
            case.run(kernel, torch.zeros(1, 16), torch.ones(1, 2), ids, Gate("silu"), expert_map)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "w13",
            lambda t: t.mT.contiguous().mT,
            r"w13: uint8 \[5, 32, 8\] where uint8 \[5, 32, 8\] in C order",
        ),
        ("w13", lambda t: t[:, :16].contiguous(), r"\[5, 16, 8\] where uint8 \[5, 32, 8\]"),
        ("g2", lambda t: t.double(), r"w2_global: another dtype \[5\] where float32"),
        ("g13", lambda t: t[:2], r"\[2\] where float32 \[5\]"),
        ("s13", lambda t: t.view(torch.uint8), "where float8_e4m3fn"),
        (
            "s2",
            lambda t: t[:, :8].contiguous(),
            r"\[5, 8, 1\] where float8_e4m3fn \[5, 16, 1\]",
        ),
        ("w2", lambda t: t[:, :8].contiguous(), r"\[5, 8, 8\] where uint8 \[5, 16, 8\]"),
        ("b13", lambda t: t[:, :16].contiguous(), r"\[5, 16\] where float32 \[5, 32\]"),
        ("b2", lambda t: t[:1], r"\[1, 16\] where float32 \[5, 16\]"),
    ],
)
def test_what_is_not_as_the_loops_take_it(
    kernel: Kernel, name: str, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    case, (weights, ids) = Case(16, 16, biased=True), routing(1, EXPERTS, TOP_K)
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(RuntimeError, match=said):
        case.run(kernel, torch.zeros(1, 16), weights, ids, Gate("silu"))


def test_what_does_not_fit_the_weights(kernel: Kernel) -> None:
    case, (weights, ids) = Case(16, 16), routing(1, EXPERTS, TOP_K)
    x, silu = torch.zeros(1, 16), Gate("silu")
    with pytest.raises(RuntimeError, match=r"\[5, 32, 8\] where uint8 \[5, 32, 16\]"):
        case.run(kernel, torch.zeros(1, 32), weights, ids, silu)
    with pytest.raises(RuntimeError, match="int64"):
        case.run(kernel, x, weights, ids, silu, torch.arange(EXPERTS))
    with pytest.raises(RuntimeError, match=r"topk_ids: int32 \[1, 2\] where int32 \[2, 2\]"):
        case.run(kernel, torch.zeros(2, 16), weights, ids, silu)
    with pytest.raises(
        RuntimeError, match=r"topk_weights: float32 \[1, 1\] where float32 \[1, 2\]"
    ):
        case.run(kernel, x, weights[:, :1], ids, silu)
    with pytest.raises(RuntimeError, match=r"\[5, 32, 8\] where uint8 \[5, 16, 8\]"):
        case.run(kernel, x, weights, ids, Gate("relu2"))
    with pytest.raises(
        RuntimeError, match="rows of 24 and 16 columns are no whole number of blocks"
    ):
        case.run(kernel, torch.zeros(1, 24), weights, ids, silu)
