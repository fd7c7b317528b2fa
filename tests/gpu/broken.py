"""Faults that are put into kernels on purpose, those of a GPU and the CPU's alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch

from vllm_nvfp4_moe.backends.cpu.method import CpuMethod
from vllm_nvfp4_moe.backends.hopper.method import HopperMethod
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS


class Patch(Protocol):
    """A pytest.MonkeyPatch, or what is like one."""

    def setattr(self, target: Any, name: str, value: Any) -> None: ...


class ForGood:
    """Puts nothing back: for a process that ends with its fault."""

    def setattr(self, target: Any, name: str, value: Any) -> None:
        setattr(target, name, value)


Break = Callable[[Patch], None]


def other_numbers(**numbers: float) -> Break:
    """The kernels are told another alpha, beta or limit."""
    others = {name.removeprefix("swiglu_"): number for name, number in numbers.items()}

    def change(patch: Patch) -> None:
        from vllm.model_executor.layers.quantization import modelopt

        make = modelopt.make_nvfp4_moe_quant_config

        def told(*, layer: Any, **more: Any) -> Any:
            before = {name: getattr(layer, name) for name in numbers}
            for name, number in numbers.items():
                setattr(layer, name, number)  # which Humming reads
            try:
                return make(layer=layer, **more | numbers)
            finally:
                for name, number in before.items():
                    setattr(layer, name, number)

        # The plugin's method inherits what calls it.
        patch.setattr(modelopt, "make_nvfp4_moe_quant_config", told)

        for kernels in KERNELS.values():
            run = kernels.run

            def run_with(
                x: Any,
                experts: Any,
                ids: Any,
                weights: Any,
                gate: Any,
                *,
                run: Any = run,
                **more: Any,
            ) -> Any:
                return run(x, experts, ids, weights, replace(gate, **others), **more)

            patch.setattr(kernels, "run", run_with)

        apply = CpuMethod.apply

        def apply_with(self: CpuMethod, *args: Any) -> torch.Tensor:
            right, self.gate = self.gate, replace(self.gate, **others)  # type: ignore[arg-type]
            try:
                return apply(self, *args)
            finally:
                self.gate = right

        patch.setattr(CpuMethod, "apply", apply_with)

    return change


def before_conversion(damage: Callable[[Any], None]) -> Break:
    """The conversion gets the weights wrong."""

    def change(patch: Patch) -> None:
        from vllm.model_executor.layers.quantization import modelopt

        from vllm_nvfp4_moe.backends import vllm_kernels

        convert = vllm_kernels.convert_to_nvfp4_moe_kernel_format

        def broken(*, layer: Any, **more: Any) -> Any:
            damage(layer)
            return convert(layer=layer, **more)

        for module in (modelopt, vllm_kernels):
            patch.setattr(module, "convert_to_nvfp4_moe_kernel_format", broken)

        for method in (HopperMethod, CpuMethod):

            def prepare_broken(self: Any, layer: Any, prepare: Any = method.prepare) -> None:
                damage(layer)
                prepare(self, layer)

            patch.setattr(method, "prepare", prepare_broken)

    return change


def swap_halves(layer: Any) -> None:
    for tensor in (layer.w13_weight.data, layer.w13_weight_scale.data.view(torch.uint8)):
        half = tensor.shape[1] // 2
        first = tensor[:, :half].clone()
        tensor[:, :half] = tensor[:, half:]
        tensor[:, half:] = first


def shift_scales(layer: Any) -> None:
    scales = layer.w2_weight_scale.data.view(torch.uint8)
    scales.copy_(scales.roll(1, 2))


ZEROED_EXPERT, ZEROED_ROW = 6, 77


def zero_a_scale(layer: Any) -> None:
    """The largest block scale of one row of one expert's w2."""
    scales = layer.w2_weight_scale.data[ZEROED_EXPERT, ZEROED_ROW]
    scales[int(scales.float().argmax())] = 0.0
