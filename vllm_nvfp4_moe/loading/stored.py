"""What a checkpoint's headers say of it, where its config does not, or may be wrong."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

_HEAD = re.compile(r"(?:^|\.)(?:\w*head|output|output_layer|proj_out|embed_out)$")
"""Module paths of output heads, in all checkpoints that vLLM serves."""
_BIAS = re.compile(
    r"\d+\.\w+[._]bias|\d+\.w(?:2|13)_bias|(?:gate|up|gate_up|down)_proj_bias|w(?:2|13)_bias"
)
"""Biases of experts, behind their module path: one expert's, or all of them."""
_SCALES = ("weight_scale", "weight_scale_inv")
"""Endings of scales of weights, in 8 bits too."""
_INPUTS = ("input_scale", "input_global_scale")
"""Endings of scales of activations."""
_ROUTER = re.compile(r".*\.(?:e_score_correction_bias|expert_bias)")
"""Biases by which routers choose experts."""
_LAYER = re.compile(r".*\.\d+\.")
"""Up to a layer, in module paths."""
_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In module paths of one expert's weights."""


class Stored:
    """The modules of a checkpoint that are stored as NVFP4. Headers are read when it is asked.

    Args:
        model: the checkpoint's folder or its name on the hub; None if there is none to be read.
        revision: of the model on the hub.
        suffix: the layout's name for global scales.
    """

    def __init__(self, model: str | None, revision: str | None = None, suffix: str = "") -> None:
        self._model, self._revision, self._suffix = model, revision, f".{suffix}"
        self._mapper: WeightsMapper | None = None
        self._by_ending: dict[str, list[str]] = {}

    def rename(self, mapper: WeightsMapper) -> None:
        """Take ``mapper`` for the checkpoint's names from now on: it gives vLLM's."""
        self._mapper = mapper
        self._by_ending.clear()
        for known in ("modules", "_biases", "beside_experts"):
            self.__dict__.pop(known, None)

    @cached_property
    def names(self) -> list[str] | None:
        """The checkpoint's names of its tensors; None if headers cannot be read."""
        from vllm.transformers_utils.config import get_safetensors_params_metadata

        if self._model is None:
            return None
        return list(get_safetensors_params_metadata(self._model, revision=self._revision)) or None

    @cached_property
    def _stored(self) -> list[str] | None:
        """Names in the headers of what is asked about here; None if they cannot be read."""
        asked = (self._suffix, "bias", *_SCALES, *_INPUTS)
        return self.names and [name for name in self.names if name.endswith(asked)]

    def _named(self, ending: str) -> list[str]:
        """Names with this ending, as vLLM has them."""
        if ending not in self._by_ending:
            names = [name for name in self._stored or () if name.endswith(ending)]
            self._by_ending[ending] = (
                names if self._mapper is None else self._mapper.apply_list(names)
            )
        return self._by_ending[ending]

    @cached_property
    def modules(self) -> frozenset[str] | None:
        """Module paths as vLLM has them; None if the headers cannot be read."""
        if self._stored is None:
            return None
        return frozenset(name.removesuffix(self._suffix) for name in self._named(self._suffix))

    @cached_property
    def _biases(self) -> list[str]:
        return self._named("bias")

    def has_head(self) -> bool:
        """Whether an output head is NVFP4, or may be."""
        return self.modules is None or any(_HEAD.search(module) for module in self.modules)

    @cached_property
    def beside_experts(self) -> bool:
        """Whether a module that is no routed expert is NVFP4, or may be."""
        return self.modules is None or not all(map(_EXPERT.search, self.modules))

    def expert(self) -> str | None:
        """A module of a routed expert that is NVFP4; None if there is none, or nobody knows."""
        return next((m for m in sorted(self.modules or ()) if _EXPERT.search(m)), None)

    def below(self, prefix: str) -> str | None:
        """A module below ``prefix`` that is NVFP4; None if there is none, or nobody knows."""
        start = f"{prefix}."
        return next((m for m in sorted(self.modules or ()) if m.startswith(start)), None)

    def scale_below(self, prefix: str) -> str | None:
        """The name of a scale of weights below ``prefix``, of any format; None if there is none, or
        nobody knows."""
        names = (name for ending in _SCALES for name in self._named(ending))
        return next((name for name in sorted(names) if name.startswith(f"{prefix}.")), None)

    def has(self, prefix: str, ending: str) -> bool:
        """Whether the checkpoint has a scale with this name somewhere below ``prefix``; no, if
        nobody knows."""
        start = f"{prefix}."
        return any(name.startswith(start) for name in self._named(f".{ending}"))

    def bias(self, experts: str) -> str | None:
        """The name of a bias of the experts at the module path ``experts``; None if there is none,
        or nobody knows."""
        start = f"{experts}."
        names = (name for name in self._biases if name.startswith(start))
        return next((name for name in names if _BIAS.fullmatch(name.removeprefix(start))), None)

    def router_bias(self, experts: str) -> str | None:
        """The name of the correction bias of the router in the layer of the experts at the module
        path ``experts``; None if there is none, or nobody knows."""
        layer = _LAYER.match(experts)
        names = (name for name in self._biases if layer and name.startswith(layer[0]))
        return next((name for name in names if _ROUTER.fullmatch(name)), None)
