"""The fused-MoE method: what is common to all backends, from empty parameters to checked weights.

After loading, every layer holds, whatever the checkpoint's layout was:

* ``w13_weight`` uint8 ``[experts, 2 * intermediate, hidden / 2]``: all of gate, then all of up;
* ``w13_weight_scale`` float8_e4m3fn ``[experts, 2 * intermediate, hidden / 16]``;
* ``w13_weight_scale_2`` float32 ``[experts, 2]``, gate and up equal: the global scale, multiplying;
* ``w13_input_scale`` float32 ``[experts, 2]``: absent in weight-only checkpoints;
* the same with ``w2``, without the factor and the axis of two.

Those are the names that vLLM's ``modelopt_fp4`` uses, and that its kernel conversions expect.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import (
    FusedMoEMethodBase,
    FusedMoeWeightScaleSupported,
)
from vllm.model_executor.utils import set_weight_attrs

from quantize.nvfp4 import BLOCK
from vllm_nvfp4_moe import compat
from vllm_nvfp4_moe.checks import (
    BLOCK_SCALE,
    CODES,
    GLOBAL_SCALE,
    INPUT_SCALE,
    ExpertLoads,
    RefusedError,
    fold_global_scales,
)
from vllm_nvfp4_moe.loaders import Loader, QuantizingLoader

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.config import NvFp4MoEConfig

CANONICAL = ("weight", "weight_scale", "weight_scale_2", "input_scale")


class NvFp4MoEMethod(FusedMoEMethodBase):
    """Base of the backends' methods.

    Args:
        config: the checkpoint's quantization config.
        layer: already set to the contract's gate.
        weight_only: its experts come without input scales.
    """

    passed_over: Sequence[tuple[str, str]] = ()
    """Kernels that would have been preferred, each with the reason why not."""

    global_input_scales = False
    """Whether kernels want the input scales of all experts, not only this rank's."""

    def __init__(self, config: NvFp4MoEConfig, layer: RoutedExperts, weight_only: bool) -> None:
        super().__init__(layer.moe_config)
        self.config = config
        self.layout = config.format.layout
        self.weight_only = weight_only
        assert config.gates is not None  # backends.choose has applied it to the layer
        self.gate = config.gates.of(layer.layer_name)

    @classmethod
    @abstractmethod
    def unsupported(cls, layer: RoutedExperts) -> str | None:
        """Why this backend cannot run ``layer`` here, None if it can."""

    @classmethod
    def missed(cls, layer: RoutedExperts) -> str | None:
        """The kernel's name, where that it is ``unsupported`` is worth telling: it is made for
        this device, and nobody asked for another."""
        return None

    @property
    @abstractmethod
    def kernel(self) -> str:
        """Names the kernel, for messages."""

    @property
    def quantizes_activations(self) -> bool:
        """Whether the kernel rounds the GEMMs' inputs to NVFP4, by the input scales."""
        return False

    @property
    def activation_bits(self) -> int:
        """Of the GEMMs' inputs, as the kernel takes them."""
        return 4 if self.quantizes_activations else 16

    @property
    def rounds_weights(self) -> bool:
        """Whether the kernel multiplies by other numbers than the weights that the codes mean."""
        return False

    input_scales_by_expert = False
    """Whether the kernel takes each expert's own input scale; else the largest of all."""

    @abstractmethod
    def prepare(self, layer: RoutedExperts) -> None:
        """Turn checked weights (see the module's docstring) into what the kernels read."""

    def uses_weight_scale_2_pattern(self) -> bool:
        return True

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.num_experts = num_experts
        layer.params_dtype = params_dtype
        kinds: tuple[int, ...] = (CODES, BLOCK_SCALE, GLOBAL_SCALE)
        if not self.weight_only:
            kinds = (*kinds, INPUT_SCALE)
        load_format = get_current_vllm_config().load_config.load_format
        self._dummy = load_format == "dummy"
        on_the_fly = self.config.format.on_the_fly
        summary = self.config.summary
        summary.built()
        self.loads = ExpertLoads(
            layer,
            self.layout,
            (CODES,) if on_the_fly else kinds,
            self.global_input_scales,
            summary.begins,
        )
        loaders = {kind: Loader(self.loads, kind) for kind in kinds}
        quantizing = QuantizingLoader(self.loads, loaders) if on_the_fly else None

        padded = hidden_size != (extra_weight_attrs.get("unpadded_hidden_size") or hidden_size)
        inner = intermediate_size_per_partition
        for prefix, rows, columns in (("w13", 2 * inner, hidden_size), ("w2", hidden_size, inner)):
            per_expert: dict[int, tuple[tuple[int, ...], torch.dtype, str | None]] = {
                CODES: ((rows, columns // 2), torch.uint8, None),
                BLOCK_SCALE: ((rows, columns // BLOCK), torch.float8_e4m3fn, "group"),
                GLOBAL_SCALE: ((2,) if prefix == "w13" else (), torch.float32, "tensor"),
                INPUT_SCALE: ((2,) if prefix == "w13" else (), torch.float32, "tensor"),
            }
            for kind in kinds:
                shape, dtype, granularity = per_expert[kind]
                experts = num_experts
                if kind == INPUT_SCALE and self.global_input_scales:
                    experts = extra_weight_attrs["global_num_experts"]
                data = torch.empty(experts, *shape, dtype=dtype)
                if padded and kind in (CODES, BLOCK_SCALE):
                    data.fill_(int(kind == BLOCK_SCALE))  # nothing is loaded into the padding
                param = torch.nn.Parameter(data, requires_grad=False)
                layer.register_parameter(f"{prefix}_{self.layout.suffixes[kind]}", param)
                loader = quantizing if quantizing and kind == CODES else loaders[kind]
                attributes: dict[str, Any] = {"weight_loader": loader}
                if granularity is not None:
                    attributes["quant_method"] = FusedMoeWeightScaleSupported(granularity).value
                set_weight_attrs(param, attributes)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check that everything came, bring it to the canonical names, hand it to the backend."""
        if compat.shared_experts_counted_by_every_rank(layer):
            raise RefusedError(
                f"{layer.layer_name}: with tensor parallelism, vLLM's Transformers backend would "
                "add this model's shared expert once per rank (in bf16 too). Use "
                "--tensor-parallel-size 1, or a layout that vLLM has a model of its own for"
            )
        if not self._dummy:
            self.loads.complete()
        self._canonicalize(layer)
        sample = None
        if not self._dummy:
            fold_global_scales(layer)
            sample = self.config.self_check.before(layer, self)
        self.prepare(layer)
        if sample is not None:
            self.config.self_check.after(sample, layer, self)
        self.config.summary.loaded(layer, self)

    def _canonicalize(self, layer: RoutedExperts) -> None:
        layout = self.layout
        for prefix in ("w13", "w2"):
            for kind, (suffix, canonical) in enumerate(
                zip(layout.suffixes, CANONICAL, strict=True)
            ):
                param = getattr(layer, f"{prefix}_{suffix}", None)
                if param is None:
                    continue
                delattr(layer, f"{prefix}_{suffix}")
                data = param.data
                if layout.reciprocal and kind in (GLOBAL_SCALE, INPUT_SCALE):
                    data = data.reciprocal()
                layer.register_parameter(
                    f"{prefix}_{canonical}", torch.nn.Parameter(data, requires_grad=False)
                )
