"""Quantized weights as published checkpoints store them, with their values, to test the sources.

The values are computed in float64 from the formats' definitions. No code of the package is used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
EXPERTS = 3


# The formats' definitions: OCP 8-bit Floating Point 1.0, OCP Microscaling Formats 1.0.


def e4m3(codes: np.ndarray) -> np.ndarray:
    sign = np.where(codes >> 7, -1.0, 1.0)
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7).astype(float)
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    return sign * np.where(codes & 0x7F == 0x7F, np.nan, value)


def e2m1(nibbles: np.ndarray) -> np.ndarray:
    sign = np.where(nibbles >> 3, -1.0, 1.0)
    exponent, mantissa = (nibbles >> 1 & 3).astype(int), (nibbles & 1).astype(float)
    return sign * np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def e2m1_pairs(packed: np.ndarray) -> np.ndarray:
    both = np.stack((e2m1(packed & 15), e2m1(packed >> 4)), -1)
    return both.reshape(*packed.shape[:-1], -1)


def e8m0(codes: np.ndarray) -> np.ndarray:
    return np.where(codes == 255, np.nan, 2.0 ** (codes.astype(float) - 127))


def spread(scale: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Repeat the scales of blocks to one scale for each weight.

    Args:
        scale: ``[..., rows of blocks, columns of blocks]``.
        block: rows and columns of a block.
        shape: the shape of the matrix, or of several stacked ones.
    """
    wide = np.repeat(np.repeat(scale, block[0], -2), block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


def product(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """``values * scale`` in float32, rounded once.

    The product of a value of these formats and a float32 scale is exact in float64.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return (values * scale).astype(np.float32)


def assert_same(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Assert float32, the same shape, NaN in the same places, and equal bits everywhere else."""
    assert actual.dtype == torch.float32
    assert tuple(actual.shape) == expected.shape
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(actual.numpy()), nan)
    bits = actual.contiguous().numpy().view(np.uint32)[~nan]
    assert np.array_equal(bits, np.ascontiguousarray(expected).view(np.uint32)[~nan])


# Published checkpoints.


class Published(NamedTuple):
    """A checkpoint in a published format.

    Attributes:
        stored: the tensors in its files, by name.
        quantization: ``quantization_config`` of its ``config.json``; None if there is none.
        weights: the float32 weights that they represent, by name.
        format: the expected key of ``quantize.checkpoint.sources.FORMATS``.
    """

    stored: dict[str, torch.Tensor]
    quantization: dict[str, Any] | None
    weights: dict[str, np.ndarray]
    format: str


def random_bytes(*shape: int, low: int = 0, high: int = 256) -> np.ndarray:
    """Random bytes, uint8. They depend only on the arguments, not on tests that ran before."""
    return np.random.default_rng([low, high, *shape]).integers(low, high, shape, np.uint8)


def tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    whole = torch.from_numpy(np.ascontiguousarray(array))
    return whole if dtype is None else whole.view(dtype)


def fp8(
    name: str,
    scale_name: str,
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    block: tuple[int, int],
    quantization: dict[str, Any] | None,
    dtype: torch.dtype = torch.float32,
    spread_shape: tuple[int, ...] | None = None,
) -> Published:
    """An FP8 weight with random codes and scales.

    Args:
        name: the weight's name.
        scale_name: the scale's name.
        shape: the weight's shape.
        grid: the scale's shape.
        block: rows and columns of a block.
        quantization: as in :class:`Published`.
        dtype: the scale's dtype.
        spread_shape: the weight's shape as the matrices that are cut into blocks separately;
            ``shape`` by default.
    """
    codes = random_bytes(*shape)
    scale = torch.from_numpy(np.random.default_rng(grid or 1).uniform(1e-4, 1e-2, grid)).to(dtype)
    cut = spread_shape or shape
    values = e4m3(codes).reshape(cut)
    per_matrix = (*cut[:-2], -(-cut[-2] // block[0]), -(-cut[-1] // block[1]))
    wide = spread(scale.double().numpy().reshape(per_matrix), block, cut)
    stored = {name: tensor(codes, E4M3), scale_name: scale}
    return Published(stored, quantization, {name: product(values, wide).reshape(shape)}, "fp8")


def mx(
    stored: dict[str, torch.Tensor],
    quantization: dict[str, Any] | None,
    name: str,
    values: np.ndarray,
    scale: np.ndarray,
    fmt: str,
) -> Published:
    """An MX weight ``name``: ``values`` ``[..., in]`` with E8M0 ``scale`` ``[..., in / 32]``."""
    wide = np.repeat(e8m0(scale), 32, -1)
    return Published(stored, quantization, {name: product(values, wide)}, fmt)


def deepseek_v3() -> Published:
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    return fp8(name, f"{name}_scale_inv", (200, 300), (2, 3), (128, 128), config)


def fp8_without_block_size() -> Published:
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    return fp8(name, f"{name}_scale_inv", (129, 128), (2, 1), (128, 128), None)


def deepseek_v4_dense() -> Published:
    config = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    codes, scale = random_bytes(256, 160), random_bytes(2, 2, low=90, high=150)
    weight = product(e4m3(codes), spread(e8m0(scale), (128, 128), codes.shape))
    stored = {"layers.0.attn.wo_a.weight": tensor(codes, E4M3)}
    stored["layers.0.attn.wo_a.scale"] = tensor(scale, E8M0)
    return Published(stored, config, {"layers.0.attn.wo_a.weight": weight}, "fp8")


def deepseek_v41_dense() -> Published:
    config = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]}
    codes, scale = random_bytes(64, 96), random_bytes(2, 3, low=90, high=150)
    weight = product(e4m3(codes), spread(e8m0(scale), (32, 32), codes.shape))
    stored = {"layers.0.attn.wq_a.weight": tensor(codes, E4M3)}
    stored["layers.0.attn.wq_a.scale"] = tensor(scale, E8M0)
    return Published(stored, config, {"layers.0.attn.wq_a.weight": weight}, "fp8")


def transformers_fp8_down() -> Published:
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    name = "model.layers.0.mlp.experts.down_proj"
    grid = (EXPERTS, 2, 2)
    return fp8(name, f"{name}_scale_inv", (EXPERTS, 160, 256), grid, (128, 128), config)


def transformers_fp8_gate_up() -> Published:
    """Gate and up have separate rows of scales, by ``min_sf_out=2`` of Transformers."""
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    return fp8(
        name,
        f"{name}_scale_inv",
        (EXPERTS, 2 * 48, 256),
        (EXPERTS, 2, 2),
        (128, 128),
        config,
        spread_shape=(EXPERTS, 2, 48, 256),
    )


def compressed_tensors_group(
    fmt: str, weights: dict[str, Any] | None = None, overall: str | None = None
) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float"} | (weights or {})
    groups = {"group_0": {"weights": weights, "format": fmt, "targets": ["Linear"]}}
    return {
        "quant_method": "compressed-tensors",
        "format": overall or fmt,
        "config_groups": groups,
    }


def compressed_tensors_block() -> Published:
    config = compressed_tensors_group("float-quantized", {"block_structure": [64, 32]})
    name = "model.layers.0.self_attn.q_proj.weight"
    grid = (2, 4)
    return fp8(name, f"{name}_scale", (100, 100), grid, (64, 32), config, torch.bfloat16)


def compressed_tensors_row() -> Published:
    config = compressed_tensors_group("float-quantized")
    name = "model.layers.0.self_attn.q_proj.weight"
    return fp8(name, f"{name}_scale", (200, 160), (200, 1), (1, 160), config, torch.float16)


def quark_row() -> Published:
    config = {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}
    name = "model.layers.0.self_attn.q_proj.weight"
    return fp8(name, f"{name}_scale", (200, 160), (200,), (1, 160), config)


def modelopt_tensor() -> Published:
    config = {"quant_method": "modelopt", "quant_algo": "FP8"}
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = fp8(name, f"{name}_scale", (200, 160), (), (200, 160), config)
    whole.stored["model.layers.0.self_attn.q_proj.input_scale"] = torch.tensor(0.5)
    return whole


def expert_row() -> Published:
    config = {"quant_method": "fbgemm_fp8"}
    name = "model.layers.0.mlp.experts.down_proj"
    shape = (EXPERTS, 16, 40)
    whole = fp8(name, f"{name}_scale", shape, (EXPERTS, 16, 1), (1, 40), config)
    whole.stored[f"{name}_activation_scale"] = torch.rand(EXPERTS)
    return whole


def expert_tensor() -> Published:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shape = (EXPERTS, 16, 40)
    return fp8(name, f"{name}_scale_inv", shape, (EXPERTS, 1, 1), (16, 40), None)


def minimax_m3() -> Published:
    config = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["lm_head"]}
    name = "language_model.model.layers.3.block_sparse_moe.experts.0.w1.weight"
    codes, scale = random_bytes(24, 96), random_bytes(24, 3)
    stored = {name: tensor(codes, E4M3), f"{name}_scale_inv": tensor(scale)}
    return mx(stored, config, name, e4m3(codes), scale, "mxfp8")


