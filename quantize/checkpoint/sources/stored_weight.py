"""How the stored tensors of one weight belong together: by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from quantize.checkpoint.tensors import TensorInfo

_SCALE = re.compile(r"(?:.*[._])?scales?(?:_inv|_2)?")
_INPUT_SCALES = ("input_scale", "activation_scale")


class Decode(Protocol):
    """Codes and scale to the float32 weight, in ``out`` if given."""

    def __call__(
        self, codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class StoredWeight:
    """One weight that is stored as several tensors.

    Attributes:
        format: name of its :class:`quantize.checkpoint.sources.SourceFormat`.
        name: what the weight is called in an unquantized checkpoint.
        shape: of the weight; stacked experts have a leading dimension, in the parts too.
        parts: names of the stored tensors.
        decode: from the parts, in that order (or from one expert's slice of each), to the float32
            weight; ``out`` is memory for it, as many float32 values, and new if not given.
    """

    format: str
    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    decode: Callable[..., torch.Tensor]


def is_scale(name: str) -> bool:
    """Whether a stored tensor is a scale, going by its name."""
    return _SCALE.fullmatch(name) is not None


def scale_of(name: str, stored: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The scale of a weight that is stored under its own name.

    ``weight_scale_inv`` (DeepSeek-V3, MiniMax) multiplies just as ``weight_scale`` (ModelOpt,
    compressed-tensors, Quark) and ``scale`` (DeepSeek-V4) do. Transformers appends the same
    suffixes to stacked experts: ``gate_up_proj_scale_inv``.
    """
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if name.endswith(".weight"):
        names.append(name.removesuffix("weight") + "scale")
    return next((stored[n] for n in names if n in stored), None)


def from_pair(
    fmt: str,
    name: str,
    shape: tuple[int, ...],
    pair: tuple[TensorInfo, TensorInfo],
    stored: Mapping[str, TensorInfo],
    decode: Decode,
) -> StoredWeight:
    """The weight of ``pair``, codes and scale, which ``decode`` takes.

    Static scales of the weight's inputs are among its parts, unused: they mean nothing to the
    dequantized weight, and must not stay behind.
    """
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    inputs = [stored[stem + suffix] for suffix in _INPUT_SCALES if stem + suffix in stored]
    if len(shape) > 2:  # only what has one value an expert can be sliced with the rest
        inputs = [scale for scale in inputs if scale.shape[:1] == shape[:1]]
    parts = tuple(info.name for info in (*pair, *inputs))

    def decode_pair(
        codes: torch.Tensor,
        scale: torch.Tensor,
        *_inputs: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return decode(codes, scale, out=out)

    return StoredWeight(fmt, name, shape, parts, decode_pair)


ALONE = (
    "is there without the weight that it belongs to, or that is not quantized; the checkpoint is "
    "incomplete or mixed up"
)
"""A complaint about codes or scales that have lost their counterpart."""


def quantization_config(config: dict[str, Any]) -> Any:
    """``quantization_config`` of a ``config.json``: at the top, or the language model's own."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if place.get(key) is not None:
                return place[key]
    return None
