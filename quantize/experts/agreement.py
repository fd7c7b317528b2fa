"""Whether groups of experts are what the config says, and whether they can be quantized."""

from __future__ import annotations

from typing import Any

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.sources.fp8_block import without_scale
from quantize.checkpoint.tensors import PLAIN
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.experts.stated import Stated, stated
from quantize.nvfp4.format import BLOCK


def check_counts(groups: list[tuple[ExpertGroup, dict[str, Any]]]) -> None:
    """Raise QuantizeError if a config contradicts itself about the number of experts.

    Args:
        groups: all groups, each with the config of the part that it is in.
    """
    for group, config in groups:
        said = stated(config, group.prefix).num_experts
        if len(set(said.values())) < 2:
            continue
        alike: dict[int, list[str]] = {}
        for other, its in groups:
            if its is config:
                alike.setdefault(other.num_experts, []).append(other.prefix)
        there = "; ".join(
            f"{prefixes[0]}{f' and {len(prefixes) - 1} more' * (len(prefixes) > 1)} "
            f"{'have' if len(prefixes) > 1 else 'has'} {count}"
            for count, prefixes in sorted(alike.items(), key=lambda item: len(item[1]))
        )
        keys = ", ".join(f"{key} = {' or '.join(map(str, v))}" for key, v in said.items())
        raise QuantizeError(
            f"config.json contradicts itself: {keys}. Of experts, {there}. Correct the config, or "
            "prune the layers alike"
        )


def check_group(group: ExpertGroup, checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """Raise QuantizeError if a group cannot be quantized, or is not what ``config`` says.

    Args:
        config: of the part of the model that the group is in.
    """
    for name in group.tensor_names:
        info = checkpoint.tensors[name]
        if without_scale([info]):
            raise QuantizeError(
                f"{info.file.name}: {name} is {info.dtype}, but has no scale that is known "
                f"({name}_scale_inv, {name}_scale); without one, its values mean nothing; download "
                "the checkpoint again, or start from the original one"
            )
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
    said = stated(config, group.prefix)
    if said.num_experts and all(group.num_experts not in v for v in said.num_experts.values()):
        raise QuantizeError(
            f"{group.prefix} has {group.num_experts} experts; config.json: {said}; download the "
            "checkpoint again, or correct its config"
        )
    if problem := per_token_problem(said, group.num_experts):
        raise QuantizeError(
            f"config.json: {group.prefix} has {group.num_experts} experts, but {problem}"
        )
    if not said.fits(group.hidden, group.intermediate):
        exchanged = said.fits(group.intermediate, group.hidden)
        raise QuantizeError(
            f"{checkpoint.tensors[group.tensor_names[0]].file.name}: {group.tensor_names[0]} and "
            f"{group.weights_of(0)[-1]} are experts with hidden size {group.hidden} and "
            f"intermediate size {group.intermediate}; config.json: {said}. "
            + "These are exchanged: the weights must be stored as [out, in]" * exchanged
            + "Download the checkpoint again, or correct its config" * (not exchanged)
        )
    for what, size in sizes:
        if size % BLOCK:
            raise QuantizeError(
                f"{group.prefix}: {what} size {size} is not a multiple of {BLOCK}, NVFP4's block"
            )


def per_token_problem(said: Stated, num_experts: int) -> str | None:
    """What is wrong with how many of a layer's experts the config says a token goes to."""
    for key, values in said.per_token.items():
        if all(not 1 <= value <= num_experts for value in values):
            return (
                f"{key} is {' or '.join(map(str, values))}, expected 1 to {num_experts}; correct "
                "it, or download the checkpoint again"
            )
    return None
