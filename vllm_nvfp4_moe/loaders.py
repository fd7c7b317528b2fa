"""What vLLM calls with each tensor of an expert: one loader per parameter.

vLLM's own loader slices for tensor parallelism and finds an expert's place; what differs comes
before it. Either the tensor is checked and passed on, or it is a plain float one, and quantized.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from vllm.utils.torch_utils import set_default_torch_dtype

from quantize.jobs import INPUT_SCALE as NO_RANGE
from quantize.kernels import NotFiniteError, for_device, quantize_weights
from vllm_nvfp4_moe.checks import BLOCK_SCALE, CODES, GLOBAL_SCALE, INPUT_SCALE, ExpertLoads

if TYPE_CHECKING:
    from quantize.kernels import Quantized


class _WeightLoader(ABC):
    """A ``weight_loader`` as vLLM calls it."""

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
        found = self.load(param, loaded_weight, weight_name, shard_id, expert_id)
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
        """Check ``tensor`` and take it; False if it belongs to another rank."""


class Loader(_WeightLoader):
    """Checks, then vLLM's own loader.

    vLLM's loader chooses its branch by words in the method's class name; scalars, for which that
    matters, are stored here instead.

    Args:
        kind: position in the layout's ``suffixes``.
    """

    def __init__(self, loads: ExpertLoads, kind: int) -> None:
        super().__init__(loads)
        self.kind = kind
        self.global_index = kind == INPUT_SCALE and loads.global_input_scales

    def load(
        self,
        param: torch.nn.Parameter,
        tensor: torch.Tensor,
        name: str,
        shard: str,
        expert: int,
    ) -> bool:
        self.loads.check(self.kind, shard, expert, tensor)
        return self.put(param, tensor, name, shard, expert)

    def put(
        self,
        param: torch.nn.Parameter,
        tensor: torch.Tensor,
        name: str,
        shard: str,
        expert: int,
    ) -> bool:
        """Store ``tensor`` where it belongs; False if that is another rank's place."""
        layer = self.loads.layer
        if self.kind in (CODES, BLOCK_SCALE):
            return layer.weight_loader(param, tensor, name, shard, expert, True)
        index = layer._map_global_expert_id_to_local_expert_id(expert)
        index = expert if self.global_index else index
        if index < 0:
            return False
        place = param.data[index] if shard == "w2" else param.data[index, int(shard == "w3")]
        place.copy_(tensor.reshape(()))
        return True


class QuantizingLoader(_WeightLoader):
    """Of a parameter for codes, to which plain floats come.

    Gate and up share a global scale, so the first of them waits for the other, in the host's
    memory. Weights are quantized whole, before any slicing for ranks, on the parameter's device.

    Args:
        loaders: by kind, those of the NVFP4 tensors.
    """

    def __init__(self, loads: ExpertLoads, loaders: dict[int, Loader]) -> None:
        super().__init__(loads)
        self.loaders = loaders
        self.waiting: dict[int, tuple[str, torch.Tensor]] = {}

    def load(
        self,
        param: torch.nn.Parameter,
        tensor: torch.Tensor,
        name: str,
        shard: str,
        expert: int,
    ) -> bool:
        if param.is_meta:  # how vLLM's reloading begins
            self.loads.refuse(
                "weights that were quantized while they loaded cannot be loaded again; restart, or "
                "serve a checkpoint that nvfp4-moe quantize made"
            )
        self.loads.check_plain(shard, expert, tensor)
        local = self.loads.layer._map_global_expert_id_to_local_expert_id(expert) >= 0
        if local:
            self._take(param.device, tensor, name, shard, expert)
        return local

    def _take(
        self, device: torch.device, tensor: torch.Tensor, name: str, shard: str, expert: int
    ) -> None:
        parts = {shard: tensor}
        if shard != "w2":
            if expert not in self.waiting:
                # Some of vLLM's loaders hand out pieces of a GPU buffer that they use again.
                self.waiting[expert] = shard, tensor.cpu()
                return
            first, other = self.waiting.pop(expert)
            parts[first] = other
        # vLLM loads under the model's dtype as the default.
        with torch.device(device), set_default_torch_dtype(torch.float32):
            weights = [part.to(device).contiguous() for part in parts.values()]
            try:
                quantized = quantize_weights(weights, "max", for_device(device))
            except NotFiniteError:
                bad = next(s for s, part in parts.items() if not part.isfinite().all())
                self.loads.refuse(
                    f"{self.loads.name(CODES, bad, expert)}: some of its numbers are NaN or "
                    "infinite; the checkpoint is damaged"
                )
            for each, result in zip(parts, quantized, strict=True):
                self._store(result, name, each, expert)

    def _store(self, result: Quantized, name: str, shard: str, expert: int) -> None:
        tensors: dict[int, Any] = {
            CODES: result.weight.codes,
            BLOCK_SCALE: result.weight.block_scale,
            GLOBAL_SCALE: result.weight.global_scale,
            INPUT_SCALE: torch.tensor(NO_RANGE, dtype=torch.float32),
        }
        layer, layout = self.loads.layer, self.loads.layout
        prefix = "w2" if shard == "w2" else "w13"
        for kind, loader in self.loaders.items():
            suffix = layout.suffixes[kind]
            full = f"{name.removesuffix(layout.suffixes[CODES])}{suffix}"
            param = getattr(layer, f"{prefix}_{suffix}")
            loader.put(param, tensors[kind], full, shard, expert)
