"""One weight that is stored as several tensors, which belong together by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from quantize.checkpoint.descriptions import descriptions
from quantize.checkpoint.tensors import TensorInfo
from quantize.nvfp4.format import NvFp4

_SCALE = re.compile(r"(?:.*[._])?scales?(?:_inv|_2)?")
_INPUT_SCALES = ("input_scale", "activation_scale", "act_scale", "input_zero_point")
"""``act_scale`` is what AutoFP8 called ``input_scale`` at first."""


class Decode(Protocol):
    """A function from codes and scale to the float32 weight. ``out`` is memory for it, or None."""

    def __call__(
        self, codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class StoredWeight:
    """One weight that is stored as several tensors.

    Attributes:
        format: the name of its format, a key of ``quantize.checkpoint.sources.FORMATS``.
        name: the weight's name in an unquantized checkpoint.
        shape: the weight's shape. Stacked experts have a leading dimension of experts; each part
            then has it too.
        parts: the names of the stored tensors.
        decode: a function that takes the parts in that order, or one expert's slice of each, and
            returns the float32 weight. Its keyword ``out`` is memory for the result, with as many
            float32 values; without it, memory is allocated.
            An expert's slice of a part that has fewer dimensions than the weight is its share of
            the first dimension, in which experts lie one after another.
        shared: names of the parts that are the same for all stacked experts, and are not sliced.
        nvfp4: of a weight that is NVFP4, a function that takes the parts as ``decode`` does and
            returns what they are: ``[out, in]``, and the input scale, if there is one.
        input_scale: the name of the part that is an NVFP4 weight's input scale.
        input_scale_divides: whether that part is the reciprocal, by which inputs are multiplied.
    """

    format: str
    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    decode: Callable[..., torch.Tensor]
    shared: frozenset[str] = frozenset()
    nvfp4: Callable[..., tuple[NvFp4, torch.Tensor | None]] | None = None
    input_scale: str | None = None
    input_scale_divides: bool = False


def is_scale(name: str) -> bool:
    """Whether a stored tensor is a scale, judging by its name."""
    return _SCALE.fullmatch(name) is not None


def scale_of(name: str, stored: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The scale of the weight whose codes are stored as ``name``; None if there is none.

    ``weight_scale_inv`` (DeepSeek-V3, MiniMax) multiplies, just as ``weight_scale`` (ModelOpt,
    compressed-tensors, Quark) and ``scale`` (DeepSeek-V4) do. Transformers appends the same
    suffixes to stacked experts, as in ``gate_up_proj_scale_inv``.
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
    """The weight that is stored as a pair of codes and scale.

    Static scales of the weight's activations are among its parts too. ``decode`` does not get
    them, since the dequantized weight does not depend on them. As parts they are not copied to the
    target, where they would have no meaning.

    Args:
        fmt: the name of the format.
        name: the weight's name.
        shape: the weight's shape.
        pair: codes and scale.
        stored: every tensor in the checkpoint's files, by name.
        decode: dequantizes codes with scale.
    """
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    inputs = [stored[stem + suffix] for suffix in _INPUT_SCALES if stem + suffix in stored]
    parts = tuple(info.name for info in (*pair, *inputs))
    # A scale with one value for all of a stack cannot be sliced by expert.
    shared = {scale.name for scale in inputs if scale.shape[:1] != shape[:1]}

    def decode_pair(
        codes: torch.Tensor,
        scale: torch.Tensor,
        *_inputs: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return decode(codes, scale, out=out)

    return StoredWeight(fmt, name, shape, parts, decode_pair, frozenset(shared))


ALONE = (
    "is there without the weight that it belongs to, or that is not quantized; the checkpoint is "
    "incomplete or mixed up"
)
"""The complaint about codes without a scale, or a scale without codes."""


def quantization_config(config: dict[str, Any]) -> Any:
    """The first description of quantized weights in a ``config.json``; None if there is none.

    It is at the top level or in the config of a part, and may be called ``compression_config``.
    """
    return next((value for _, value in descriptions(config)), None)
