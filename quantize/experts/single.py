"""Groups of experts that are stored as one tensor for each projection of each expert."""

from __future__ import annotations

from typing import Any

from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.experts.names import PROJECTIONS
from quantize.experts.stated import modalities
from quantize.experts.unused import zero_experts


def single_groups(
    prefix: str, parts: dict[tuple[int, str, str], TensorInfo], config: dict[str, Any]
) -> list[ExpertGroup]:
    """The groups of experts at the module path ``prefix``; several if experts differ in size.

    Args:
        parts: the tensors, by (expert, projection, ``weight`` or ``bias``).
        config: the config of the part of the model that the experts are in.

    Raises:
        QuantizeError: if a tensor is missing or has the wrong shape, or if names are mixed.
    """
    kinds = {kind for _, kind, _ in parts}
    sets = (*PROJECTIONS, PROJECTIONS[0][1:])
    names = min((n for n in sets if kinds <= set(n)), key=len, default=None)
    if names is None:
        raise QuantizeError(f"{prefix}: mixes names of projections: {', '.join(sorted(kinds))}")
    experts = 1 + max(expert for expert, _, _ in parts)
    unused: list[str] = []
    zero = zero_experts(config)
    if 0 < zero < experts:
        beyond = [key for key in parts if key[0] >= experts - zero]
        if not any(kind == names[-1] for _, kind, _ in beyond):
            unused = [parts[key].name for key in beyond]
            experts -= zero
    count = modalities(config)
    share = experts if experts % count else experts // count
    return [
        _single_group(prefix, parts, names, range(first, first + share), unused)
        for first in range(0, experts, share)
    ]


def _single_group(
    prefix: str,
    parts: dict[tuple[int, str, str], TensorInfo],
    names: tuple[str, ...],
    experts: range,
    unused: list[str],
) -> ExpertGroup:
    first = parts.get((experts[0], names[0], "weight"))
    shape = first.shape if first else ()  # if missing, the loop raises before it uses it
    biased = any((expert, name, "bias") in parts for expert in experts for name in names)
    found: dict[str, list[str]] = {"weight": [], "bias": []}
    for expert in experts:
        for kind in names:
            matrix = shape[::-1] if kind == names[-1] else shape
            for what, expected in (("weight", matrix), ("bias", matrix[:1])):
                info = parts.get((expert, kind, what))
                if what == "bias" and not biased:
                    continue
                if info is None:
                    raise QuantizeError(f"{prefix}.{expert}.{kind}.{what} is missing")
                if info.shape != expected or (what == "weight" and len(info.shape) != 2):
                    raise QuantizeError(
                        f"{info.name} has shape {list(info.shape)}, expected {list(expected)}"
                    )
                found[what].append(info.name)
    return ExpertGroup(
        prefix,
        len(experts),
        shape[1],
        shape[0],
        False,
        names,
        (*found["weight"], *found["bias"], *unused),
        bias_names=tuple(found["bias"]),
        first=experts[0],
    )
