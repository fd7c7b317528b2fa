"""Integers of 4 or 8 bits, packed into int32: compressed-tensors' ``pack-quantized``.

Kimi-K2-Thinking, K2.5 and K2.6 are published in nothing else. One weight ``X.weight`` ``[out, in]``
is stored as

* ``X.weight_packed``, I32 ``[out, ceil(in / n)]``, where ``n`` is 8 values of 4 bits or 4 of 8: the
  first value in the lowest bits, and what is left over at a row's end unused. A value is stored
  plus ``2 ** (bits - 1)``;
* ``X.weight_scale``, a float, ``[out, groups]``: one scale for each ``group_size`` inputs, or one
  for each row;
* ``X.weight_zero_point``, if values are not symmetric: ``[out, groups]``, of I8, or packed along
  ``out`` like the weight;
* ``X.weight_g_idx``, if groups are not neighbours (``actorder: group``): I32 ``[in]``, the group of
  each input, or -1 everywhere;
* ``X.weight_shape``, I32 or I64 ``[2]``: ``out`` and ``in``. Stacked experts have none.

The weight is ``(value - zero_point) * scale``. Only the config says how many bits there are and how
large groups are. Source: compressed-tensors 0.17's ``PackedQuantizationCompressor``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from quantize.checkpoint.descriptions import descriptions
from quantize.checkpoint.sources.lookup import INTEGERS, lookup
from quantize.checkpoint.sources.stored_weight import StoredWeight
from quantize.checkpoint.tensors import PLAIN, TensorInfo
from quantize.errors import QuantizeError

_FORMAT = "pack-quantized"
_WORD = 32  # bits of the integers that values are packed into
_PARTS = ("weight_zero_point", "weight_g_idx", "weight_shape")
_INPUTS = ("input_scale", "input_global_scale", "input_zero_point")
_ROWS = 256  # at a time, where each input's own scale is looked up


@dataclass(frozen=True)
class _Scheme:
    """What one of the config's groups says of its weights; ``group_size`` 0: one scale a row."""

    bits: int
    group_size: int
    symmetric: bool

    @property
    def per_word(self) -> int:
        """How many values one int32 holds."""
        return _WORD // self.bits

    def columns(self, codes: TensorInfo, scale: TensorInfo) -> int | None:
        """The weight's number of inputs, if codes and scales have the shapes for it."""
        *rows, words = codes.shape
        if len(scale.shape) != len(codes.shape) or scale.shape[:-1] != tuple(rows):
            return None
        if not self.group_size:
            return words * self.per_word if scale.shape[-1] == 1 else None
        columns = scale.shape[-1] * self.group_size
        return columns if -(-columns // self.per_word) == words else None


class PackQuantized:
    """``pack-quantized``; see ``quantize.checkpoint.sources.source_format.SourceFormat``."""

    name = "pack-quantized"
    config_names = frozenset({f"int{bits} ({_FORMAT})" for bits in INTEGERS})

    def find(self, stored: Mapping[str, TensorInfo], config: dict[str, Any]) -> list[StoredWeight]:
        schemes = list(_schemes(config))
        return [
            _weight(codes, stored, schemes)
            for codes in stored.values()
            if schemes and codes.dtype == "I32" and codes.name.endswith(".weight_packed")
        ]

    def complaint(self, info: TensorInfo) -> str | None:
        if (info.dtype == "I32" and info.name.endswith(".weight_packed")) or info.name.endswith(
            tuple(f".{part}" for part in _PARTS)
        ):
            return (
                "belongs to packed integers, and config.json describes none of 4 or 8 bits in "
                f"the format {_FORMAT} that they could be; take the config.json that came with them"
            )
        return None


PACK_QUANTIZED = PackQuantized()


def decode(
    codes: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    zero_point: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
    bits: int,
    columns: int,
) -> torch.Tensor:
    """Dequantize to float32 ``[..., out, in]``. The only rounding is that of the last product.

    Args:
        codes: int32 ``[..., out, ceil(in / n)]``.
        scale: float ``[..., out, groups]``.
        out: memory for the result, as for ``lookup``.
        zero_point: int32, packed along ``out``, or int8 ``[..., out, groups]``.
        g_idx: int32 ``[in]``, the number of each input's group; None if groups are neighbours.
        bits: 4 or 8.
        columns: ``in``.
    """
    *rows, words = codes.shape
    whole = words * (_WORD // bits) == columns
    values = lookup(codes.contiguous().view(torch.uint8), INTEGERS[bits], out if whole else None)
    if not whole:
        target = values.new_empty(*rows, columns) if out is None else out.view(*rows, columns)
        values = target.copy_(values[..., :columns])
    scale = scale.float()
    zero = None
    if zero_point is not None:
        zero = (_unpacked(zero_point, bits) if zero_point.dtype == torch.int32 else zero_point)[
            ..., : rows[-1], :
        ].float()
    if g_idx is None:
        groups = values.unflatten(-1, (scale.shape[-1], -1))
        if zero is not None:
            groups.sub_(zero.unsqueeze(-1))
        groups.mul_(scale.unsqueeze(-1))
        return values
    index = g_idx.long()
    for start in range(0, rows[-1], _ROWS):
        part = (..., slice(start, start + _ROWS), slice(None))
        if zero is not None:
            values[part].sub_(zero[part][..., index])
        values[part].mul_(scale[part][..., index])
    return values


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 ``[..., n, groups]``, packed along ``n``, as its signed values
    ``[..., n * 32 / bits, groups]``."""
    shifts = torch.arange(0, _WORD, bits, device=packed.device, dtype=torch.int32)
    values = (packed.unsqueeze(-2) >> shifts.unsqueeze(-1)) & ((1 << bits) - 1)
    return values.flatten(-3, -2) - (1 << (bits - 1))


def _schemes(config: dict[str, Any]) -> Iterator[tuple[list[str], _Scheme]]:
    """The config's groups of packed integers that can be read: their targets, and what they say."""
    for _, value in descriptions(config):
        groups = value.get("config_groups") if isinstance(value, dict) else None
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            if not isinstance(weights, dict) or weights.get("type") != "int":
                continue
            size: Any = weights.get("group_size")
            bits = weights.get("num_bits")
            form = group.get("format") or value.get("format")
            if form != _FORMAT or bits not in INTEGERS:
                continue
            channel = weights.get("strategy") == "channel" or size in (None, -1)
            if not channel and (type(size) is not int or size < 1):
                raise QuantizeError(
                    f"config.json: group_size is {size!r}; expected a positive integer"
                )
            targets = group.get("targets")
            names = [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []
            symmetric = weights.get("symmetric", True) is not False
            yield names, _Scheme(bits, 0 if channel else size, symmetric)


def _weight(
    codes: TensorInfo, stored: Mapping[str, TensorInfo], schemes: list[tuple[list[str], _Scheme]]
) -> StoredWeight:
    """The weight whose codes these are; raises QuantizeError if its tensors do not fit together."""
    module = codes.name.removesuffix(".weight_packed")
    where = f"{codes.file.name}: {codes.name}"
    scale = stored.get(f"{module}.weight_scale")
    if scale is None or scale.dtype not in PLAIN:
        found = "is missing" if scale is None else f"has dtype {scale.dtype}"
        raise QuantizeError(f"{where}: {module}.weight_scale {found}; download it again")
    scheme = _scheme_of(module, codes, scale, schemes)
    columns = scheme.columns(codes, scale)
    assert columns is not None
    shape = (*codes.shape[:-1], columns)
    if len(shape) < 2 or 0 in shape:
        raise QuantizeError(f"{where} has shape {list(codes.shape)}, expected a matrix")
    zero, index, size = (stored.get(f"{module}.{part}") for part in _PARTS)
    if zero is None and not scheme.symmetric:
        raise QuantizeError(
            f"{where}: {module}.weight_zero_point is missing, though config.json says that values "
            "are not symmetric; download the checkpoint again"
        )
    if zero is not None:
        rows = shape[-2] if zero.dtype == "I8" else -(-shape[-2] // scheme.per_word)
        _check_part(zero, ("I8", "I32"), (*shape[:-2], rows, scale.shape[-1]))
    if index is not None:
        _check_part(index, ("I32", "I64"), (columns,))
    inputs = [info for end in _INPUTS if (info := stored.get(f"{module}.{end}"))]
    extra = [info for info in (zero, index, size, *inputs) if info is not None]
    return StoredWeight(
        PACK_QUANTIZED.name,
        f"{module}.weight",
        shape,
        tuple(info.name for info in (codes, scale, *extra)),
        partial(
            _decode_parts, where, shape, scheme.bits, tuple(x is not None for x in (zero, index)),
            size is not None and len(shape) == 2,
        ),
        shared=frozenset(info.name for info in extra if info is not zero),
    )  # fmt: skip


def _decode_parts(
    where: str,
    shape: tuple[int, ...],
    bits: int,
    has: tuple[bool, ...],
    sized: bool,
    codes: torch.Tensor,
    scale: torch.Tensor,
    *extra: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`decode`, of the parts in their order.

    Raises:
        QuantizeError: if ``weight_shape`` or ``weight_g_idx`` say what cannot be.
    """
    rest = list(extra)
    zero, index = (rest.pop(0) if there else None for there in has)
    if sized and tuple(rest[0].tolist()) != shape:
        raise QuantizeError(
            f"{where}: its weight_shape is {rest[0].tolist()}, but codes, scales and config.json's "
            f"group_size make {list(shape)}; download the checkpoint again"
        )
    if index is not None:
        least, largest = int(index.min()), int(index.max())
        if least == largest == -1:  # written before groups were chosen: they are neighbours
            index = None
        elif least < 0 or largest >= scale.shape[-1]:
            raise QuantizeError(
                f"{where}: its weight_g_idx has groups {least} to {largest}, but there are "
                f"{scale.shape[-1]}; download the checkpoint again"
            )
    return decode(
        codes, scale, out, zero_point=zero, g_idx=index, bits=bits, columns=shape[-1]
    )  # fmt: skip


def _scheme_of(
    module: str,
    codes: TensorInfo,
    scale: TensorInfo,
    schemes: list[tuple[list[str], _Scheme]],
) -> _Scheme:
    """The scheme of a module: the one that its tensors have the shapes for. If several fit, the
    one whose targets name the module, as compressed-tensors' ``match_name`` compares them."""
    fitting = [(names, one) for names, one in schemes if one.columns(codes, scale) is not None]
    if len({one for _, one in fitting}) > 1:
        fitting = [(names, one) for names, one in fitting if _names(names, module)] or fitting
    if len({one for _, one in fitting}) == 1:
        return fitting[0][1]
    said = ", ".join(
        f"int{one.bits} with {f'groups of {one.group_size}' if one.group_size else 'a scale a row'}"
        for one in dict.fromkeys(one for _, one in schemes)
    )
    raise QuantizeError(
        f"{codes.file.name}: {codes.name} {list(codes.shape)} and {scale.name} {list(scale.shape)} "
        f"{'may be any' if fitting else 'are none'} of what config.json describes ({said}); "
        "download the checkpoint again, or correct its config"
    )


def _names(targets: list[str], module: str) -> bool:
    return any(
        re.match(target[3:], module) is not None if target.startswith("re:") else target == module
        for target in targets
    )


def _check_part(info: TensorInfo, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if info.dtype not in dtypes or info.shape != shape:
        raise QuantizeError(
            f"{info.file.name}: {info.name} is {info.dtype} {list(info.shape)}, expected "
            f"{' or '.join(dtypes)} {list(shape)}; download the checkpoint again"
        )
