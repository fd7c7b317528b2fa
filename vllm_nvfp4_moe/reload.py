"""Keeps what captured CUDA graphs read in its place when a layer's weights are loaded again.

vLLM's reloading (``reload_weights``, ``update_weights``) loads into new tensors, has the layer's
method process them, and copies what became of the layer's parameters and buffers into the old
ones. A kernel object may hold more: scales that were computed from the layer's, strides, locks. A
captured graph reads those too, and a new kernel object would have them elsewhere. After level 2 of
vLLM's sleep mode they also hold garbage, since only what is registered with a module is restored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from vllm_nvfp4_moe.errors import RefusedError

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

_KERNEL = ("moe_kernel", "moe_quant_config")
"""The attributes of vLLM's methods that hold what a forward pass uses."""
_Leaf = torch.Tensor | float


class Kept:
    """What a method and its layer hold beside parameters and buffers, before a reload replaces it.

    Args:
        layer: as vLLM's reloading gives it to its method.
        method: the layer's, before it converts the new weights.
    """

    def __init__(self, layer: RoutedExperts, method: Any) -> None:
        self._attributes = dict(vars(layer))
        self._kernel = {name: getattr(method, name) for name in _KERNEL}
        self._leaves = dict(_leaves(self._kernel))

    def restore(self, layer: RoutedExperts, method: Any) -> None:
        """Copy the new values into the old tensors, and put the old objects back.

        Args:
            layer, method: after the new weights were converted and the new kernel was built.

        Raises:
            RefusedError: if what the kernel needs has another size, or a number has changed that
                graphs have captured by value.
        """
        new = dict(_leaves({name: getattr(method, name) for name in _KERNEL}))
        for path, old in self._leaves.items():
            if path in new:
                _replace(old, new[path], f"{layer.layer_name}: {path}")
        for name, old_kernel in self._kernel.items():
            setattr(method, name, old_kernel)
        for name, attribute in self._attributes.items():
            now = vars(layer).get(name)
            if isinstance(attribute, torch.Tensor) and isinstance(now, torch.Tensor):
                _replace(attribute, now, f"{layer.layer_name}: {name}")
                setattr(layer, name, attribute)


def _leaves(root: Any) -> Iterator[tuple[str, _Leaf]]:
    """The tensors and fractional numbers that objects of vLLM hold, each by its path."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, torch.Tensor | float):
            yield path, value
            continue
        if id(value) in seen or isinstance(value, torch.nn.Module | type):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            parts = [(str(key), part) for key, part in value.items()]
        elif isinstance(value, list | tuple):
            parts = [(str(index), part) for index, part in enumerate(value)]
        elif _is_kernels(type(value)):
            parts = list(getattr(value, "__dict__", {}).items())
        else:
            continue
        stack += [(f"{path}.{name}".lstrip("."), part) for name, part in parts]


def _is_kernels(cls: type) -> bool:
    """Whether objects of ``cls`` are part of a kernel: not vLLM's configs, which lead to the whole
    engine."""
    package = cls.__module__
    return package.startswith(("vllm.", "vllm_nvfp4_moe.")) and not package.startswith(
        "vllm.config"
    )


def _replace(old: _Leaf, new: _Leaf, what: str) -> None:
    if isinstance(old, float) or isinstance(new, float):
        if old != new:
            raise RefusedError(
                f"{what} was {old} and is {new} with the new weights. CUDA graphs have captured "
                "the old one; restart the server with these weights"
            )
        return
    if old.shape != new.shape or old.dtype != new.dtype or old.device != new.device:
        raise RefusedError(
            f"{what} was {old.dtype} {list(old.shape)} and is {new.dtype} {list(new.shape)} with "
            "the new weights; restart the server with these weights"
        )
    if old.data_ptr() == new.data_ptr():
        return
    for dim, stride in enumerate(old.stride()):
        if stride == 0 and old.shape[dim] > 1:  # expanded: all its rows are one
            old, new = old.narrow(dim, 0, 1), new.narrow(dim, 0, 1)
    with torch.no_grad():
        old.copy_(new)
