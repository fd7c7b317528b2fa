"""The life of a layer's experts: empty parameters, loading, checks, conversion for a kernel.

A backend's method inherits :class:`NvFp4MoEMethod` and adds the kernel. What it finds in a layer
when ``prepare`` is called is this, whatever the checkpoint's layout was:

* ``w13_weight`` uint8 ``[experts, parts * intermediate, hidden / 2]``: all of gate, then all of up,
  so that ``parts`` is 2; without a gate, up alone, and 1;
* ``w13_weight_scale`` float8_e4m3fn ``[experts, parts * intermediate, hidden / 16]``;
* ``w13_weight_scale_2`` float32 ``[experts, parts]``: the global scale, which multiplies. Gate's
  and up's are equal;
* ``w13_input_scale`` float32 ``[experts, parts]``: absent in weight-only checkpoints;
* the same with ``w2``, ``[experts, hidden, intermediate]``, without the axis of parts;
* ``w13_bias`` ``[experts, parts * intermediate]`` and ``w2_bias`` ``[experts, hidden]`` in the
  model's dtype, if vLLM's model has any. Of ranks that share an expert, all but the first have
  zeros for ``w2_bias``, since the ranks' outputs are added up.

Those are the names that vLLM's ``modelopt_fp4`` uses, and that its conversions for kernels expect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import (
    FusedMoEMethodBase,
    FusedMoeWeightScaleSupported,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import set_default_torch_dtype

from quantize.layouts.layout import INPUT_SCALE as NO_RANGE
from vllm_nvfp4_moe import graphs, quirks
from vllm_nvfp4_moe.context import ModelContext
from vllm_nvfp4_moe.errors import RefusedError
from vllm_nvfp4_moe.interface import ExpertsBackend
from vllm_nvfp4_moe.loading import dbrx, gpt_oss, names
from vllm_nvfp4_moe.loading.checks import ExpertLoads, fold_global_scales
from vllm_nvfp4_moe.loading.loaders import BiasLoader, Loader, QuantizingLoader
from vllm_nvfp4_moe.loading.tensors import EXPERT_TENSORS, TensorKind
from vllm_nvfp4_moe.reload import Kept

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.measured import Table

_CONVERTED = ("sharded_state", "runai_streamer_sharded", "tensorizer")
"""Values of ``--load-format`` with which vLLM loads what another start has made of a checkpoint,
around the weight loaders or without a call of ``process_weights_after_loading``."""


class NvFp4MoEMethod(ExpertsBackend):
    """Base of the backends' methods.

    Args:
        context: of the model that the layer belongs to.
        layer: already set to the contract's gate.
        weight_only: the layer's experts come without input scales.

    Attributes:
        reloading: the layer's weights are loaded again: what was made of the first ones, and is in
            use, stays where it is.
    """

    reloading = False

    def __init__(self, context: ModelContext, layer: RoutedExperts, weight_only: bool) -> None:
        # By name: a backend may inherit from a method of vLLM too, whose constructor chooses
        # kernels and must not run.
        FusedMoEMethodBase.__init__(self, layer.moe_config)
        self.context = context
        self.layout = context.format.layout
        self.weight_only = weight_only
        self.gate = context.gates.of(layer.layer_name)
        self._kinds = tuple(
            kind for kind in EXPERT_TENSORS if kind != TensorKind.INPUT_SCALE or not weight_only
        )

    @classmethod
    def measured_best(
        cls, name: str, table: Table, context: ModelContext, layer: RoutedExperts, weight_only: bool
    ) -> NvFp4MoEMethod | None:
        """A method for ``layer`` with the kernel ``name``; with the fastest kernel by number of
        tokens, if others of this backend share its weights. None if it cannot run here, or
        another was asked for.

        Args:
            name: one of :meth:`kernel_names`, the fastest in ``table``.
            layer: already set to the contract's gate.
        """
        if cls.unsupported(layer):
            return None
        return cls(context, layer, weight_only)

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
        """Give ``layer`` the parameters that the checkpoint's tensors are loaded into, by the
        layout's names. vLLM calls this."""
        layer.num_experts = num_experts
        layer.params_dtype = params_dtype
        kinds = self._kinds
        # The config of this layer's model, which may be a draft model. It is no longer current
        # when weights are loaded again.
        self._vllm_config = get_current_vllm_config()
        load_format = self._vllm_config.load_config.load_format
        self._dummy = load_format == "dummy"
        if load_format in _CONVERTED:
            raise RefusedError(
                f"--load-format {load_format} loads weights as they were converted for a kernel, "
                "by another start and unchecked; leave it out, and serve the checkpoint itself"
            )
        on_the_fly = self.context.format.on_the_fly
        summary = self.context.summary
        summary.built()
        biases = (TensorKind.BIAS,) if layer.moe_config.has_bias else ()
        self.loads = ExpertLoads(
            layer,
            self.layout,
            (*((TensorKind.CODES,) if on_the_fly else kinds), *biases),
            self.global_input_scales,
            summary.begins,
            input_scales=self.quantizes_activations and not self.per_token_activation,
        )
        gpt_oss.load_by_parameter(layer)
        dbrx.load_by_parameter(layer)
        names.heed(layer)
        loaders = {kind: Loader(self.loads, kind) for kind in kinds}
        quantizing = QuantizingLoader(self.loads, loaders) if on_the_fly else None

        unpadded = extra_weight_attrs.get("unpadded_hidden_size") or hidden_size
        inner, parts = intermediate_size_per_partition, layer.moe_config.w13_num_shards
        sizes = (("w13", parts * inner, hidden_size), ("w2", hidden_size, inner))
        for prefix, rows, columns in sizes:
            for kind in kinds:
                tensor = EXPERT_TENSORS[kind]
                shape = tensor.shape(rows, columns)
                if tensor.per_matrix and prefix == "w13":
                    shape = (parts,)  # one for each matrix
                experts = num_experts
                if kind == TensorKind.INPUT_SCALE and self.global_input_scales:
                    experts = extra_weight_attrs["global_num_experts"]
                data = torch.empty(experts, *shape, dtype=tensor.dtype)
                param = torch.nn.Parameter(data, requires_grad=False)
                layer.register_parameter(f"{prefix}_{tensor.suffix(self.layout)}", param)
                loader = quantizing if quantizing and kind == TensorKind.CODES else loaders[kind]
                attributes: dict[str, Any] = {"weight_loader": loader}
                if tensor.granularity is not None:
                    granularity = FusedMoeWeightScaleSupported(tensor.granularity)
                    attributes["quant_method"] = granularity.value
                # vLLM's reloading processes a layer once so many numbers have come for it: none
                # for padding, and for what is quantized as it loads only the codes.
                if quantizing and kind != TensorKind.CODES:
                    attributes["weight_loader_numel"] = 0
                elif not tensor.per_matrix:
                    attributes["weight_loader_numel"] = data.numel() * unpadded // hidden_size
                set_weight_attrs(param, attributes)
            if biases:
                data = torch.empty(num_experts, rows, dtype=params_dtype)
                param = torch.nn.Parameter(data, requires_grad=False)
                layer.register_parameter(f"{prefix}_bias", param)
                numel = data.numel() * unpadded // hidden_size if prefix == "w2" else data.numel()
                attributes = {"weight_loader": BiasLoader(self.loads), "weight_loader_numel": numel}
                set_weight_attrs(param, attributes)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check that every tensor came, give them their canonical names, hand them to the backend
        and check what its kernel computes. vLLM calls this once its loader has ended, and again
        for each reload.

        Raises:
            RefusedError: if the model would not give the text that its checkpoint means.
        """
        # As at vLLM's first load, whoever calls.
        codes = getattr(layer, f"w13_{EXPERT_TENSORS[TensorKind.CODES].suffix(self.layout)}", None)
        if codes is None or (self.reloading and not self.loads.seen):
            raise RefusedError(
                f"{layer.layer_name}: its weights are converted already. To load others, use "
                "vLLM's reload_weights or update_weights"
            )
        device = codes.device
        del codes  # or it would stay in memory while it is converted
        with (
            set_current_vllm_config(self._vllm_config),
            set_default_torch_dtype(layer.params_dtype),
            device,
        ):
            self._process(layer)
        self.reloading = True

    def _process(self, layer: RoutedExperts) -> None:
        if quirks.shared_experts_counted_by_every_rank(layer):
            raise RefusedError(
                f"{layer.layer_name}: with tensor parallelism, vLLM's Transformers backend would "
                "add this model's shared expert once per rank (in bf16 too). Use "
                "--tensor-parallel-size 1, or a layout that vLLM has a model of its own for"
            )
        dummy = self._dummy and not self.reloading
        lacking = [] if dummy else self.loads.complete()
        if lacking:
            self.context.summary.lacks_input_scales(f"{layer.layer_name}: {lacking[0]}")
        self._canonicalize(layer)
        self._complete_made_up(layer, dummy, bool(lacking))
        self.prepare_router(layer)
        sample = None
        if not dummy:
            fold_global_scales(layer)
            sample = self.context.self_check.before(layer, self)
        kept = Kept(layer, self) if self.reloading else None
        self.prepare(layer)
        if sample is not None:
            self.context.self_check.after(sample, layer, self)
        if kept is not None:
            kept.restore(layer, self)
        graphs.depend_on(layer, self, self._vllm_config)
        self.context.summary.loaded(layer, self)

    def _complete_made_up(self, layer: RoutedExperts, dummy: bool, lacking: bool) -> None:
        """Fill what did not come from a checkpoint: padding, input scales of weights that were
        quantized as they loaded, and with ``--load-format dummy`` everything.

        Args:
            lacking: some input scales did not come, and the kernel uses none.
        """
        config = layer.moe_config
        hidden = config.hidden_dim_unpadded or config.hidden_dim
        if dummy:
            # vLLM makes up small numbers of both signs, and no scale is negative.
            fixed = torch.Generator(layer.w13_weight.device).manual_seed(0)
            for prefix in ("w13", "w2"):
                getattr(layer, f"{prefix}_weight").data.random_(0, 256, generator=fixed)
                getattr(layer, f"{prefix}_weight_scale").data.fill_(1)
                getattr(layer, f"{prefix}_weight_scale_2").data.fill_(2**-7)
        made_up = dummy or lacking or self.context.format.on_the_fly
        if made_up and not self.weight_only:
            for prefix in ("w13", "w2"):
                # With global scales, also those of experts of other ranks.
                getattr(layer, f"{prefix}_input_scale").data.fill_(NO_RANGE)
        for kind, value in ((TensorKind.CODES, 0), (TensorKind.BLOCK_SCALE, 1)):
            tensor = EXPERT_TENSORS[kind]
            columns = tensor.shape(1, hidden)[1]
            getattr(layer, f"w13_{tensor.canonical}").data[:, :, columns:].fill_(value)
            getattr(layer, f"w2_{tensor.canonical}").data[:, hidden:].fill_(value)
        if layer.moe_config.has_bias:
            layer.w2_bias.data[:, hidden:] = 0

    def _canonicalize(self, layer: RoutedExperts) -> None:
        """Rename the parameters, and turn scales that divide into scales that multiply."""
        for prefix in ("w13", "w2"):
            for tensor in (EXPERT_TENSORS[kind] for kind in self._kinds):
                name = f"{prefix}_{tensor.suffix(self.layout)}"
                param = getattr(layer, name, None)
                if param is None:
                    continue
                delattr(layer, name)
                if hasattr(layer, canonical := f"{prefix}_{tensor.canonical}"):
                    delattr(layer, canonical)  # of the load before
                data = param.data
                if self.layout.reciprocal and tensor.per_matrix:
                    data = data.reciprocal()
                layer.register_parameter(canonical, torch.nn.Parameter(data, requires_grad=False))
