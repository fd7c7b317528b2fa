"""Routing by one operator in C++.

vLLM's CPU router is a dozen of PyTorch's operations, three of which look for the highest of some
scores. For a few tokens of a small model they take as long as the experts do.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from quantize.native import environment
from quantize.native.jit import KernelError
from vllm_nvfp4_moe import quirks
from vllm_nvfp4_moe.kernels.cpu import operators

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts


def use_operator(layer: RoutedExperts) -> None:
    """Have ``layer``'s router compute by ``operators``, if that routes as it does, and can be had.

    Scores are float32. vLLM's router takes the softmax of few logits in their own dtype, and of
    scores that are equal takes any; the operator takes the first ones'.
    """
    router: Any = getattr(quirks.runner_of(layer), "router", None)
    if not _known(router) or not environment.cpp() or not _loaded():
        return
    # All else that a router does, such as the mapping to redundant experts, stays vLLM's.
    router._compute_routing = partial(_compute_routing, router)


@cache
def _loaded() -> bool:
    """Whether the operators can be had. Where they cannot, a compiler that fails has done so once,
    and not for each layer."""
    try:
        operators.load()
    except KernelError:  # forward.native says why
        return False
    return True


def _known(router: Any) -> bool:
    """Whether the operator routes as this router does."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    return (
        isinstance(router, CPURouter)
        and router.scoring_func in ("sigmoid", "softmax")
        and router.custom_routing_function is None
        and (router.num_expert_group == 1 if router.use_grouped_topk else _plain(router))
    )


def _plain(router: Any) -> bool:
    """Whether an ungrouped router is one that vLLM's takes: it passes over a bias."""
    return router.scoring_func == "softmax" and router.e_score_correction_bias is None


def _compute_routing(
    router: Any,
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    indices_type: torch.dtype | None,
    *,
    input_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``CPURouter._compute_routing``."""
    shape = router_logits.shape[0], router.top_k
    weights = torch.empty(shape, dtype=torch.float32, device=router_logits.device)
    ids = torch.empty(shape, dtype=torch.int32, device=router_logits.device)
    torch.ops.vllm_nvfp4_moe.route(
        weights,
        ids,
        router_logits.contiguous(),
        router.e_score_correction_bias,
        router.scoring_func == "sigmoid",
        router.renormalize,
        # vLLM's ungrouped softmax has no factor.
        router.routed_scaling_factor if router.use_grouped_topk else 1.0,
    )
    return weights, ids
