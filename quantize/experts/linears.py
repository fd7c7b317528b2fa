"""Finding the dense linears of a mixture-of-experts model, which can be quantized on request.

Two rules choose them. A linear must be in the stack of layers that holds the routed experts, so
vision and audio towers are left out. And its name must be that of a projection which engines load
as a quantizable linear. This leaves out embeddings, the output head, routers, norms, and latent
attention's ``kv_b_proj``, which engines split.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import PLAIN, TensorInfo
from quantize.experts.group import ExpertGroup, tensor_names_of
from quantize.nvfp4.format import BLOCK

OUTPUTS = {"o_proj", "down_proj", "w2", "q_b_proj"}
"""Last parts of module paths: projections that no engine fuses with others."""

INPUTS = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj"),
    *("q_a_proj", "kv_a_proj_with_mqa"),
    *("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"),
}
"""Last parts of module paths: projections that engines fuse, or may fuse, with their siblings."""

_NOT_FUSED_IN_NVFP4 = {"b_proj", "index_q_proj", "index_k_proj"}
"""Last parts of module paths: projections that vLLM fuses with query, key and value (Bailing,
MiniMax-M3) but cannot load in NVFP4."""

_LAYER = re.compile(r"(?P<stack>(?:.*\.)?layers)\.(?P<number>\d+)\.")


def find(
    checkpoint: Checkpoint,
    groups: list[ExpertGroup],
    fits: Callable[[int, int], bool] = lambda rows, columns: not (rows % BLOCK or columns % BLOCK),
) -> list[tuple[str, ...]]:
    """Names of the dense weights ``[out, in]``, in sets whose members share one global scale.

    Engines fuse projections of the same input into one linear with one global scale: query, key
    and value, or gate and up. Each engine decides which ones it fuses. So all projections with the
    same parent module and the same ``in`` share a global scale here; the range of E4M3 block scales
    is wide enough for that. If one member of a set cannot be quantized, the whole set is left out.

    Args:
        fits: whether the format can store a weight of so many rows and columns; by default NVFP4.
    """
    stacks = {match["stack"] for group in groups if (match := _LAYER.match(group.prefix))}
    layers = checkpoint.text_config().get("num_hidden_layers")
    experts = tensor_names_of(groups)
    sets: dict[tuple[str, int, str], list[str]] = defaultdict(list)
    for name, info in checkpoint.tensors.items():
        module, weight, _ = name.rpartition(".weight")
        parent, _, projection = module.rpartition(".")
        match = _LAYER.match(name)
        if (
            weight
            and projection in INPUTS | OUTPUTS | _NOT_FUSED_IN_NVFP4
            and name not in experts
            and match
            and match["stack"] in stacks
            and not (isinstance(layers, int) and int(match["number"]) >= layers)  # drafting layers
            and "experts" not in parent.split(".")  # experts of a layer that is left out
            and len(info.shape) == 2
        ):
            alone = projection if projection in OUTPUTS else ""
            sets[parent, info.shape[1], alone].append(name)
    return [
        tuple(names)
        for names in sets.values()
        if all(_can_be_quantized(checkpoint.tensors[name], fits) for name in names)
    ]


def _can_be_quantized(info: TensorInfo, fits: Callable[[int, int], bool]) -> bool:
    rows, columns = info.shape
    if info.name.endswith("gate_up_proj.weight"):  # engines cut it into gate and up
        rows //= 2
    return (
        info.name.split(".")[-2] not in _NOT_FUSED_IN_NVFP4
        and info.dtype in PLAIN
        and fits(rows, columns)
    )
