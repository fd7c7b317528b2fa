"""The formats in which experts are stored. Each is vLLM's own config for it, and takes the experts.

A new format is one class here, of :class:`~vllm_nvfp4_moe.experts_config.ExpertsConfig` and the
config that vLLM has for its layout, and one line in ``_FORMATS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.modelopt import (
    ModelOptMixedPrecisionConfig,
    ModelOptNvFp4Config,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

from quantize.experts.names import PROJECTIONS, is_expert
from quantize.layouts import LAYOUTS, detect
from quantize.layouts.modelopt import MIXED, WEIGHT_ONLY, algorithm
from quantize.layouts.modelopt import settings as fields_of
from vllm_nvfp4_moe import quirks, settings
from vllm_nvfp4_moe.drafts import is_draft
from vllm_nvfp4_moe.experts_config import ExpertsConfig

logger = init_logger("vllm.nvfp4_moe.formats")


class ModelOpt(ExpertsConfig, ModelOptNvFp4Config):
    """ModelOpt's layout with one algorithm for all modules that are not excluded."""

    layout = LAYOUTS["modelopt"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelOpt:
        return super().from_config(quirks.with_ignore(config))

    def weight_only(self, layer: torch.nn.Module, prefix: str) -> bool | None:
        return None if self.is_layer_excluded(prefix) else WEIGHT_ONLY.get(self.quant_method)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        # This layout takes what no list excludes for quantized. But a tied head has no tensors to
        # be listed by, and some of vLLM's models give their head no name.
        listed = not isinstance(layer, ParallelLMHead) or self.is_layer_excluded(prefix)
        if not listed and not self.stored.has_head():
            return UnquantizedEmbeddingMethod()
        return super().get_quant_method(layer, prefix)


class ModelOptMixed(ExpertsConfig, ModelOptMixedPrecisionConfig):
    """ModelOpt's layout with an algorithm for each module. NVIDIA publishes MiniMax-M3 so: in
    MXFP8, with NVFP4 experts."""

    layout = LAYOUTS["modelopt"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelOptMixed:
        """The config; it has no contents before :meth:`maybe_update_config` is called if the map of
        layers is in ``hf_quant_config.json``."""
        fields = fields_of(config)
        if algorithm(fields) == MIXED and not fields.get("quantized_layers"):
            return cls.__new__(cls)
        return super().from_config(quirks.with_ignore(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        if not hasattr(self, "quantized_layers"):
            from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

            file = "hf_quant_config.json"
            config = get_hf_file_to_dict(file, model_name, revision)
            if not config or not fields_of(config).get("quantized_layers"):
                raise ValueError(
                    f"{model_name}: its quantization is {MIXED}, and neither config.json "
                    f"nor {file} has the quantized_layers that say what is what"
                )
            if detect(config) is None:
                raise ValueError(not_ours(config))
            self.__dict__ = vars(self.from_config(config)) | vars(self)
        super().maybe_update_config(model_name, hf_config, revision)

    def weight_only(self, layer: torch.nn.Module, prefix: str) -> bool | None:
        if self.is_layer_excluded(prefix):
            return None
        return WEIGHT_ONLY.get(str(self._resolve_quant_algo(prefix)))


class CompressedTensors(ExpertsConfig, CompressedTensorsConfig):
    """compressed-tensors' layout: groups of modules, each with a scheme."""

    layout = LAYOUTS["compressed-tensors"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressedTensors:
        if not config.get("config_groups"):
            raise ValueError(
                f"the quantization_config of config.json has the format {config.get('format')!r} "
                "and no config_groups: it does not say which modules are quantized, and how. "
                "Complete it, or quantize again with: nvfp4-moe quantize SOURCE TARGET"
            )
        made = super().from_config(config)
        # Checkpoints of before name experts as their files do, and vLLM's class for MiniMax-M3
        # asks for others (``quantize.layouts.targets``): as if the config had named both.
        for target, scheme in list(made.target_scheme_map.items()):
            experts, _, name = target.rpartition(".0.")
            if is_expert(target) and experts.endswith("experts"):
                (place,) = {names.index(name) for names in PROJECTIONS if name in names}
                for names in PROJECTIONS:
                    made.target_scheme_map.setdefault(f"{experts}.0.{names[place]}", scheme)
        return made

    def weight_only(self, layer: torch.nn.Module, prefix: str) -> bool | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        names = [prefix]
        if isinstance(layer, RoutedExperts):
            # As CompressedTensorsMoEMethod.get_moe_method chooses: by expert 0's projections.
            self._add_fused_moe_to_target_scheme_map()
            kinds = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
            names = [f"{prefix}.0.{name}" for name in kinds if name]
            # Lists have vLLM's class, and not what some models make of it (DbrxExperts).
            layer = RoutedExperts.__new__(RoutedExperts)
        schemes = [self.get_scheme_dict(layer, name) for name in names]
        scheme = schemes[0]
        if (
            scheme is None
            or any(other != scheme for other in schemes)
            or not self._is_nvfp4_format(scheme["weights"])
        ):
            return None
        activations = scheme["input_activations"]
        if activations is None:
            return True
        return False if self._is_nvfp4_format(activations) else None


class _Unquantized(QuantizationConfig):
    """A config under which vLLM does what it does without any quantization."""

    def get_name(self) -> Any:
        return settings.NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.half]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # as vLLM's modelopt_fp4

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> _Unquantized:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        # For all other kinds of layers, None means unquantized.
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class OnTheFly(ExpertsConfig, _Unquantized):
    """Experts in plain floats, which are quantized by the rule ``mse`` while they load. All else
    stays as it is, and so do the experts of multi-token-prediction layers.

    What lies in memory afterwards is, bit for bit, what ``nvfp4-moe quantize`` would
    have written and this plugin would have loaded. So activations stay floats, unless
    ``NVFP4_MOE_ACTIVATIONS`` says otherwise.
    """

    layout = LAYOUTS["modelopt"]
    on_the_fly = True

    def weight_only(self, layer: torch.nn.Module, prefix: str) -> bool | None:
        if self.drafts or is_draft(prefix, self.num_layers):
            return None
        if not settings.on_the_fly_activations():
            return True
        logger.warning_once(
            "NVFP4_MOE_ACTIVATIONS=nvfp4: the experts' input scales are 1.0, since nobody has seen "
            "their inputs. Kernels with 4-bit activations round inputs below about 0.006 to zero "
            "then, and small ones badly; nvfp4-moe quantize --input-scales finds the right ones."
        )
        return False


def _modelopt(config: dict[str, Any]) -> type[ExpertsConfig]:
    return ModelOptMixed if algorithm(fields_of(config)) == MIXED else ModelOpt


_FORMATS: dict[str, Callable[[dict[str, Any]], type[ExpertsConfig]]] = {
    "modelopt": _modelopt,
    "compressed-tensors": lambda config: CompressedTensors,
}
"""By the layout's name: the class that serves a checkpoint with a ``quantization_config``."""


def from_checkpoint(config: dict[str, Any]) -> ExpertsConfig:
    """The quantization config of a checkpoint with this ``quantization_config``.

    Raises:
        ValueError: if nothing in it is NVFP4 in a known layout, or vLLM cannot read it.
    """
    layout = detect(config)
    if layout is None or layout.name not in _FORMATS:
        raise ValueError(not_ours(config))
    try:
        return _FORMATS[layout.name](config).from_config(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"vLLM cannot read the quantization_config of config.json, in {layout.name}'s layout: "
            f"{error!r}. Compare it with that of a checkpoint that nvfp4-moe quantize has written"
        ) from error


def not_ours(config: Any) -> str:
    """What to say of a checkpoint with this ``quantization_config``, which is not NVFP4."""
    fields = fields_of(config) if isinstance(config, dict) else {}
    layers = fields.get("quantized_layers")
    entries = [fields, *(layers.values() if isinstance(layers, dict) else ())]
    algorithms = {algorithm(entry) for entry in entries if isinstance(entry, dict)} - {"NONE"}
    found = f"this one's quant_method is {fields.get('quant_method')!r}"
    if algorithms:
        found += f", with {', '.join(sorted(algorithms))}"
    variants = sorted(name for name in algorithms - {*WEIGHT_ONLY} if "NVFP4" in name)
    if variants:
        found += (
            f". {variants[0]} is not plain NVFP4: beside its weights it stores what their inputs "
            "or outputs are changed by, which this plugin's kernels do not apply"
        )
    return (
        "--quantization nvfp4_moe needs a checkpoint whose routed experts are NVFP4, in ModelOpt's "
        f"or compressed-tensors' layout, or not quantized at all, and {found}. Make one from the "
        "unquantized model with: nvfp4-moe quantize SOURCE TARGET"
    )
