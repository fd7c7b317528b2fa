"""The method of layers that a Hopper kernel runs: it packs their weights and builds vLLM's kernel.

After ``prepare`` a layer holds

* ``w13_weight``, ``w2_weight`` uint8 ``[experts, row tiles, units, bytes]``, codes and block scales
  together (``HopperKernel.pack_matrix``);
* ``w13_weight_scale_2``, ``w2_weight_scale_2`` float32 ``[experts]``, the global scales;
* ``w13_bias``, ``w2_bias`` float32 ``[experts, 64 * row tiles]``, in the order of the packed rows
  (``packed_biases``), if the experts have biases

and no input scales. All are parameters with an expert a row, which load balancing (EPLB) moves in
place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.utils import replace_parameter

from vllm_nvfp4_moe.backends.gpu import GpuMethod
from vllm_nvfp4_moe.backends.hopper import support
from vllm_nvfp4_moe.backends.hopper.experts import HopperExperts
from vllm_nvfp4_moe.kernels.hopper.bf16_weights import Rows, packed_biases
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.context import ModelContext
    from vllm_nvfp4_moe.kernels.hopper.launch import TileShape
    from vllm_nvfp4_moe.measured import Table
    from vllm_nvfp4_moe.method import NvFp4MoEMethod


class HopperMethod(GpuMethod):
    """Runs a layer's experts by the Hopper kernel that the user asks for.

    ``unsupported`` has built the kernel, so that no request waits for nvcc.
    """

    def __init__(self, context: ModelContext, layer: RoutedExperts, weight_only: bool) -> None:
        super().__init__(context, layer, weight_only)
        self.hopper_kernel = support.asked_kernel()

    @classmethod
    def unsupported(cls, layer: RoutedExperts) -> str | None:
        return support.unsupported(layer)

    @classmethod
    def kernel_names(cls) -> Iterable[str]:
        return [f"hopper {name}" for name in KERNELS]

    @classmethod
    def measured_best(
        cls, name: str, table: Table, context: ModelContext, layer: RoutedExperts, weight_only: bool
    ) -> NvFp4MoEMethod | None:
        # Activations in FP8 cost accuracy: users ask for them, and measurements do not.
        if name != f"hopper {support.asked()}":
            return None
        return super().measured_best(name, table, context, layer, weight_only)

    @classmethod
    def missed(cls, layer: RoutedExperts) -> str | None:
        if support.elsewhere() or support.declined(layer):
            return None
        return support.asked_kernel().name

    @property
    def kernel(self) -> str:
        return self.hopper_kernel.name

    @property
    def activation_bits(self) -> int:
        return self.hopper_kernel.activation_bits

    @property
    def rounds_weights(self) -> bool:
        return self.hopper_kernel.activation_bits < 16

    def every_kernel(self) -> Iterable[tuple[str, AbstractContextManager[None]]]:
        shapes = self.hopper_kernel.tile_shapes
        return [(f"tile shape {shape}", self._taking(shape)) for shape in shapes]

    @contextmanager
    def _taking(self, shape: TileShape) -> Iterator[None]:
        assert self.moe_kernel is not None
        experts = self.moe_kernel.fused_experts
        experts.tile_shape = shape
        try:
            yield
        finally:
            experts.tile_shape = None

    def prepare(self, layer: RoutedExperts) -> None:
        for prefix, rows in (
            ("w13", Rows.GATE_AND_UP if self.gate.gated else Rows.OF_ONE),
            ("w2", Rows.OF_ONE),
        ):
            # One matrix after the other, so that no more than one lies in memory twice.
            global_scales = getattr(layer, f"{prefix}_weight_scale_2").data
            packed, global_scales = self.hopper_kernel.pack_matrix(
                getattr(layer, f"{prefix}_weight").data,
                getattr(layer, f"{prefix}_weight_scale").data,
                # Gate's and up's are equal by now; without a gate there is one.
                global_scales[:, 0] if prefix == "w13" else global_scales,
                rows,
            )
            delattr(layer, f"{prefix}_weight_scale")
            replace_parameter(layer, f"{prefix}_weight", packed)
            replace_parameter(layer, f"{prefix}_weight_scale_2", global_scales)
            if self.moe.has_bias:
                biases = packed_biases(getattr(layer, f"{prefix}_bias").data, rows)
                replace_parameter(layer, f"{prefix}_bias", biases)
            if hasattr(layer, f"{prefix}_input_scale"):
                delattr(layer, f"{prefix}_input_scale")
            if not self.reloading:
                # What was freed is a little smaller than the next layer's packed matrix: PyTorch
                # would keep it and take as much again from the driver.
                torch.cuda.empty_cache()
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        steps = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
        )
        experts = HopperExperts(
            self.moe, self.moe_quant_config, layer, self.gate, self.hopper_kernel
        )
        self.moe_kernel = FusedMoEKernel(steps, experts)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make(quant_dtype=None, weight_dtype="nvfp4")
