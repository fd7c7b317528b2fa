"""What vLLM calls with each tensor of an expert. Each parameter has one loader.

vLLM's own loader slices for tensor parallelism and finds an expert's place. The loaders here come
before it: one checks the tensor and passes it on, the other quantizes a weight of plain floats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.utils.torch_utils import set_default_torch_dtype

from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.kernels.kernel import NotFiniteError, quantize_weights
from quantize.run.options import Options
from vllm_nvfp4_moe.loading.checks import ExpertLoads
from vllm_nvfp4_moe.loading.tensors import EXPERT_TENSORS, TensorKind

if TYPE_CHECKING:
    from quantize.nvfp4.kernels.kernel import Quantized

RULE = Options.scales
"""The rule of block scales: an export's default, so that weights are the same both ways."""


def _place(
    layer: RoutedExperts,
    param: torch.nn.Parameter,
    tensor: torch.Tensor,
    name: str,
    shard: str,
    expert: int,
) -> bool:
    """Slice ``tensor`` and store it as vLLM does for most models; False if it is another rank's."""
    # Not the layer's own method: DBRX's reads stacks alone (``quirks.DBRX``).
    return RoutedExperts.weight_loader(layer, param, tensor, name, shard, expert, True)


class WeightLoader(ABC):
    """A ``weight_loader``, as vLLM calls it with one tensor of a checkpoint.

    Args:
        loads: checks and counts the layer's tensors.
    """

    supports_moe_loading = True

    def __init__(self, loads: ExpertLoads) -> None:
        self.__name__ = "nvfp4_moe_weight_loader"  # vLLM's reloading logs it
        self.loads = loads

    def __call__(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        if loaded_weight.dim() == 3:  # a whole stack, as vLLM's Llama-4 hands it over
            experts = self.loads.stacked(len(loaded_weight))
            tensors = dict(zip(experts, loaded_weight, strict=True))
        else:
            tensors = {expert_id: loaded_weight}
        found = False
        for expert, tensor in tensors.items():
            for copy in self.loads.copies(expert):
                found |= self.load(param, tensor, weight_name, shard_id, copy)
        return found if return_success else None

    @abstractmethod
    def load(
        self,
        param: torch.nn.Parameter,
        tensor: torch.Tensor,
        name: str,
        shard: str,
        expert: int,
    ) -> bool:
        """Check ``tensor`` and store it.

        Args:
            param: of the layer, for all experts of this rank.
            tensor: as stored in the checkpoint.
            name: by which vLLM's loader chooses how to slice.
            shard: the matrix, "w1", "w2" or "w3".
            expert: global expert number.

        Returns:
            False if the expert is another rank's.
        """


class Loader(WeightLoader):
    """Checks a tensor of an NVFP4 weight, and passes it to vLLM's own loader.

    vLLM's loader chooses its branch by words in the method's class name. For single numbers that
    matters, so they are stored here instead.

    Args:
        kind: which of a weight's tensors this is for.
    """

    def __init__(self, loads: ExpertLoads, kind: TensorKind) -> None:
        super().__init__(loads)
        self.kind = kind
        self.global_index = kind == TensorKind.INPUT_SCALE and loads.global_input_scales

    def load(
        self,
        param: torch.nn.Parameter,
        tensor: torch.Tensor,
        name: str,
        shard: str,
        expert: int,
    ) -> bool:
        self.loads.check(self.kind, shard, expert, tensor, announced=param.is_meta)
        return self.put(param, tensor, name, shard, expert)

    def put(
        self,
        param: torch.nn.Parameter,
        tensor: torch.Tensor,
        name: str,
        shard: str,
        expert: int,
    ) -> bool:
        """Store ``tensor`` where it belongs; False if that is on another rank."""
        layer = self.loads.layer
        if not EXPERT_TENSORS[self.kind].per_matrix:
            return _place(layer, param, tensor, name, shard, expert)
        index = layer._map_global_expert_id_to_local_expert_id(expert)
        index = expert if self.global_index else index
        if index < 0:
            return False
        place = param.data[index] if shard == "w2" else param.data[index, int(shard == "w3")]
        place.copy_(tensor.reshape(()))
        return True


class BiasLoader(WeightLoader):
    """Checks a matrix's biases, and passes them to vLLM's own loader.

    Ranks that share an expert add up what each makes of it, and vLLM's loader gives w2's biases to
    all of them. So here only the first rank gets them, as in vLLM's own GPT-OSS.
    """

    def load(
        self,
        param: torch.nn.Parameter,
        tensor: torch.Tensor,
        name: str,
        shard: str,
        expert: int,
    ) -> bool:
        self.loads.check_bias(shard, expert, tensor, announced=param.is_meta)
        layer = self.loads.layer
        if shard == "w2" and layer.moe_config.tp_rank > 0:
            tensor = torch.zeros_like(tensor)
        return _place(layer, param, tensor, name, shard, expert)


class QuantizingLoader(WeightLoader):
    """The loader of the parameter for codes, where the checkpoint has weights in plain floats.

    vLLM's reloading calls it twice with each weight: first with a parameter on the meta device, to
    count how much of the layer has come, and once all has, to load it.

    Gate and up share a global scale, so where there are both, the first of them to come waits for
    the other, in the host's memory. Weights are quantized whole, before they are sliced for ranks,
    on the parameter's device.

    Args:
        loaders: those of the NVFP4 tensors, by kind; they get what the quantization gives.
    """

    def __init__(self, loads: ExpertLoads, loaders: dict[TensorKind, Loader]) -> None:
        super().__init__(loads)
        self.loaders = loaders

    def load(
        self,
        param: torch.nn.Parameter,
        tensor: torch.Tensor,
        name: str,
        shard: str,
        expert: int,
    ) -> bool:
        self.loads.check_plain(shard, expert, tensor, announced=param.is_meta)
        local = self.loads.layer._map_global_expert_id_to_local_expert_id(expert) >= 0
        if param.is_meta:
            if local:
                rows, columns = tensor.shape
                shape = EXPERT_TENSORS[TensorKind.CODES].shape(rows, columns)
                codes = torch.empty(shape, dtype=torch.uint8, device="meta")
                self.loaders[TensorKind.CODES].put(param, codes, name, shard, expert)
        elif local:
            self._take(param.device, tensor, name, shard, expert)
        return local

    def _take(
        self, device: torch.device, tensor: torch.Tensor, name: str, shard: str, expert: int
    ) -> None:
        parts = {shard: tensor}
        if shard != "w2" and "w3" in self.loads.matrices:
            waiting = self.loads.waiting
            if waiting.get(expert, (shard,))[0] == shard:
                # Some of vLLM's loaders hand out pieces of a GPU buffer that they use again.
                waiting[expert] = shard, tensor.cpu()
                return
            first, other = waiting.pop(expert)
            parts[first] = other
        # vLLM loads under the model's dtype as the default.
        with torch.device(device), set_default_torch_dtype(torch.float32):
            weights = [part.to(device).contiguous() for part in parts.values()]
            try:
                quantized = quantize_weights(weights, RULE, for_device(device))
            except NotFiniteError:
                bad = next(s for s, part in parts.items() if not part.isfinite().all())
                damaged = self.loads.name(TensorKind.CODES, bad, expert)
                self.loads.refuse(
                    f"{damaged}: some of its numbers are NaN or infinite; the checkpoint is damaged"
                )
            for each, result in zip(parts, quantized, strict=True):
                self._store(result, name, each, expert)

    def _store(self, result: Quantized, name: str, shard: str, expert: int) -> None:
        # Input scales, if there are any, are filled in once all weights are there.
        tensors = {
            TensorKind.CODES: result.weight.codes,
            TensorKind.BLOCK_SCALE: result.weight.block_scale,
            TensorKind.GLOBAL_SCALE: result.weight.global_scale,
        }
        layer, layout = self.loads.layer, self.loads.layout
        prefix = "w2" if shard == "w2" else "w13"
        stem = name.removesuffix(EXPERT_TENSORS[TensorKind.CODES].suffix(layout))
        for kind, tensor in tensors.items():
            suffix = EXPERT_TENSORS[kind].suffix(layout)
            param = getattr(layer, f"{prefix}_{suffix}")
            self.loaders[kind].put(param, tensor, f"{stem}{suffix}", shard, expert)