def modelopt_mxfp8() -> Published:
    config = {"quant_method": "modelopt", "quant_algo": "MXFP8", "ignore": ["lm_head"]}
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    codes, scale = random_bytes(24, 96), random_bytes(24, 3)
    stored = {name: tensor(codes, E4M3), f"{name}_scale": tensor(scale)}
    return mx(stored, config, name, e4m3(codes), scale, "mxfp8")


def compressed_tensors_mxfp8() -> Published:
    whole = modelopt_mxfp8()
    return whole._replace(quantization=compressed_tensors_group("mxfp8-quantized"))


def stacked_mxfp8() -> Published:
    config = {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    codes, scale = random_bytes(EXPERTS, 10, 64), random_bytes(EXPERTS, 10, 2)
    stored = {name: tensor(codes, E4M3), f"{name}_scale_inv": tensor(scale, E8M0)}
    return mx(stored, config, name, e4m3(codes), scale, "mxfp8")


def gpt_oss(kind: str = "gate_up_proj") -> Published:
    name = f"model.layers.0.mlp.experts.{kind}"
    blocks, scale = random_bytes(EXPERTS, 10, 3, 16), random_bytes(EXPERTS, 10, 3)
    stored = {f"{name}_blocks": tensor(blocks), f"{name}_scales": tensor(scale)}
    values = e2m1_pairs(blocks.reshape(EXPERTS, 10, 48))
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    published = mx(stored, config, name, values, scale, "mxfp4")
    # Unquantized, they are [experts, in, out].
    weights = {n: np.ascontiguousarray(w.swapaxes(1, 2)) for n, w in published.weights.items()}
    return published._replace(weights=weights)


def gpt_oss_down() -> Published:
    return gpt_oss("down_proj")


def compressed_tensors_mxfp4() -> Published:
    config = compressed_tensors_group("mxfp4-pack-quantized", {"num_bits": 4})
    module = "model.layers.0.mlp.experts.0.down_proj"
    packed, scale = random_bytes(10, 48), random_bytes(10, 3)
    stored = {f"{module}.weight_packed": tensor(packed), f"{module}.weight_scale": tensor(scale)}
    return mx(stored, config, f"{module}.weight", e2m1_pairs(packed), scale, "mxfp4")


def deepseek_v4_experts() -> Published:
    config = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    module = "layers.0.ffn.experts.0.w1"
    packed, scale = random_bytes(10, 48), random_bytes(10, 3)
    stored = {f"{module}.weight": tensor(packed, torch.int8)}
    stored[f"{module}.scale"] = tensor(scale, E8M0)
    return mx(stored, config, f"{module}.weight", e2m1_pairs(packed), scale, "mxfp4")


def quark_mxfp4() -> Published:
    weight = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    config = {"quant_method": "quark", "global_quant_config": {"weight": weight}}
    module = "model.layers.0.mlp.experts.0.w2"
    packed, scale = random_bytes(10, 48), random_bytes(10, 3)
    stored = {f"{module}.weight": tensor(packed), f"{module}.weight_scale": tensor(scale)}
    return mx(stored, config, f"{module}.weight", e2m1_pairs(packed), scale, "mxfp4")


def transformers_fp4_experts() -> Published:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    packed, scale = random_bytes(EXPERTS, 10, 48), random_bytes(EXPERTS, 10, 3)
    stored = {name: tensor(packed, torch.int8), f"{name}_scale_inv": tensor(scale, E8M0)}
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    return mx(stored, config, name, e2m1_pairs(packed), scale, "mxfp4")


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


PUBLISHED: list[Callable[[], Published]] = [
    deepseek_v3,
    fp8_without_block_size,
    deepseek_v4_dense,
    deepseek_v41_dense,
    transformers_fp8_down,
    transformers_fp8_gate_up,
    compressed_tensors_block,
    compressed_tensors_row,
    quark_row,
    modelopt_tensor,
    expert_row,
    expert_tensor,
    minimax_m3,
    modelopt_mxfp8,
    compressed_tensors_mxfp8,
    stacked_mxfp8,
    gpt_oss,
    gpt_oss_down,
    compressed_tensors_mxfp4,
    deepseek_v4_experts,
    quark_mxfp4,
    transformers_fp4_experts,
    kimi_k2_thinking,
    int4_asymmetric,
    int4_plain_zero_points,
    int4_reordered,
    int4_row,
    int4_padded,
    int8_packed,
    stacked_int4,
    modelopt_nvfp4,
    compressed_tensors_nvfp4,
    stacked_compressed_tensors_nvfp4,
    flat_compressed_tensors_nvfp4,
    llama4_nvfp4,
    stacked_nvfp4_with_global_scale,
    inkling2_loop_nvfp4,
]


def config_of(published: Published, nested: bool = False) -> dict[str, Any]:
    inner = {"quantization_config": published.quantization, "num_experts": EXPERTS}
    return {"text_config": inner} if nested else inner
