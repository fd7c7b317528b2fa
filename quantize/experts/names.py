"""The names that tensors of routed experts have in all known checkpoints."""

from __future__ import annotations

import re

PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""The names of gate, up and down, in either of two conventions."""

EXPERTS = r"(?P<prefix>(?:.*\.)?experts)\."
STACKED: tuple[tuple[str, str, str], ...] = (
    ("gate_up", "", EXPERTS + r"gate_up_proj(?:\.weight)?"),
    ("gate", "", EXPERTS + r"gate_proj(?:\.weight)?"),
    ("up", "", EXPERTS + r"up_proj(?:\.weight)?"),
    ("down", "", EXPERTS + r"down_proj(?:\.weight)?"),
    ("gate_up_bias", "", EXPERTS + r"gate_up_proj(?:_|\.)bias"),
    ("gate_bias", "", EXPERTS + r"gate_proj(?:_|\.)bias"),
    ("up_bias", "", EXPERTS + r"up_proj(?:_|\.)bias"),
    ("down_bias", "", EXPERTS + r"down_proj(?:_|\.)bias"),
    # Aria
    ("gate_up", "", EXPERTS + r"fc1\.weight"),
    ("down", "", EXPERTS + r"fc2\.weight"),
    # Inkling
    ("gate_up", "", EXPERTS + r"w13_weight"),
    ("down", "", EXPERTS + r"w2_weight"),
    # Granite, JetMoE
    ("gate_up", ".experts", r"(?P<prefix>.*)\.input_linear\.weight"),
    ("down", ".experts", r"(?P<prefix>.*)\.output_linear\.weight"),
    # Step-3.7
    ("gate", ".experts", r"(?P<prefix>.*\.moe)\.gate_proj\.weight"),
    ("up", ".experts", r"(?P<prefix>.*\.moe)\.up_proj\.weight"),
    ("down", ".experts", r"(?P<prefix>.*\.moe)\.down_proj\.weight"),
    # DBRX: two dimensions; the experts' rows lie one after another
    ("gate", "", EXPERTS + r"mlp\.w1"),
    ("up", "", EXPERTS + r"mlp\.v1"),
    ("down", "", EXPERTS + r"mlp\.w2"),
)
"""Names of stacked tensors, as (kind, suffix, pattern).

``pattern`` matches the whole name. Its group ``prefix``, followed by ``suffix``, is the experts'
module path.
"""

STACKED_PATTERNS = [(kind, suffix, re.compile(pattern)) for kind, suffix, pattern in STACKED]
SINGLE_PATTERN = re.compile(
    EXPERTS + r"(?P<expert>[0-9]{1,9})\."
    rf"(?P<kind>{'|'.join(name for names in PROJECTIONS for name in names)})"
    r"\.(?P<what>weight|bias)"
)
_MODULE = re.compile(
    EXPERTS + rf"[0-9]{{1,9}}\.(?:{'|'.join(name for names in PROJECTIONS for name in names)})"
)
_EXPERT = re.compile(r"\bexperts\.([0-9]{1,9})\.")
_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]{1,9})\.")


def layer_number(name: str) -> int | None:
    """The number of the decoder layer that holds a tensor or module; None if no layer does."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def where_of(name: str) -> str:
    """Which layer and expert a tensor or module is of, in words; its name if it is of no layer."""
    number, expert = layer_number(name), _EXPERT.search(name)
    if number is None:
        return name
    return f"layer {number}" + (f", expert {expert[1]}" if expert else "")


def is_expert(module: str) -> bool:
    """Whether a module path is that of a routed expert's written weight."""
    return _MODULE.fullmatch(module) is not None


def natural_order(name: str) -> list[int | str]:
    """A sort key for names that compares the numbers in them by value."""
    parts = re.split(r"([0-9]{1,9})", name)  # every second part is a number
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def ignored_modules(prefix: str) -> set[str]:
    """The entries of an ignore list that make engines load the experts at ``prefix`` unquantized.

    An engine looks for the experts' module path or for the projections of expert 0, whichever way
    the experts are stored.
    """
    return {prefix} | {f"{prefix}.0.{name}" for names in PROJECTIONS for name in names}
