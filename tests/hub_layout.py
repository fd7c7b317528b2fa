"""A MiniMax-M3 of Transformers' layout, rewritten as the hub publishes it.

Transformers stacks a layer's experts (``mlp.experts.gate_up_proj``, ``[experts, 2 * intermediate,
hidden]``). Published files have a tensor for each (``block_sparse_moe.experts.E.w1``, ``w3`` and
``w2`` for gate, up and down), gate and up of dense and shared experts apart, the router and its
bias in float32, and the text model's config nested in the multimodal one's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.quantize import checkpoints

KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "dense_intermediate_size",
    "shared_intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "rotary_dim", "swiglu_alpha",
    "swiglu_limit", "num_local_experts", "num_experts_per_tok", "routed_scaling_factor",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip


def published(tensors: dict[str, torch.Tensor], sparse: set[int]) -> dict[str, torch.Tensor]:
    """``tensors`` under published names; ``sparse`` are the numbers of the layers with experts."""
    found = {}
    for name, tensor in checkpoints.per_expert(tensors, ("w1", "w3", "w2")).items():
        if name.startswith("model.layers.") and int(name.split(".")[2]) in sparse:
            name = name.replace(".mlp.", ".block_sparse_moe.")
            name = name.replace(".gate.e_score_correction_bias", ".e_score_correction_bias")
        if name.endswith(("e_score_correction_bias", "block_sparse_moe.gate.weight")):
            tensor = tensor.float()
        if name.endswith(".gate_up_proj.weight"):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                found[name.replace("gate_up_proj", part)] = half.clone()
        else:
            found[name] = tensor
    return found


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    sparse = [int(kind == "sparse") for kind in config["mlp_layer_types"]]
    none = [0] * len(sparse)
    text = {key: config[key] for key in KEPT} | {
        "hidden_act": "swigluoai",
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "n_shared_experts": 1,
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "num_mtp_modules": 0,
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "partial_rotary_factor": config["rotary_dim"] / config["head_dim"],
        "moe_layer_freq": sparse,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": 128,
            "sparse_num_index_heads": 4,
            "sparse_topk_blocks": 16,
            "sparse_block_size": 128,
            "sparse_score_type": "max",
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_attention_freq": none,
            "sparse_disable_index_value": none,
        },
    }
    return {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "model_type": "minimax_m3_vl",
        "dtype": "bfloat16",
        "text_config": text,
    }


def publish(source: Path, target: Path) -> Path:
    """Write the checkpoint ``source`` to the folder ``target``, which is returned."""
    config = json.loads((source / "config.json").read_text())
    sparse = {i for i, kind in enumerate(config["mlp_layer_types"]) if kind == "sparse"}
    tensors = published(load_file(source / "model.safetensors"), sparse)
    checkpoints.save(target, tensors, published_config(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    return target
