"""NVFP4, as others publish it: codes, block scales, a global scale, perhaps an input scale.

A weight ``X`` is stored in one of these ways, whose bits mean the same (``quantize.nvfp4.format``):

* ModelOpt: ``X.weight`` U8 ``[out, in / 2]``, ``X.weight_scale`` F8_E4M3 ``[out, in / 16]``,
  ``X.weight_scale_2`` F32, which multiplies, ``X.input_scale`` F32;
* compressed-tensors: ``X.weight_packed``, ``X.weight_scale``, ``X.weight_global_scale``, which
  divides, ``X.input_global_scale``, which divides;
* stacked experts, with the names of either, or behind the stack's own name: ``X``,
  ``X_weight_scale``, ``X_weight_scale_2``, ``X_input_scale`` (ModelOpt, Llama 4) or ``X``,
  ``X_scale``, ``X_global_scale``, ``X_input_global_scale``. Global and input scales are one for the
  stack or one for each expert. Codes are ``[experts, out, in / 2]``, or ``[experts, in / 2, out]``
  where the unquantized stack is ``[experts, in, out]`` (ModelOpt turns it back once its blocks are
  packed), or ``[experts * out, in / 2]`` (llm-compressor);
* Inkling2Loop: ``X``, ``X_scale``, and a global scale of each expert that is ``X_amax`` divided by
  ``X_outer_scale_denominator``. Source: Transformers 5.24's ``Inkling2LoopDequantizeExperts``.

A weight is presented as floats like any other, and as what it is by ``StoredWeight.nvfp4``, so that
it need not be quantized again. A scale that divides is taken by its reciprocal, rounded to float32,
as vLLM takes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from quantize.checkpoint.language import language_config
from quantize.checkpoint.sources.lookup import E2M1_PAIRS, lookup
from quantize.checkpoint.sources.stored_weight import ALONE, StoredWeight, is_scale
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.nvfp4.format import BLOCK, NvFp4


class _Naming(NamedTuple):
    """How names of a weight's tensors end; ``name`` is what the unquantized weight is called."""

    name: str
    codes: str
    block_scale: str
    global_scale: str
    input_scale: str
    divides: bool
    denominator: str = ""


_NAMINGS = (
    _Naming(".weight", ".weight", ".weight_scale", ".weight_scale_2", ".input_scale", False),
    _Naming(
        ".weight", ".weight_packed", ".weight_scale", ".weight_global_scale",
        ".input_global_scale", True,
    ),
    _Naming("", "", "_weight_scale", "_weight_scale_2", "_input_scale", False),
    _Naming("", "", "_scale", "_global_scale", "_input_global_scale", True),
    _Naming("", "", "_scale", "_amax", "_input_scale", False, "_outer_scale_denominator"),
)  # fmt: skip
_GLOBAL = ("weight_scale_2", "_global_scale", "_outer_scale_denominator")
_MORE = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
"""Tensors by which inputs or outputs are changed, so that codes and scales are not the weight."""

_STACK = re.compile(r".*\.experts\.(?:gate_up_proj|gate_proj|up_proj|down_proj)")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class NvFp4Source:
    """NVFP4; see ``quantize.checkpoint.sources.source_format.SourceFormat``."""

    name = "nvfp4"
    config_names = frozenset({"nvfp4", "w4a16_nvfp4", "nvfp4-pack-quantized"})

    def find(self, stored: Mapping[str, TensorInfo], config: dict[str, Any]) -> list[StoredWeight]:
        found = []
        for codes in stored.values():
            if codes.dtype not in ("U8", "I8") or is_scale(codes.name):
                continue
            for naming in _NAMINGS:
                if weight := _weight(codes, naming, stored, config):
                    found.append(weight)
                    break
        return found

    def complaint(self, info: TensorInfo) -> str | None:
        if info.name.endswith(_MORE):
            return (
                "changes what a weight's inputs or outputs are multiplied by, as NVFP4_AWQ and "
                "SVDQuant do; such weights cannot be read; start from the original checkpoint"
            )
        block_scale = info.dtype == "F8_E4M3" and is_scale(info.name) and len(info.shape) > 1
        return ALONE if block_scale or info.name.endswith(_GLOBAL) else None


NVFP4 = NvFp4Source()


