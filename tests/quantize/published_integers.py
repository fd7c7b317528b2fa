"""Integer weights as published checkpoints store them, with their values."""

from __future__ import annotations

import numpy as np
import torch

from tests.quantize.stored_formats import (
    EXPERTS,
    Published,
    compressed_tensors_group,
    tensor,
)


def integers(
    module: str,
    shape: tuple[int, ...],
    group: int,
    bits: int = 4,
    zero: str | None = None,
    index: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Published:
    """Packed integers as compressed-tensors stores them, from the values that they stand for.

    Args:
        group: inputs that share a scale; 0 for one scale a row.
        zero: how zero points are stored, ``packed`` or ``plain``; None: there are none.
        index: each input's group is drawn.
    """
    *lead, rows, columns = shape
    rng = np.random.default_rng([bits, *shape])
    half, groups = 1 << (bits - 1), columns // group if group else 1
    values = rng.integers(-half, half, shape)
    zeros = rng.integers(-half, half, (*lead, rows, groups))
    scale = torch.from_numpy(rng.uniform(1e-3, 1e-2, (*lead, rows, groups))).to(dtype)
    of = rng.permutation(np.arange(columns) // group) if index else np.arange(columns)
    of = of if index else of // (group or columns)
    exact = (values - (zeros[..., of] if zero else 0)) * scale.double().numpy()[..., of]
    stored = {
        f"{module}.weight_packed": packed_words(values + half, bits, -1),
        f"{module}.weight_scale": scale,
    }
    if not lead:
        stored[f"{module}.weight_shape"] = torch.tensor(shape, dtype=torch.int32)
    if zero == "packed":
        stored[f"{module}.weight_zero_point"] = packed_words(zeros + half, bits, -2)
    elif zero:
        stored[f"{module}.weight_zero_point"] = torch.from_numpy(zeros).to(torch.int8)
    if index:
        stored[f"{module}.weight_g_idx"] = torch.from_numpy(of).int()
    weights = {
        "num_bits": bits, "type": "int", "symmetric": zero is None,
        "group_size": group or None, "strategy": "group" if group else "channel",
    }  # fmt: skip
    config = compressed_tensors_group("pack-quantized", weights)
    return Published(
        stored, config, {f"{module}.weight": exact.astype(np.float32)}, "pack-quantized"
    )


def packed_words(values: np.ndarray, bits: int, axis: int) -> torch.Tensor:
    """Integers in 0 to 2 ** bits - 1 along ``axis`` as int32, the first one in the lowest bits."""
    each = 32 // bits
    moved = np.moveaxis(values, axis, -1)
    moved = np.concatenate((moved, np.zeros((*moved.shape[:-1], -moved.shape[-1] % each))), -1)
    words = moved.astype(np.uint64).reshape(*moved.shape[:-1], -1, each)
    words = (words << np.arange(0, 32, bits, dtype=np.uint64)).sum(-1).astype(np.uint32)
    return tensor(np.moveaxis(words.view(np.int32), -1, axis))


def kimi_k2_thinking() -> Published:
    return integers("model.layers.1.mlp.experts.0.gate_proj", (48, 96), 32)


def int4_asymmetric() -> Published:
    return integers("model.layers.1.mlp.experts.0.gate_proj", (20, 96), 32, zero="packed")


def int4_plain_zero_points() -> Published:
    return integers("a.down_proj", (20, 96), 16, zero="plain", dtype=torch.float16)


def int4_reordered() -> Published:
    return integers("a.down_proj", (300, 96), 32, zero="packed", index=True)


def int4_row() -> Published:
    return integers("a.down_proj", (20, 96), 0, dtype=torch.float32)


def int4_padded() -> Published:
    """The last int32 of a row is not full."""
    return integers("a.down_proj", (20, 36), 12)


def int8_packed() -> Published:
    return integers("a.down_proj", (20, 96), 32, bits=8, zero="packed")


def stacked_int4() -> Published:
    module = "model.layers.0.mlp.experts.gate_up_proj"
    return integers(module, (EXPERTS, 16, 96), 32, zero="packed")
