"""Quantized weights as published checkpoints store them, with their values, to test the sources.

The values are computed in float64 from the formats' definitions. No code of the package is used.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.quantize.published_integers import (
    int4_asymmetric,
    int4_padded,
    int4_plain_zero_points,
    int4_reordered,
    int4_row,
    int8_packed,
    kimi_k2_thinking,
    stacked_int4,
)
from tests.quantize.published_nvfp4 import (
    compressed_tensors_nvfp4,
    flat_compressed_tensors_nvfp4,
    inkling2_loop_nvfp4,
    llama4_nvfp4,
    modelopt_nvfp4,
    stacked_compressed_tensors_nvfp4,
    stacked_nvfp4_with_global_scale,
)
from tests.quantize.stored_formats import (
    E4M3,
    E8M0,
    EXPERTS,
    Published,
    compressed_tensors_group,
    e2m1_pairs,
    e4m3,
    e8m0,
    fp8,
    mx,
    product,
    random_bytes,
    spread,
    tensor,
)


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
