"""Scales of MiniMax-M3's experts in FP8 on their way into vLLM's own class for the model.

ModelOpt's layout calls them ``weight_scale_inv``, and so does vLLM's method for such experts. The
class renames them to ``weight_scale`` and then finds no parameter, so the parameters are shown to
it under that name while it loads (``quirks.MINIMAX_M3_SCALES``).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from vllm_nvfp4_moe import quirks

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

_CLASSES = tuple(
    (f"vllm.models.minimax_m3.{vendor}.{module}", name)
    for vendor in ("nvidia", "amd")
    for module, name in (("model", "MiniMaxM3Model"), ("mtp", "MiniMaxM3MTP"))
)
_OURS: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
"""Experts of checkpoints that this package serves."""
_STORED, _RENAMED = "weight_scale_inv", "weight_scale"


def load_scales(layer: RoutedExperts) -> None:
    """If ``layer`` has such scales, have vLLM's class for MiniMax-M3 load them, where it is in
    use."""
    if hasattr(layer, f"w13_{_STORED}"):
        _OURS.add(layer)
        for module, name in _CLASSES:
            if module in sys.modules:
                _exchange(getattr(sys.modules[module], name))


def _exchange(owner: Any) -> None:
    stock = owner.load_weights
    if stock.__module__ == __name__:
        return

    def load_weights(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        shown = _shown(self)
        if not shown:
            loaded: set[str] = stock(self, weights)
            return loaded
        quirks.MINIMAX_M3_SCALES.log()

        def named_parameters(*args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
            for name, parameter in type(self).named_parameters(self, *args, **kwargs):
                yield name, parameter
                if name in shown:
                    yield shown[name], parameter

        self.__dict__["named_parameters"] = named_parameters
        try:
            loaded = stock(self, weights)
        finally:
            del self.__dict__["named_parameters"]
        stored = {renamed: name for name, renamed in shown.items()}
        return {stored.get(name, name) for name in loaded}

    owner.load_weights = load_weights


def _shown(model: torch.nn.Module) -> dict[str, str]:
    """The names under which the class looks for scales of experts that serve our checkpoints, by
    the parameters' own."""
    return {
        f"{path}.{name}": f"{path}.{name.replace(_STORED, _RENAMED)}"
        for path, module in model.named_modules()
        if module in _OURS
        for name, _ in module.named_parameters(recurse=False)
        if name.endswith(_STORED)
    }
