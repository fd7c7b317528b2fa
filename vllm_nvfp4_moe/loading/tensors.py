"""The tensors of which one NVFP4 weight of an expert consists: names, shapes and types.

A weight is a matrix ``[out, in]``. Each layout stores it as up to four tensors, of its own names,
and vLLM's layer holds the same ones for all its experts together.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from quantize.nvfp4.format import BLOCK

if TYPE_CHECKING:
    from quantize.layouts.layout import Layout


class TensorKind(Enum):
    """Which of a matrix's tensors one is: first those of its NVFP4 weight, in the order of
    ``Layout.suffixes``. A layout for weights alone has no input scale."""

    CODES = "codes"
    BLOCK_SCALE = "block scale"
    GLOBAL_SCALE = "global scale"
    INPUT_SCALE = "input scale"
    BIAS = "bias"
    """Floats, and no part of the weight: one for each of its rows. Few models have any."""


@dataclass(frozen=True)
class ExpertTensor:
    """What is true of one kind of tensor, whatever the layout.

    Attributes:
        kind: which one it is.
        canonical: its name after loading, behind ``w13_`` or ``w2_``. These are the names of vLLM's
            ``modelopt_fp4``, which vLLM's conversions for kernels expect.
        dtype: as stored and as loaded.
        granularity: what vLLM's loader calls it, a value of ``FusedMoeWeightScaleSupported``; None
            for what is not a scale.
        weights_per_element: how many neighbouring weights of a row one element belongs to; None if
            there is one number for the whole matrix.
    """

    kind: TensorKind
    canonical: str
    dtype: torch.dtype
    granularity: str | None
    weights_per_element: int | None

    @property
    def per_matrix(self) -> bool:
        """Whether it is one number for the whole matrix."""
        return self.weights_per_element is None

    def suffix(self, layout: Layout) -> str:
        """The end of its name in ``layout``."""
        return dict(zip(TensorKind, layout.suffixes, strict=False))[self.kind]

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Its shape for a weight ``[rows, columns]``: two sizes, none for a single number."""
        if self.weights_per_element is None:
            return ()
        return rows, columns // self.weights_per_element


EXPERT_TENSORS = {
    tensor.kind: tensor
    for tensor in (
        ExpertTensor(TensorKind.CODES, "weight", torch.uint8, None, 2),
        ExpertTensor(TensorKind.BLOCK_SCALE, "weight_scale", torch.float8_e4m3fn, "group", BLOCK),
        ExpertTensor(TensorKind.GLOBAL_SCALE, "weight_scale_2", torch.float32, "tensor", None),
        ExpertTensor(TensorKind.INPUT_SCALE, "input_scale", torch.float32, "tensor", None),
    )
}
"""An NVFP4 weight's, by kind, in the order of :class:`TensorKind`."""


def name_of(kind: TensorKind, layout: Layout) -> str:
    """What a tensor is called in ``layout``, after its module's path."""
    return kind.value if kind == TensorKind.BIAS else EXPERT_TENSORS[kind].suffix(layout)
