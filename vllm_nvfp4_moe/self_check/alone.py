"""Runs one layer's kernel and router while the model is still being loaded, without other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.v1.worker import workspace

from vllm_nvfp4_moe.quirks import runner_of

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.interface import ExpertsBackend


def route(
    layer: RoutedExperts, x: torch.Tensor, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Router logits for kernels that route by themselves, and what vLLM's router makes of them.

    Such kernels get the logits alone, and are to choose like vLLM's router. Of four tokens one has
    negative logits only, one has equal ones for all that are chosen and for all others, and one
    both. Where the choice would hang on a rounding, a token gets others instead.

    Args:
        x: ``[tokens, hidden]``, on the layer's device.
        chosen: int ``[tokens, k]``, the global numbers of the experts that get the largest logits.

    Returns:
        logits float32 ``[tokens, experts]``, as vLLM would hand them to the kernel; the router's
        weights float32 ``[tokens, k]`` and its choice of experts ``[tokens, k]``. All are on x's
        device.

    Raises:
        NotImplementedError: if the router does not look at logits.
    """
    random = torch.Generator().manual_seed(1)
    chosen = chosen.long().cpu()
    plain = torch.randn(len(chosen), layer.global_num_experts, generator=random)
    plain.scatter_(1, chosen, 4 + torch.rand(chosen.shape, generator=random))
    tied = torch.zeros_like(plain).scatter_(1, chosen, 4.0)
    token = torch.arange(len(chosen)).unsqueeze(1)
    logits = torch.where(token % 4 >= 2, tied, plain) - 12.0 * (token % 2)
    noise = torch.randn(2, *plain.shape, generator=random) * 0.02
    router = runner_of(layer).router
    if router.routing_method_type == RoutingMethodType.Simulated:
        raise NotImplementedError("experts are chosen at random, as is asked for")

    def choose(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return router.select_experts(hidden_states=x, router_logits=logits.to(x.device))

    first, *others = (choose(each)[1].sort(1).values.cpu() for each in (logits, *(logits + noise)))
    certain = torch.stack([(first == other).all(1) for other in others]).all(0)
    logits = torch.where(certain.unsqueeze(1), logits, plain).to(x.device)
    weights, ids = choose(logits)
    # Since 0.33 a router may have the kernel see other logits than it sees itself.
    prepare = getattr(router, "prepare_monolithic_logits", lambda logits: logits)
    return prepare(logits), weights.float(), ids


def run_alone(
    layer: RoutedExperts,
    method: ExpertsBackend,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor | None,
) -> torch.Tensor:
    """What ``method``'s kernel computes: ``[tokens, hidden]``, perhaps with padded columns.

    Where vLLM's kernel would exchange tokens with other ranks, it runs between the steps that vLLM
    uses for one rank.

    Args:
        x: ``[tokens, hidden]``, without padding.
        weights, ids: the router's, ``[tokens, k]``.
        logits: for a kernel that routes by itself, instead of ``weights`` and ``ids``.

    Raises:
        NotImplementedError: if the kernel cannot run so.
    """
    # vLLM's runner pads so too, for kernels that need other sizes.
    x = torch.nn.functional.pad(x, (0, layer.moe_config.hidden_dim - x.shape[1]))
    # Humming asks for the forward context, which vLLM does not set while it loads. It is not set
    # here by vLLM's set_forward_context: with data parallelism that waits for the other ranks.
    context = create_forward_context(None, get_current_vllm_config())
    kernel = method.moe_kernel
    try:
        if kernel is not None:
            method.moe_kernel = _for_one_rank(kernel)
        with override_forward_context(context), _workspace_of_its_own():
            if method.is_monolithic:
                return method.apply_monolithic(layer, x, logits)
            return method.apply(layer, x, weights, ids, None, None)
    finally:
        method.moe_kernel = kernel


@contextmanager
def _workspace_of_its_own() -> Iterator[None]:
    """Within, vLLM's workspace is another one, which is dropped afterwards.

    What kernels keep there for good, Marlin's locks for example, is allocated when it is first
    needed. While a model is being loaded that is memory of its weights, which level 2 of vLLM's
    sleep mode discards; locks that are not zero after that would hold a kernel up for ever.
    """
    engines = workspace._manager
    if engines is not None:
        device, ubatches, lanes = engines._device, engines._num_ubatches, engines._num_lanes
        workspace._manager = workspace.WorkspaceManager(device, ubatches, lanes)
    try:
        yield
    finally:
        workspace._manager = engines


def _for_one_rank(kernel: Any) -> Any:
    from vllm.model_executor.layers.fused_moe import modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.prepare_finalize import no_dp_ep, passthrough

    modular = no_dp_ep.MoEPrepareAndFinalizeNoDPEPModular
    monolithic = no_dp_ep.MoEPrepareAndFinalizeNoDPEPMonolithic
    steps = kernel.prepare_finalize
    if type(steps) in (modular, monolithic):  # other classes derive from these two
        return kernel
    standard = steps.activation_format == mk.FusedMoEActivationFormat.Standard
    if not standard or type(steps).__module__ == passthrough.__name__:
        raise NotImplementedError(
            f"with {type(steps).__name__}, the kernel works on tokens of all ranks together"
        )
    alone = monolithic() if kernel.is_monolithic else modular()
    return mk.FusedMoEKernel(alone, kernel.fused_experts)
