"""How a checkpoint's routed experts are stored, layer by layer: what loading must know of it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from quantize.layouts.layout import Layout


class Format:
    """How experts are stored. :mod:`vllm_nvfp4_moe.formats` has those that there are.

    Attributes:
        layout: names of the NVFP4 tensors, and whether their scales multiply or divide.
        on_the_fly: the experts are plain floats in the files, and are quantized as they load.
        per_token: the user asks for activations in NVFP4 with a scale for each token, which the
            kernel computes; input scales are not used.
    """

    layout: Layout
    on_the_fly = False
    per_token = False

    @abstractmethod
    def weight_only(self, layer: torch.nn.Module, prefix: str) -> bool | None:
        """Whether the experts of ``layer`` come without input scales; None if they are not stored
        as NVFP4, so that vLLM's own config takes them.

        Args:
            layer: routed experts, or a linear.
            prefix: the layer's module path.
        """
