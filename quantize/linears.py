"""Finding the dense linears of a mixture-of-experts model, for those who want them quantized too.

Only layers of the stack that the routed experts are in are looked at, so that vision and audio
towers stay, and only names of projections that engines load as quantizable linears: embeddings, the
output head, routers, norms and latent-attention's ``kv_b_proj``, which engines take apart, stay.
"""

from __future__ import annotations

import re
from collections import defaultdict

from quantize.checkpoint import Checkpoint
from quantize.experts import ExpertGroup, source_names
from quantize.nvfp4 import BLOCK

PROJECTIONS = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"),
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"),
}
"""Last parts of the module paths that are taken."""

_LAYER = re.compile(r"(?P<stack>(?:.*\.)?layers)\.(?P<number>\d+)\.")


def find(checkpoint: Checkpoint, groups: list[ExpertGroup]) -> list[tuple[str, ...]]:
    """Weights ``[out, in]`` in sets that must share a global scale.

    Engines fuse projections of the same input into one linear with one global scale (query, key
    and value; gate and up). Which ones is theirs to decide, so all that have the same parent module
    and the same ``in`` share one; E4M3 block scales have range to spare.
    """
    stacks = {match["stack"] for group in groups if (match := _LAYER.match(group.prefix))}
    experts = source_names(groups)
    sets: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, info in checkpoint.tensors.items():
        module, weight, _ = name.rpartition(".weight")
        parent, _, projection = module.rpartition(".")
        match = _LAYER.match(name)
        if (
            weight
            and projection in PROJECTIONS
            and name not in experts
            and match
            and match["stack"] in stacks
            and "experts" not in parent.split(".")  # of a layer that is not quantized
            and len(info.shape) == 2
            and info.dtype in ("BF16", "F16", "F32")
            and info.shape[1] % BLOCK == 0
            and info.shape[0] % BLOCK == 0
        ):
            sets[parent, info.shape[1]].append(name)
    return [tuple(names) for names in sets.values()]
