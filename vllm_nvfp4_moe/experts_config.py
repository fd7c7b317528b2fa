"""What vLLM's own config of a layout becomes if its routed experts are ours.

To all of vLLM it is that config: for dense layers, KV caches, lists of what is excluded, and code
that asks for its class or its name. Only the methods below differ.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.config.quantization import QuantSpec
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4DynamicToken
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

from vllm_nvfp4_moe import settings
from vllm_nvfp4_moe.drafts import is_draft, is_one_of, name_in_files
from vllm_nvfp4_moe.errors import RefusedError
from vllm_nvfp4_moe.loading import names, unloaded
from vllm_nvfp4_moe.loading.format import Format
from vllm_nvfp4_moe.loading.stored import Stored

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.models.utils import WeightsMapper

    from quantize.experts.gates import Gates
    from vllm_nvfp4_moe.context import ModelContext

logger = logging.getLogger("vllm.nvfp4_moe.config")


class ExpertsConfig(Format, QuantizationConfig):
    """Comes before a config of vLLM's among the bases of each class in
    :mod:`vllm_nvfp4_moe.formats`.

    Attributes:
        gates: which gates the experts apply. None until :meth:`maybe_update_config` is called.
        stored: what is NVFP4 by the checkpoint's headers. Known from then on, too.
        num_layers: the language model's ``num_hidden_layers``, if it says so.
        drafts: the model drafts tokens for another, by multi-token-prediction layers.
    """

    gates: Gates | None = None
    stored = Stored(None)
    num_layers: int | None = None
    drafts = False
    _model_name: str | None = None
    _architecture: str | None = None
    _watched = False

    @cached_property
    def context(self) -> ModelContext:
        """What the layers of the model share, once :meth:`maybe_update_config` was called."""
        from vllm_nvfp4_moe.context import ModelContext
        from vllm_nvfp4_moe.self_check import SelfCheck
        from vllm_nvfp4_moe.summary import Summary

        assert self.gates is not None, "vLLM calls maybe_update_config before it builds layers"
        check = SelfCheck()
        return ModelContext(self, self.gates, check, Summary(self, self.gates, check))

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        from vllm.platforms import current_platform

        dtypes = super().get_supported_act_dtypes()
        # The CPU backend computes in float32 too.
        return [*dtypes, torch.float32] if current_platform.is_cpu() else dtypes

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Establish which gates the experts apply, by the checkpoint's contract, or by the model's
        Transformers class if it has none. vLLM calls this once, before it builds layers.

        Args:
            model_name: the checkpoint's folder or its name on the hub.
            hf_config: the model's config, as Transformers or vLLM made it.
            revision: of the model on the hub.

        Raises:
            ValueError: if the gates cannot be established, or the model cannot run on this
                platform.
        """
        from vllm.platforms import current_platform
        from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

        from quantize.errors import QuantizeError
        from quantize.experts.gates import KEY, from_contract
        from quantize.experts.identify import identify, identify_config
        from vllm_nvfp4_moe import gpu_only, metrics
        from vllm_nvfp4_moe.loading import gpt_oss

        metrics.share()
        super().maybe_update_config(model_name, hf_config, revision)
        online = self.online_quantization_config  # from the user's --quantization-config
        if online is not None and online.args.moe is not None:
            # vLLM's own method for ModelOpt's NVFP4 experts takes this one, too.
            if online.args.moe != QuantSpec(activation=kNvfp4DynamicToken):
                raise ValueError(
                    "--quantization nvfp4_moe takes the experts as the checkpoint has them; "
                    "remove 'moe' from --quantization-config, but for "
                    '\'{"moe": {"activation": "nvfp4_per_token"}}\''
                )
            self.per_token = True
        if current_platform.is_cpu() and (problem := gpu_only.refusal(hf_config)):
            raise ValueError(problem)
        self.stored = Stored(model_name, revision, self.layout.suffixes[2])
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        self.num_layers = getattr(text, "num_hidden_layers", None)
        self._model_name = model_name
        self._architecture = next(iter(getattr(hf_config, "architectures", None) or ()), None)
        # vLLM gives such models a type of their own.
        self.drafts = str(getattr(hf_config, "model_type", "")).endswith("_mtp")
        contract = getattr(hf_config, KEY, None)
        if contract is None:  # vLLM makes configs of its own for some draft models
            contract = (get_hf_file_to_dict("config.json", model_name, revision) or {}).get(KEY)
        try:
            if contract is not None:
                self.gates = from_contract(contract, f"{model_name}/config.json")
            else:
                try:
                    gates = identify_config(hf_config)
                except QuantizeError:
                    # vLLM has config classes of its own, MiniMax-M3's among them.
                    gates = identify(model_name)
                # NVFP4 layouts store gate and up apart; plain floats may be as the class has them.
                is_gpt_oss = getattr(text, "model_type", None) == gpt_oss.TYPE
                self.gates = gates if self.on_the_fly and not is_gpt_oss else gates.concatenated()
                if is_gpt_oss and self.layout.name == "compressed-tensors":
                    gpt_oss.doubt(model_name)
                logger.info("%s has no gate contract; its class applies %s", model_name, self.gates)
        except QuantizeError as error:
            raise ValueError(
                f"{model_name}: cannot establish which gate its experts apply, and a wrong one "
                f"gives wrong text without any error: {error}"
            ) from error

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.stored.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod

        prefix = name_in_files(prefix, self._architecture)
        if isinstance(layer, RoutedExperts) and (config := get_current_vllm_config_or_none()):
            settings.use(config.additional_config)
        if self._drafts(prefix):
            _ = self._drafting  # warns
        if self._is_plain_draft(layer, prefix):
            if isinstance(layer, RoutedExperts):
                self.context.summary.left(prefix)
                return None  # vLLM then takes them for plain floats
            head = isinstance(layer, ParallelLMHead)
            return UnquantizedEmbeddingMethod() if head else UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            self._refuse_biases_left_out(layer, prefix)
            weight_only = self.weight_only(layer, prefix)
            if weight_only is not None:
                from vllm_nvfp4_moe.backends import choose

                online = self.online_quantization_config
                if online is not None and online.resolve_quant_method_cls(type(layer), prefix):
                    raise RefusedError(
                        f"{prefix}: a pattern of --quantization-config's 'targets' would quantize "
                        "its NVFP4 experts once more; narrow the pattern"
                    )
                return choose(self.context, layer, weight_only)
            if module := self.stored.below(prefix):
                raise RefusedError(
                    f"{prefix}: by the checkpoint's quantization_config its experts are not NVFP4, "
                    f"but {module} is: vLLM would take its codes for weights. Correct the "
                    "quantization_config, or quantize the model again"
                )
            self._set_gate(layer)
            names.heed(layer)
            self.context.summary.left(prefix)
        method = self.method_of_layout(layer, prefix)
        plain = method is None or isinstance(method, UnquantizedFusedMoEMethod)
        if (
            plain
            and isinstance(layer, RoutedExperts)
            and (scale := self.stored.scale_below(prefix))
        ):
            raise RefusedError(
                f"{prefix}: by the checkpoint's quantization_config its experts are not quantized, "
                f"but it has {scale}: vLLM would take rounded codes for weights. Correct the "
                "quantization_config, or quantize the model again"
            )
        if isinstance(layer, RoutedExperts) and method is not None and not plain:
            unloaded.guard(method, prefix, self.stored)
        if method is not None and not self._watched:
            self._watched = True
            self._watch(method)
        return method

    def _refuse_biases_left_out(self, layer: RoutedExperts, prefix: str) -> None:
        """Refuse experts whose biases, or whose router's, vLLM's class for the model drops.

        Raises:
            RefusedError: if there are any.
        """
        if not layer.moe_config.has_bias and (bias := self.stored.bias(prefix)):
            raise RefusedError(
                f"{prefix}: the checkpoint has {bias}, and vLLM's class for the model "
                "would leave its experts' biases out. Try another --model-impl"
            )
        routed = (layer.e_score_correction_bias, layer.custom_routing_function)
        if routed == (None, None) and (bias := self.stored.router_bias(prefix)):
            raise RefusedError(
                f"{prefix}: the checkpoint has {bias}, with which its router chooses "
                "experts, and vLLM's class for the model would leave it out (in bf16 too). "
                "Try another --model-impl"
            )

    def _set_gate(self, layer: RoutedExperts) -> None:
        """Set experts that a method of vLLM's will run to the checkpoint's gate, if vLLM's class
        for the model, its Transformers backend for example, has set them to another.

        Raises:
            ValueError: if vLLM has no kernels for it.
        """
        from vllm_nvfp4_moe.activation import apply_contract, differs

        assert self.gates is not None
        gate = self.gates.of(layer.layer_name)
        if not gate.post_norm and differs(layer, gate):
            apply_contract(layer, gate, ours=False)

    @cached_property
    def _drafting(self) -> list[str] | None:
        """What is NVFP4 of the layers that draft tokens, by the headers of the checkpoint that they
        come from, which is this one, unless ``--speculative-config`` names another; None if nobody
        knows. Warns if they are in none."""
        config = get_current_vllm_config_or_none()
        speculative = config and config.speculative_config
        # Draft models of other methods have quantization configs of their own.
        mtp = speculative and speculative.method == "mtp"
        draft = speculative.draft_model_config if mtp else None
        model, stored = self._model_name, self.stored
        if draft and draft.model != model and not self.drafts:
            model, stored = (
                draft.model,
                Stored(draft.model, draft.revision, self.layout.suffixes[2]),
            )
        if mtp and stored.names and not any(self._drafts(name) for name in stored.names):
            logger.warning(
                "%s has no weights for the layers that draft tokens, and vLLM may serve what lies "
                "in memory instead: the text stays right, and hardly any draft is. The tool that "
                "quantized the model has left them out; name a checkpoint that has them as 'model' "
                "in --speculative-config",
                model,
            )
        if stored.modules is None:
            return None
        return [module for module in stored.modules if self._drafts(module)]

    def _drafts(self, prefix: str) -> bool:
        return self.drafts or is_draft(prefix, self.num_layers)

    def _is_plain_draft(self, layer: torch.nn.Module, prefix: str) -> bool:
        """Whether ``layer`` drafts tokens, is NVFP4 by the config, and is not by the headers."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        return (
            not self.on_the_fly
            and isinstance(layer, (RoutedExperts, LinearBase, ParallelLMHead))
            and self._drafts(prefix)
            and self.weight_only(layer, prefix) is not None
            and self._drafting is not None
            and not is_one_of(prefix, self.packed_modules_mapping, self._drafting)
        )

    def method_of_layout(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What vLLM's own config of the layout says of a layer whose experts are not ours."""
        # Linears that vLLM merges under a name that no checkpoint has (MLA's in its Transformers
        # backend), or builds and then drops (Aria's dense MLPs), are in no list.
        if (
            isinstance(layer, LinearBase)
            and self.weight_only(layer, prefix) is not None
            and not self.stored.beside_experts
        ):
            return UnquantizedLinearMethod()
        return super().get_quant_method(layer, prefix)

    def _watch(self, method: QuantizeMethodBase) -> None:
        """Have ``method``, of a model's first layer that is not ours, also look whether all its
        experts came by their methods through :meth:`get_quant_method`.

        Some of vLLM's models choose their experts' methods themselves. They would read NVFP4 codes
        as other numbers, and nothing of this package would be called.
        """
        config = get_current_vllm_config_or_none()
        if config is None:
            return
        modules = config.compilation_config.static_forward_context
        others = set(modules)  # of the model that this one drafts for
        finish = method.process_weights_after_loading

        def process_weights_after_loading(layer: torch.nn.Module) -> None:
            del method.process_weights_after_loading  # once: later, vLLM may exchange methods
            self._watched = False  # a draft model may follow
            names = [n for n, m in modules.items() if hasattr(m, "routed_experts")]
            experts = [modules[name].routed_experts for name in names if name not in others]
            self._check_methods(experts)
            if not others and experts and not any(map(is_ours, experts)):
                logger.warning(
                    "--quantization nvfp4_moe does nothing here: no routed experts of this model "
                    "are NVFP4 by its quantization_config"
                )
            whole = not others and config.parallel_config.pipeline_parallel_size == 1
            if whole and not experts and (module := self.stored.expert()):
                logger.warning(
                    "--quantization nvfp4_moe does nothing here: %s is NVFP4, but vLLM's class for "
                    "the model runs its experts by kernels of its own, of which this plugin checks "
                    "neither weights nor gate",
                    module,
                )
            finish(layer)

        method.process_weights_after_loading = process_weights_after_loading

    def _has_its_norm(self, layer: RoutedExperts) -> bool:
        """Whether its experts have a norm after their second GEMM, and a quantized method of vLLM's
        class for the model, which alone can apply it."""
        from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

        assert self.gates is not None
        normed = self.gates.of(layer.layer_name).post_norm
        return normed and not isinstance(layer.quant_method, UnquantizedFusedMoEMethod)

    def _check_methods(self, layers: list[RoutedExperts]) -> None:
        """Refuse the model if one of ``layers``, all that it has, is NVFP4 and not ours."""
        named = [(each, name_in_files(each.layer_name, self._architecture)) for each in layers]
        left_out = {
            name: type(each.quant_method).__name__
            for each, name in named
            if not is_ours(each)
            and not self._has_its_norm(each)
            and not self._is_plain_draft(each, name)
            and (self.weight_only(each, name) is not None or self.stored.below(name))
        }
        if left_out:
            name, method = next(iter(left_out.items()))
            raise RefusedError(
                f"NVFP4 experts: {len(left_out)} of {len(layers)} layers are not served by "
                f"--quantization nvfp4_moe: vLLM's class for the model gave {name} the method "
                f"{method} without asking, which takes their weights for something else, or "
                "applies another gate. Try --model-impl transformers, or serve without this plugin"
            )


def is_ours(layer: RoutedExperts) -> bool:
    """Whether a backend of this package runs the experts of ``layer``."""
    from vllm_nvfp4_moe.interface import ExpertsBackend

    return isinstance(layer.quant_method, ExpertsBackend)