def decode(
    codes: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dequantize to float32 ``[..., in]``, with the roundings of ``quantize.nvfp4.format``.

    Args:
        codes: bytes ``[..., in / 2]``.
        block_scale: E4M3 ``[..., in / 16]``.
        global_scale: float32, which broadcasts against ``block_scale``.
        out: memory for the result, as for ``lookup``.
    """
    values = lookup(codes, E2M1_PAIRS, out)
    step = block_scale.float() * global_scale
    values.unflatten(-1, (-1, BLOCK)).mul_(step.unsqueeze(-1))
    return values


def _weight(
    codes: TensorInfo,
    naming: _Naming,
    stored: Mapping[str, TensorInfo],
    config: dict[str, Any],
) -> StoredWeight | None:
    """The weight whose codes these are, if its tensors are called so; else None.

    Raises:
        QuantizeError: if they do not fit together.
    """
    # Names that end so belong to the first two ways alone.
    linear = codes.name.endswith((".weight", ".weight_packed"))
    if linear != bool(naming.codes) or not codes.name.endswith(naming.codes):
        return None
    stem = codes.name.removesuffix(naming.codes)
    ends = (naming.block_scale, naming.global_scale, naming.denominator)
    scales = [stored.get(stem + end) for end in ends if end]
    block_scale, *factors = scales
    if block_scale is None or block_scale.dtype != "F8_E4M3" or None in factors:
        return None
    shape, transposed = _shape(codes, block_scale, stem, config)
    inputs = stored.get(stem + naming.input_scale)
    numbers = [info for info in (*factors, inputs) if info is not None]
    shared = set()
    for info in numbers:
        if info.dtype != "F32" or info.shape not in _number_shapes(shape):
            raise QuantizeError(
                f"{info.file.name}: {info.name} is {info.dtype} {list(info.shape)}; expected F32, "
                f"one number{' for all experts or for each' * (len(shape) == 3)}"
            )
        if info.shape in ((), (1,)):
            shared.add(info.name)
    restore = partial(_restore, f"{codes.file.name}: {stem}", naming, shape, transposed)
    return StoredWeight(
        NVFP4.name,
        stem + naming.name,
        (*shape[:-2], *shape[:-3:-1]) if transposed else shape,
        (codes.name, block_scale.name, *(info.name for info in numbers)),
        partial(_decode_parts, restore, transposed),
        frozenset(shared),
        restore,
        inputs.name if inputs is not None else None,
        naming.divides,
    )


def _number_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes of a scale of which there is one for the whole weight, or for each stacked expert."""
    one: tuple[tuple[int, ...], ...] = ((), (1,))
    if len(shape) < 3 or shape[0] == 1:
        return one
    return (*one, shape[:1], (shape[0], 1), (shape[0], 1, 1))


def _shape(
    codes: TensorInfo, scale: TensorInfo, stem: str, config: dict[str, Any]
) -> tuple[tuple[int, ...], bool]:
    """The weight's shape as ``[..., out, in]``, and whether the last two are exchanged in files.

    Raises:
        QuantizeError: if codes and block scales do not fit together.
    """
    per_scale = BLOCK // 2  # bytes
    count = len(codes.shape)
    if count in (2, 3) and len(scale.shape) == count and 0 not in codes.shape + scale.shape:
        *rows, last = codes.shape
        if scale.shape == (*rows, last // per_scale) and last % per_scale == 0:
            experts = _experts(config) if count == 2 and _STACK.fullmatch(stem) else None
            if experts and experts > 1 and rows[0] % experts == 0:
                return (experts, rows[0] // experts, 2 * last), False
            return (*rows, 2 * last), False
        first, middle, last = (1, *codes.shape)[-3:]
        if count == 3 and scale.shape == (first, middle // per_scale, last):
            return (first, last, 2 * middle), True
    raise QuantizeError(
        f"{codes.file.name}: {codes.name} {list(codes.shape)} and {scale.name} "
        f"{list(scale.shape)} do not fit together: NVFP4 has two codes a byte and one scale for "
        f"{BLOCK} codes; download the checkpoint again"
    )


def _experts(config: dict[str, Any]) -> int | None:
    """The number of experts in each layer, as the config states it."""
    said = language_config(config)
    found = [said[key] for key in _COUNTS if type(said.get(key)) is int and said[key] > 0]
    return found[0] if found else None


def _restore(
    where: str, naming: _Naming, shape: tuple[int, ...], transposed: bool, *parts: torch.Tensor
) -> tuple[NvFp4, torch.Tensor | None]:
    """The weight or one expert of it, ``[out, in]``, and its input scale, from its parts.

    Raises:
        QuantizeError: if the global scale is one that multiplies where it should divide.
    """
    codes, block_scale, *numbers = parts
    codes = codes.view(torch.uint8)
    if codes.dim() == 2 and len(shape) == 3 and len(codes) == shape[0] * shape[1]:
        codes, block_scale = (part.unflatten(0, shape[:2]) for part in (codes, block_scale))
    if transposed:
        codes, block_scale = codes.mT.contiguous(), block_scale.mT.contiguous()
    factor = numbers.pop(0).float()
    if naming.denominator:
        factor = factor / numbers.pop(0).float()
    if naming.divides:
        if bool((factor < 1).any()):
            raise QuantizeError(
                f"{where}{naming.global_scale} is {float(factor.min()):.6g}. It divides, so weights"
                " would be as large as thousands; its tool has stored a factor under this name"
            )
        factor = factor.reciprocal()
    input_scale = numbers[0].float() if numbers else None
    if input_scale is not None and naming.divides:
        input_scale = input_scale.reciprocal()
    one = [None if n is None else _per_matrix(n, codes) for n in (factor, input_scale)]
    assert one[0] is not None
    return NvFp4(codes, block_scale, one[0]), one[1]


def _per_matrix(number: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """A scalar, or for a whole stack ``[experts, 1, 1]``."""
    return (
        number.reshape(()) if number.numel() == 1 else number.reshape(-1, *[1] * (codes.dim() - 1))
    )


def _decode_parts(
    restore: Any, transposed: bool, *parts: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`decode`, of the parts in their order; a view if the stack is ``[…, in, out]``."""
    (codes, block_scale, global_scale), _ = restore(*parts)
    values = decode(codes, block_scale, global_scale, out)
    return values.mT if transposed else values
