"""Llama 4 weighs what goes into its experts. vLLM's kernels differ in what they do about that, and
most weigh a token twice; the plugin's method gives each of them the same tokens, weighed once.

Each of ``KERNELS`` does what was read in vLLM 0.32, in plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_nvfp4_moe.backends import vllm_kernels
from vllm_nvfp4_moe.backends.vllm_kernels import VllmKernelsMethod

TOKENS, HIDDEN, INNER, EXPERTS = 5, 8, 6, 3
Weights = torch.Tensor


def expert(x: torch.Tensor, w13: Weights, w2: Weights, middle: Any = 1.0) -> torch.Tensor:
    """One token's expert; ``middle`` multiplies the first product."""
    gate, up = ((w13 @ x) * middle).chunk(2)
    return w2 @ (torch.nn.functional.silu(gate) * up)


def marlin(x: torch.Tensor, w13: Weights, w2: Weights, weight: Any, flag: bool) -> torch.Tensor:
    """``mul_topk_weights`` of its first or its second product (``marlin_moe.py:147`` and 211)."""
    return expert(x, w13, w2, weight if flag else 1.0) * (1.0 if flag else weight)


def cutlass(x: torch.Tensor, w13: Weights, w2: Weights, weight: Any, flag: bool) -> torch.Tensor:
    """``a.mul_`` (``cutlass_moe.py:609``), or the output (:686)."""
    return expert(x * weight, w13, w2) if flag else expert(x, w13, w2) * weight


def emulation(x: torch.Tensor, w13: Weights, w2: Weights, weight: Any, flag: bool) -> torch.Tensor:
    """The output, unless it is for the input (``nvfp4_emulation_moe.py:537``)."""
    return expert(x, w13, w2) * (1.0 if flag else weight)


def flashinfer(x: torch.Tensor, w13: Weights, w2: Weights, weight: Any, _: bool) -> torch.Tensor:
    """The output in any case (``flashinfer_cutlass_moe.py:368``)."""
    return expert(x, w13, w2) * weight


def humming(x: torch.Tensor, w13: Weights, w2: Weights, weight: Any, flag: bool) -> torch.Tensor:
    """``fused_humming_moe.py:787``."""
    assert not flag
    return expert(x, w13, w2) * weight


KERNELS = (marlin, cutlass, emulation, flashinfer, humming)


class Kernel:
    """vLLM's modular kernel: it weighs the input, and then calls the experts
    (``prepare_finalize/no_dp_ep.py:73``)."""

    is_monolithic = False

    def __init__(self, experts: Callable[..., torch.Tensor]) -> None:
        self.experts = experts
        self.shared: Any = None

    def apply(
        self, x: torch.Tensor, w13: Weights, w2: Weights, weights: Weights, ids: torch.Tensor, *,
        apply_router_weight_on_input: bool, shared_experts_input: Any, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        self.shared = shared_experts_input
        flag = apply_router_weight_on_input
        x = x * weights if flag else x
        return torch.stack([
            self.experts(x[t], w13[e], w2[e], weights[t, 0], flag) for t, e in enumerate(ids[:, 0])
        ])  # fmt: skip


@pytest.mark.parametrize("on_input", [True, False])
@pytest.mark.parametrize("experts", KERNELS)
def test_a_token_is_weighed_once(experts: Callable[..., torch.Tensor], on_input: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator)
    w2 = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator)
    weights = torch.rand(TOKENS, 1, generator=generator)
    ids = torch.randint(EXPERTS, (TOKENS, 1), generator=generator)
    layer = SimpleNamespace(
        w13_weight=w13, w2_weight=w2, activation=None, global_num_experts=EXPERTS,
        expert_map=None, apply_router_weight_on_input=on_input,
    )  # fmt: skip
    method: Any = object.__new__(VllmKernelsMethod)
    method.moe_kernel = Kernel(experts)
    before = x.clone(), weights.clone()
    out = method.apply(layer, x, weights, ids, None, x)
    one = torch.ones(())
    truth = torch.stack([
        expert(x[t] * (weights[t] if on_input else one), w13[e], w2[e])
        * (one if on_input else weights[t])
        for t, e in enumerate(ids[:, 0])
    ])  # fmt: skip
    torch.testing.assert_close(out, truth)
    assert torch.equal(x, before[0]) and torch.equal(weights, before[1])
    assert method.moe_kernel.shared is x  # shared experts' tokens are not weighed


def test_of_several_experts_a_token_has_no_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_kernels.current_platform, "is_cpu", lambda: False)
    layer: Any = SimpleNamespace(
        moe_config=SimpleNamespace(has_bias=False), apply_router_weight_on_input=True, top_k=2
    )
    reason = VllmKernelsMethod.unsupported(layer)
    assert reason == "the router's weights are for the input, and a token has several experts"
    layer.top_k = 1
    assert VllmKernelsMethod.unsupported(layer) is None
