"""Groups of experts that are stacked in tensors with a leading dimension of experts."""

from __future__ import annotations

from typing import Any

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.experts.names import PROJECTIONS
from quantize.experts.orientation import Orientation, settled
from quantize.experts.unused import zero_experts


def stored_twice(prefix: str, one: TensorInfo, other: TensorInfo) -> QuantizeError:
    """The error for a checkpoint that stores the experts at ``prefix`` in two ways."""
    return QuantizeError(
        f"{prefix}: {one.name} and {other.name} are two ways to store the same experts; remove "
        "the tensors that the model does not use"
    )


def stacked_group(
    prefix: str, parts: dict[str, TensorInfo], checkpoint: Checkpoint, config: dict[str, Any]
) -> ExpertGroup:
    """The group of experts at the module path ``prefix``.

    Args:
        parts: the tensors, by their kind in ``quantize.experts.names.STACKED``.
        config: the config of the part of the model that the experts are in.

    Raises:
        QuantizeError: if a tensor is missing, or if shapes do not fit together.
    """
    joined = "gate_up" in parts or not {"gate", "up"} & set(parts)
    kinds: tuple[str, ...] = ("gate_up", "down") if joined else ("gate", "up", "down")
    if joined and (separate := [parts[kind] for kind in ("gate", "up") if kind in parts]):
        raise stored_twice(prefix, parts["gate_up"], separate[0])
    if not joined and "gate" not in parts:
        kinds = kinds[1:]
    if missing := [kind for kind in kinds if kind not in parts]:
        raise QuantizeError(
            f"{prefix}.{missing[0]}_proj is missing, though its counterpart exists "
            f"({', '.join(info.name for info in parts.values())})"
        )
    weights = [parts[kind] for kind in kinds]
    if parts["down"].name.endswith("mlp.w2"):
        return _flat_group(prefix, weights, config)
    for info in weights:
        if len(info.shape) != 3:
            raise QuantizeError(
                f"{info.name} has shape {list(info.shape)}; "
                "stacked experts must have three dimensions"
            )
    shapes = [info.shape for info in weights]
    wide = 2 if joined else 1
    experts, hidden, intermediate = shapes[-1]
    # LongCat's gate_up has entries for zero experts too: they have no down and are never used.
    unused = zero_experts(config)
    fitting: list[Orientation] = []
    for one in ((hidden, intermediate, False), (intermediate, hidden, True)):
        hidden, intermediate, transposed = one
        matrix = (hidden, wide * intermediate) if transposed else (wide * intermediate, hidden)
        allowed = ((experts, *matrix), (experts + unused, *matrix))
        if all(shape in allowed for shape in shapes[:-1]):
            fitting.append(one)
    if not fitting:
        raise QuantizeError(
            f"{' and '.join(f'{i.name} {list(i.shape)}' for i in weights)} do not fit together; "
            f"expected [experts, {'2 * ' * joined}intermediate, hidden] and "
            "[experts, hidden, intermediate]"
        )
    hidden, intermediate, transposed = settled(prefix, weights, fitting, checkpoint, config)
    sizes = [*[wide * intermediate] * (len(kinds) - 1), hidden]
    biases = _stacked_biases(prefix, parts, kinds, [(experts, size) for size in sizes])
    return ExpertGroup(
        prefix,
        experts,
        hidden,
        intermediate,
        True,
        PROJECTIONS[0] if joined or len(kinds) == 3 else PROJECTIONS[0][1:],
        tuple(info.name for info in weights) + biases,
        transposed,
        biases,
        _interleaved(weights[0], checkpoint),
        joined,
    )


def _flat_group(prefix: str, weights: list[TensorInfo], config: dict[str, Any]) -> ExpertGroup:
    """DBRX's group: three tensors ``[experts * intermediate, hidden]``."""
    nested = config.get("ffn_config")
    experts = nested.get("moe_num_experts") if isinstance(nested, dict) else None
    shape = weights[0].shape
    fits = len(weights) == 3 and len(shape) == 2 and all(info.shape == shape for info in weights)
    if not isinstance(experts, int) or experts < 1 or not fits or shape[0] % experts:
        raise QuantizeError(
            f"{' and '.join(f'{i.name} {list(i.shape)}' for i in weights)} do not fit together; "
            "expected three of [experts * intermediate, hidden], and ffn_config.moe_num_experts, "
            f"which is {experts}"
        )
    names = tuple(info.name for info in weights)
    sizes = experts, shape[1], shape[0] // experts
    return ExpertGroup(prefix, *sizes, True, PROJECTIONS[0], names, flat=True)


def _interleaved(info: TensorInfo, checkpoint: Checkpoint) -> bool | None:
    """Whether the rows of gate and up alternate, if the name tells; None if it does not."""
    if not info.name.endswith("w13_weight"):
        return None
    model_type = str(checkpoint.config.get("model_type"))
    if not model_type.startswith("inkling"):
        raise QuantizeError(
            f"{info.name}: whether gate and up alternate in its rows is known only for Inkling, "
            f"not for model type {model_type!r}"
        )
    return True


def _stacked_biases(
    prefix: str,
    parts: dict[str, TensorInfo],
    kinds: tuple[str, ...],
    shapes: list[tuple[int, int]],
) -> tuple[str, ...]:
    """Names of the biases; raises QuantizeError unless all weights have one, or none has."""
    biases = {kind: parts[f"{kind}_bias"] for kind in kinds if f"{kind}_bias" in parts}
    others = [i.name for k, i in parts.items() if k.endswith("_bias") and k[:-5] not in biases]
    if others or len(biases) not in (0, len(kinds)):
        names = ", ".join([*others, *(info.name for info in biases.values())])
        raise QuantizeError(f"{prefix}: only some of its weights have biases: {names}")
    for info, shape in zip(biases.values(), shapes, strict=False):
        if info.shape != shape:
            raise QuantizeError(f"{info.name} has shape {list(info.shape)}, expected {list(shape)}")
    return tuple(info.name for info in biases.values())
