"""Finding a checkpoint's routed experts by the names and shapes of its tensors alone.

Two ways to store them are known:

* **stacked**: tensors with a leading dimension of experts, under the names in
  ``quantize.experts.names.STACKED``. Gate and up are in one tensor or in two, and each expert is
  stored as ``[out, in]`` or ``[in, out]``;
* **one tensor per expert**: ``….experts.E.gate_proj|up_proj|down_proj.weight`` or
  ``….experts.E.w1|w3|w2.weight``.

Experts without a gate have only up and down. Biases are found with their weights.

This module builds no model and does not look for the activation function: that is the task of
``quantize.experts.identify``. Experts of multi-token-prediction layers are not quantized
(``quantize.experts.drafting``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import PLAIN, TensorInfo
from quantize.errors import QuantizeError
from quantize.experts.drafting import is_drafting
from quantize.experts.group import ExpertGroup
from quantize.experts.names import SINGLE_PATTERN, STACKED_PATTERNS, natural_order
from quantize.experts.single import single_groups
from quantize.experts.stacked import stacked_group, stored_twice
from quantize.nvfp4.format import BLOCK

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class _Found(NamedTuple):
    """A checkpoint's expert tensors, by the experts' module path (``prefix``).

    Attributes:
        stacked: by prefix and by kind (``gate_up``, ``down_bias``, ...).
        single: by prefix and by (expert, projection, ``weight`` or ``bias``).
    """

    stacked: dict[str, dict[str, TensorInfo]]
    single: dict[str, dict[tuple[int, str, str], TensorInfo]]


def find(checkpoint: Checkpoint) -> list[ExpertGroup]:
    """All groups of routed experts that are to be quantized, in the order of their names.

    Raises:
        QuantizeError: if there are none (the message then lists the names of the tensors), if a
            group is incomplete, if its shapes disagree, or if a dtype, size or way of storing it is
            not supported.
    """
    found = _collect(checkpoint)
    config = checkpoint.text_config()
    groups: list[ExpertGroup] = []
    for prefix, parts in found.stacked.items():
        if not is_drafting(prefix, config):
            groups.append(stacked_group(prefix, parts, checkpoint))
    for prefix, single in found.single.items():
        if not is_drafting(prefix, config):
            groups += single_groups(prefix, single, config)
    if not groups:
        raise QuantizeError(_nothing_found(checkpoint))
    for group in groups:
        _check(group, checkpoint)
    return sorted(groups, key=lambda g: (natural_order(g.prefix), g.first))


def left_as_is(checkpoint: Checkpoint) -> list[str]:
    """Module paths of the routed experts in multi-token-prediction layers, which are left out."""
    found = _collect(checkpoint)
    config = checkpoint.text_config()
    return sorted(
        (p for p in (*found.stacked, *found.single) if is_drafting(p, config)), key=natural_order
    )


def _collect(checkpoint: Checkpoint) -> _Found:
    """All expert tensors; raises QuantizeError if some experts are stored in two ways."""
    found = _Found(defaultdict(dict), defaultdict(dict))
    for name, info in checkpoint.tensors.items():
        if match := SINGLE_PATTERN.fullmatch(name):
            key = int(match["expert"]), match["kind"], match["what"]
            single = found.single[match["prefix"]]
            if (other := single.setdefault(key, info)) is not info:
                raise QuantizeError(
                    f"{other.name} and {name} would both be written as {match['prefix']}."
                    f"{'.'.join(map(str, key))}; remove the one that the model does not use"
                )
            continue
        for kind, suffix, pattern in STACKED_PATTERNS:
            # A shared expert or a dense MLP may have a matrix of the same name.
            match = pattern.fullmatch(name)
            if match and (not suffix or len(info.shape) == 3):
                parts = found.stacked[match["prefix"] + suffix]
                if (other := parts.setdefault(kind, info)) is not info:
                    raise stored_twice(match["prefix"] + suffix, other, info)
    for prefix, parts in list(found.stacked.items()):
        # JetMoE's attention has stacked projections of the same names, but they are no experts.
        if {"gate_up", "down"} <= set(parts) and _is_attention(parts["gate_up"], parts["down"]):
            del found.stacked[prefix]
        elif prefix in found.single:
            one, *_ = found.single[prefix].values()
            raise stored_twice(prefix, next(iter(parts.values())), one)
    return found


def _is_attention(up: TensorInfo, down: TensorInfo) -> bool:
    """Whether these are JetMoE's attention: ``up`` is as wide as ``down``, so it holds no gate."""
    stacked = up.name.endswith("_linear.weight")
    return stacked and up.shape == (up.shape[0], *down.shape[:0:-1])


def _check(group: ExpertGroup, checkpoint: Checkpoint) -> None:
    """Raise QuantizeError if a group's dtypes, sizes or number of experts are not supported."""
    for name in group.tensor_names:
        info = checkpoint.tensors[name]
        if info.dtype not in PLAIN:
            raise QuantizeError(
                f"{info.file.name}: {name} has dtype {info.dtype}; only {', '.join(PLAIN)} sources "
                "can be quantized (start from the original, unquantized checkpoint)"
            )
    sizes = (("hidden", group.hidden), ("intermediate", group.intermediate))
    for what, size in (("experts", group.num_experts), *sizes):
        if size < 1:
            raise QuantizeError(
                f"{group.tensor_names[0]}: {what} size {size}, there is nothing to quantize; "
                "download the checkpoint again"
            )
    for what, size in sizes:
        if size % BLOCK:
            raise QuantizeError(
                f"{group.prefix}: {what} size {size} is not a multiple of {BLOCK}, NVFP4's block"
            )
    config = checkpoint.text_config()
    counts = {key: config[key] for key in _EXPERT_COUNTS if isinstance(config.get(key), int)}
    if counts and group.num_experts not in counts.values():
        said = ", ".join(f"{key} = {value}" for key, value in counts.items())
        raise QuantizeError(f"{group.prefix} has {group.num_experts} experts; config.json: {said}")


def _nothing_found(checkpoint: Checkpoint) -> str:
    kinds = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in checkpoint.tensors})
    shown = "\n  ".join(kinds[:40]) + ("\n  …" if len(kinds) > 40 else "")
    drafting = left_as_is(checkpoint)
    left = f"Multi-token-prediction layers stay as they are: {', '.join(drafting)}. "
    return (
        f"{checkpoint.folder}: no routed experts found among {len(checkpoint.tensors)} tensors. "
        "Looked for '….experts.gate_up_proj' with '….experts.down_proj' (three dimensions), "
        "'….experts.E.w1|w3|w2.weight' and '….experts.E.gate_proj|up_proj|down_proj.weight', and "
        "names that some models have instead (docs/users/families.md). "
        f"{left if drafting else ''}The tensors are (N for numbers):\n  {shown}"
    )
