"""NVFP4 weights as published checkpoints store them, with their values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from tests.quantize.stored_formats import (
    E4M3,
    EXPERTS,
    Published,
    compressed_tensors_group,
    e2m1_pairs,
    e4m3,
    product,
    random_bytes,
    tensor,
)


class Nvfp4(NamedTuple):
    """Random NVFP4: codes uint8 ``[..., in / 2]``, block scales uint8 ``[..., in / 16]`` (E4M3
    bits), a factor float32 of shape ``()`` or ``[experts]``, and what they mean."""

    codes: np.ndarray
    blocks: np.ndarray
    factor: np.ndarray
    weight: np.ndarray


def nvfp4(
    shape: tuple[int, ...], of_each: bool = False, divisor: bool = False, seed: int = 0
) -> Nvfp4:
    """NVFP4 of random bits.

    Args:
        of_each: stacked experts have a factor each.
        divisor: the factor is the reciprocal of a float32, rounded to float32.
    """
    codes = random_bytes(*shape[:-1], shape[-1] // 2, high=256 - seed)
    blocks = random_bytes(*shape[:-1], shape[-1] // 16, low=1, high=127 - seed)
    rng = np.random.default_rng([seed, *shape])
    factor = rng.uniform(1e-5, 1e-3, shape[:1] if of_each else ()).astype(np.float32)
    if divisor:
        factor = np.float32(1) / (np.float32(1) / factor)
    wide = factor.reshape(-1, *[1] * (len(shape) - 1)) if of_each else factor
    # Each of the two products is rounded to float32; that of a block's scales comes first.
    step = (e4m3(blocks) * wide).astype(np.float32)
    weight = product(e2m1_pairs(codes), np.repeat(step, 16, -1).astype(float))
    return Nvfp4(codes, blocks, np.asarray(factor, np.float32), weight)


def modelopt_nvfp4() -> Published:
    made = nvfp4((20, 96))
    name = "model.layers.0.mlp.experts.0.gate_proj"
    stored = {
        f"{name}.weight": tensor(made.codes),
        f"{name}.weight_scale": tensor(made.blocks, E4M3),
        f"{name}.weight_scale_2": torch.tensor(made.factor),
        f"{name}.input_scale": torch.tensor(0.25),
    }
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    return Published(stored, config, {f"{name}.weight": made.weight}, "nvfp4")


def compressed_tensors_nvfp4(
    module: str = "model.layers.0.mlp.experts.0.gate_proj", shape: tuple[int, ...] = (20, 96)
) -> Published:
    made = nvfp4(shape, of_each=len(shape) == 3, divisor=True)
    stored = {
        f"{module}.weight_packed": tensor(made.codes),
        f"{module}.weight_scale": tensor(made.blocks, E4M3),
        f"{module}.weight_global_scale": torch.from_numpy(1 / made.factor.reshape(-1)),
        f"{module}.input_global_scale": torch.tensor([300.0]),
    }
    config = compressed_tensors_group("nvfp4-pack-quantized", {"num_bits": 4})
    return Published(stored, config, {f"{module}.weight": made.weight}, "nvfp4")


def stacked_compressed_tensors_nvfp4() -> Published:
    return compressed_tensors_nvfp4("model.layers.0.mlp.experts.gate_up_proj", (EXPERTS, 16, 96))


def flat_compressed_tensors_nvfp4() -> Published:
    """llm-compressor's ``[experts * out, in / 2]``, with one global scale. No config_groups."""
    made = nvfp4((EXPERTS, 16, 96), divisor=True)
    module = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {
        f"{module}.weight_packed": tensor(made.codes.reshape(-1, 48)),
        f"{module}.weight_scale": tensor(made.blocks.reshape(-1, 6), E4M3),
        f"{module}.weight_global_scale": torch.tensor([1 / made.factor]),
    }
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    return Published(stored, config, {f"{module}.weight": made.weight}, "nvfp4")


def llama4_nvfp4() -> Published:
    """ModelOpt turns the stack back to ``[experts, in, out]``, once blocks along ``in`` are packed.

    Source: ``maybe_transpose_expert_weight_dimensions`` of its ``export/quant_utils.py``.
    """
    made = nvfp4((EXPERTS, 32, 96))
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    stored = {
        name: tensor(made.codes.swapaxes(1, 2)),
        f"{name}_weight_scale": tensor(made.blocks.swapaxes(1, 2)).view(E4M3),
        f"{name}_weight_scale_2": torch.tensor(made.factor),
        f"{name}_input_scale": torch.tensor(0.25),
    }
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    return Published(
        stored, config, {name: np.ascontiguousarray(made.weight.swapaxes(1, 2))}, "nvfp4"
    )


def stacked_nvfp4_with_global_scale() -> Published:
    made = nvfp4((EXPERTS, 16, 96), of_each=True, divisor=True)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {
        name: tensor(made.codes),
        f"{name}_scale": tensor(made.blocks, E4M3),
        f"{name}_global_scale": torch.from_numpy(1 / made.factor),
    }
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    return Published(stored, config, {name: made.weight}, "nvfp4")


def inkling2_loop_nvfp4() -> Published:
    """Formula: Transformers 5.24's ``Inkling2LoopDequantizeExperts``."""
    amax = np.array([0.5, 3.0, 7.0], np.float32)
    made = nvfp4((EXPERTS, 16, 96))
    factor = amax / np.float32(2688)
    step = (e4m3(made.blocks) * factor[:, None, None]).astype(np.float32)
    weight = product(e2m1_pairs(made.codes), np.repeat(step, 16, -1).astype(float))
    name = "model.llm.layers.2.mlp.experts.w13_weight"
    stored = {
        name: tensor(made.codes),
        f"{name}_scale": tensor(made.blocks, E4M3),
        f"{name}_amax": torch.from_numpy(amax),
        f"{name}_outer_scale_denominator": torch.tensor(2688.0),
    }
    return Published(stored, None, {name: weight}, "nvfp4")
