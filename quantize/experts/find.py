"""Finding a checkpoint's routed experts by the names and shapes of its tensors alone.

Two ways to store them are known:

* **stacked**: tensors with a leading dimension of experts, under the names in
  ``quantize.experts.names.STACKED``. Gate and up are in one tensor or in two, and each expert is
  stored as ``[out, in]`` or ``[in, out]``;
* **one tensor per expert**: ``….experts.E.gate_proj|up_proj|down_proj.weight`` or
  ``….experts.E.w1|w3|w2.weight``.

Experts without a gate have only up and down. Biases are found with their weights.

This module does not look for the activation function: that is the task of
``quantize.experts.identify``. Where shapes alone do not tell how a tensor is to be read, the config
does, and all sizes must agree with it (``quantize.experts.agreement``). Experts of
multi-token-prediction layers (``quantize.experts.drafting``) are not quantized, and those of towers
and talkers (``quantize.experts.parts``) only on request.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.experts.agreement import check_counts, check_group
from quantize.experts.drafting import is_drafting
from quantize.experts.group import ExpertGroup
from quantize.experts.names import SINGLE_PATTERN, STACKED_PATTERNS, natural_order
from quantize.experts.parts import config_of_part, other_part
from quantize.experts.single import single_groups
from quantize.experts.stacked import stacked_group, stored_twice


class _Found(NamedTuple):
    """A checkpoint's expert tensors, by the experts' module path (``prefix``).

    Attributes:
        stacked: by prefix and by kind (``gate_up``, ``down_bias``, ...).
        single: by prefix and by (expert, projection, ``weight`` or ``bias``).
    """

    stacked: dict[str, dict[str, TensorInfo]]
    single: dict[str, dict[tuple[int, str, str], TensorInfo]]


Asked = Callable[[str], bool]
"""Whether experts that are in another part than the language model are to be quantized, by their
module path."""


def find(checkpoint: Checkpoint, asked: Asked = lambda _: False) -> list[ExpertGroup]:
    """All groups of routed experts that are to be quantized, in the order of their names.

    Args:
        asked: about experts that are in another part than the language model.

    Raises:
        QuantizeError: if there are none (the message then lists the names of the tensors), if a
            group is incomplete, if its shapes disagree with each other or with the config, or if a
            dtype, size or way of storing it is not supported.
    """
    found = _collect(checkpoint)
    groups: list[ExpertGroup] = []
    for prefix, parts in found.stacked.items():
        if not _stays(checkpoint, prefix, asked):
            groups.append(stacked_group(prefix, parts, checkpoint, _config(checkpoint, prefix)))
    for prefix, single in found.single.items():
        if not _stays(checkpoint, prefix, asked):
            groups += single_groups(prefix, single, _config(checkpoint, prefix))
    if not groups:
        raise QuantizeError(_nothing_found(checkpoint))
    groups.sort(key=lambda g: (natural_order(g.prefix), g.first))
    check_counts([(group, _config(checkpoint, group.prefix)) for group in groups])
    for group in groups:
        check_group(group, checkpoint, _config(checkpoint, group.prefix))
    return groups


def left_as_is(checkpoint: Checkpoint, asked: Asked = lambda _: False) -> list[str]:
    """Module paths of the routed experts that :func:`find` leaves out."""
    found = _collect(checkpoint)
    left = (p for p in (*found.stacked, *found.single) if _stays(checkpoint, p, asked))
    return sorted(left, key=natural_order)


def _config(checkpoint: Checkpoint, prefix: str) -> dict[str, Any]:
    """The config of the part of the model that ``prefix`` is in."""
    return config_of_part(other_part(prefix, checkpoint.config), checkpoint.config)


def _stays(checkpoint: Checkpoint, prefix: str, asked: Asked) -> bool:
    other = other_part(prefix, checkpoint.config) is not None
    return is_drafting(prefix, _config(checkpoint, prefix)) or (other and not asked(prefix))


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


def _nothing_found(checkpoint: Checkpoint) -> str:
    kinds = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in checkpoint.tensors})
    shown = "\n  ".join(kinds[:40]) + ("\n  …" if len(kinds) > 40 else "")
    staying = left_as_is(checkpoint)
    others = [prefix for prefix in staying if other_part(prefix, checkpoint.config)]
    drafting = [prefix for prefix in staying if prefix not in others]
    left = ""
    if drafting:
        left += f"Multi-token-prediction layers stay as they are: {', '.join(drafting)}. "
    if others:
        left += f"So do experts outside of the language model: {', '.join(others)}. "
    return (
        f"{checkpoint.folder}: no routed experts found among {len(checkpoint.tensors)} tensors. "
        "Looked for '….experts.gate_up_proj' with '….experts.down_proj' (three dimensions), "
        "'….experts.E.w1|w3|w2.weight' and '….experts.E.gate_proj|up_proj|down_proj.weight', and "
        "names that some models have instead (docs/users/families.md). "
        f"{left}The tensors are (N for numbers):\n  {shown}"
    )
