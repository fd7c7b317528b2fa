"""The ``targets`` of a group of modules in compressed-tensors' config: names and patterns.

A layer's experts are one pattern, for two reasons. Engines look for them by names that the files
need not have: vLLM asks for ``LAYER.mlp.experts.0.gate_proj``, or whatever its class for the model
says, and MiniMax-M3's says nothing, though its files have ``w1`` (``get_moe_method`` in
``compressed_tensors_moe.py``, and ``FusedMoEFactory`` without ``ckpt_names`` in
``models/minimax_m3/nvidia/model.py``; seen in 0.32 and 0.33). What no target matches is taken for
one of the first group's. And 128 experts in 57 layers are megabytes of names.

vLLM maps names of targets to its own modules', but no patterns. So patterns leave open what is
before the layer and between it and its experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from quantize.experts.names import is_expert
from quantize.layouts.siblings import absent_siblings

PATTERN = "re:"
"""What a target begins with that is a regular expression."""

_LAYER = re.compile(r"(?:.*\.)?(?P<layer>\w+\.\d+)\..*")
"""The innermost numbered thing that has the experts: ``layers.3``, ``blocks.3``."""


def targets(modules: Iterable[str], others: Iterable[str], by_name: bool = False) -> list[str]:
    """Targets for these modules, in order.

    Args:
        modules: module paths of what a group is for.
        others: module paths of what other groups are for, the first group's among them.
        by_name: experts by their names alone, as ``Beside.experts_by_name``.
    """
    names = set(modules)
    if by_name:
        return sorted(names)
    others = set(others)
    names |= absent_siblings(names, others)
    experts = {_experts(name): name for name in sorted(names) if is_expert(name)}
    found = {name for name in names if not is_expert(name)}
    rest = {_experts(name) or name: name for name in {*others, *found}}
    for prefix, expert in experts.items():
        pattern = _pattern(prefix)
        apart = [name for key, name in (*rest.items(), *experts.items()) if key != prefix]
        if pattern is None or any(re.match(pattern, name) for name in apart):
            # vLLM maps the names, and the pattern is for classes that leave the path as it is.
            pattern = rf"{re.escape(prefix)}\.\d+\."
            found.update(name for name in names if _experts(name) == prefix)
        assert re.match(pattern, expert)
        found.add(f"{PATTERN}{pattern}")
    return sorted(found)


def named(group: Any, module: str) -> bool:
    """Whether a target of ``group``, one of a config's ``config_groups``, names the module, as the
    library's ``match_name`` compares them; a class of modules, as ``Linear``, does not."""
    listed = group.get("targets") if isinstance(group, dict) else None
    return any(
        _matches(target[len(PATTERN) :], module) if target.startswith(PATTERN) else target == module
        for target in (listed if isinstance(listed, list) else ())
        if isinstance(target, str)
    )


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error:
        return False


def _experts(module: str) -> str:
    """The path of the experts that one of them is of; empty if it is no expert."""
    return module.rsplit(".", 2)[0] if is_expert(module) else ""


def _pattern(prefix: str) -> str | None:
    """What matches all modules of the experts at ``prefix``, wherever an engine has the layer, and
    whatever it calls their projections; None if no layer is numbered."""
    found = _LAYER.fullmatch(prefix)
    return found and rf"(?:.*\.)?{re.escape(found['layer'])}\.(?:.*\.)?\w*experts\.\d+\."
