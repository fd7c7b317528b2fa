"""One model of each family, large enough for an engine's kernels, and what it should say.

Of each family :func:`make` writes a folder: ``source``, as Transformers saves it; ``nvfp4``, which
is that quantized by this package; and log-probabilities of Transformers' own class in float32:
``source.json``; ``right.json``, with the weights of ``nvfp4``, dequantized by a plain reference;
and ``wrong.json``, which is the same with a fault in the experts.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from quantize.checkpoint.reader import Checkpoint
from quantize.experts.find import find
from quantize.experts.gates import Gates
from quantize.experts.identify import identify_config
from tests.quantize import checkpoints, families, put_back

SIZES: dict[str, Any] = families.SMALL | {
    "vocab_size": 256,
    "unpadded_vocab_size": 256,
    "vocab_size_per_layer_input": 256,
    "hidden_size": 256,
    "d_model": 256,
    "intermediate_size": 128,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "n_heads": 4,
    "head_dim": 64,
    "v_head_dim": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 128,
    "index_n_heads": 32,  # DeepGEMM has 32 and 64
    "index_head_dim": 128,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "moe_intermediate_size": 128,
    "expert_ffn_hidden_size": 128,
    "shared_expert_intermediate_size": 128,
    "shared_intermediate_size": 128,
    "dense_intermediate_size": 256,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "d_ff": 128,
    "out_hidden_size": 256,
    # those that only families.SPECIAL has
    "adapter_in_dim": 256,
    "adapter_out_dim": 256,
    "adapter_input_size": 256,
    "text_hidden_size": 256,
    "projector_hidden_size": 256,
    "output_dim": 256,
    "encoder_attention_heads": 4,
    "qk_head_dim": 192,
    "mamba_d_head": 128,
}
"""As ``families.SMALL``. Attention kernels have heads of 64 and more, and MLA's have the sizes of
DeepSeek's latents alone."""

_LARGER = {name: size for name, size in SIZES.items() if families.SMALL.get(name) != size}

_FULL = {"layer_types": ["full_attention"] * 2}

WITHOUT_LINEAR: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 1},
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "lara_mini": _FULL,
    "minimax": _FULL,
    "qwen3_5_moe": {"text_config": _FULL},
    "qwen3_next": _FULL,
}
"""Families whose models here have attention in place of Mamba and linear attention, of which vLLM
has no kernels for CPUs, or none in float32."""

SPECIAL: dict[str, dict[str, Any]] = WITHOUT_LINEAR | {
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2}},
    "deepseek_v4": {
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        # DeepGEMM, which vLLM's third kind of layer needs, is not on every machine.
        "layer_types": ["sliding_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        "o_groups": 2,
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [128, 64],
            "rope_parameters": {"mrope_section": [12, 12, 8]},
        },
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [4, 4, 8]}}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "hy_v4_vl": {"text_config": {"rope_parameters": {"mrope_section": [16, 8, 8]}}},
    # Keys are values in full attention, as published; then there is no v_proj.
    "gemma4": {"text_config": {"attention_k_eq_v": True}},
    "llama4": {"text_config": {"num_experts_per_tok": 1}},  # vLLM weighs inputs, for one alone
    "mistral4": {"head_dim": 192},
    "muse_spark": {"out_hidden_size": 1024},
    # Transformers' Mamba in PyTorch clamps time steps at it. Neither its kernels do nor vLLM's.
    "nemotron_h": {"time_step_min": 1e-9},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},  # vLLM's class always has them
    "zaya": {"num_experts_per_tok": 1},
}
"""What cannot be had from ``families.SPECIAL`` by the sizes alone."""

_NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}

PUBLISHED: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "bailing_hybrid": {
        "architectures": ["BailingMoeV3ForCausalLM"],
        "gated_attention_proj_granularity_type": "head_wise",
        "moe_shared_expert_intermediate_size": 128,
        "no_kda_lora": True,
        "use_bias": False,
    },
    "deepseek_v3": _NOAUX,
    "deepseek_v32": _NOAUX,
    "deepseek_v4": {
        "compress_ratios": [0, 128],
        "mlp_layer_types": None,
        "num_hash_layers": 1,
        "topk_method": "noaux_tc",
    },
    "dots3_note": {"text_config": None},
    "ernie4_5_vl_moe": {
        "freq_allocation": 8,
        "im_patch_id": 255,
        "moe_layer_end_index": [1, 1],
        "moe_layer_interval": 1,
        "moe_layer_start_index": [1, 1],
        "moe_num_experts": [8, 8],
        "pixel_hidden_size": 256,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "use_temporal_conv": True,
        "vision_config": {"embed_dim": 256, "mlp_ratio": 4},
    },
    "glm4_moe": {"head_dim": 64},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "glm4v_moe": {"text_config": {"head_dim": 64, "use_qk_norm": False}},
    "glm5_next": {"text_config": {"mhc": True, "mla_use_nope": True} | _NOAUX},
    "glm_moe_dsa": _NOAUX,
    "hy_v3": {
        "expert_hidden_dim": 128,
        "first_k_dense_replace": 1,
        "qk_norm": True,
        "route_norm": True,
    },
    "kimi_linear": {
        "linear_attn_config": {
            "full_attn_layers": [],
            "head_dim": 128,
            "kda_layers": [1, 2],
            "num_heads": 32,
            "short_conv_kernel_size": 4,
        },
        "mla_use_nope": True,
    },
    "longcat_flash": {
        "mla_scale_kv_lora": True,
        "mla_scale_q_lora": True,
        "zero_expert_type": "identity",
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "layernorm_epsilon": 1e-5,
        "sliding_window_size": 128,
        "swa_head_dim": 64,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
    },
    "muse_spark": {"text_config": {"num_shared_experts": 0}},
    "phimoe": {"architectures": ["PhiMoEForCausalLM"]},
    "qwen4_exp": {"text_config": {"output_gate_type": "silu"}},
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True}},
    "step3p7": {"vision_config": {"output_dim": 256}},
    "minimax_m2": {"rotary_dim": 64, "scoring_func": "sigmoid", "use_routing_bias": True},
}
"""Fields of published configs that vLLM's classes look at and Transformers' do not write; None:
published configs lack it, and vLLM's does not take it."""

FLAT = ("dots3_note", "ernie4_5_vl_moe")
"""Families whose published configs have the language model's fields at the top, where vLLM's
classes look for them."""

_HY_V4 = {
    r"\.(mlp|shared_experts)\.linear_gate\.": r".\1.gate_proj.",
    r"\.hc_pre\.hc_(attn|mlp)_layer\.": r".hc_\1_layer.hc_pre.",
    r"\.hc_pre\.hc_head\.": ".hc_head.",
}

RENAMED: dict[str, dict[str, str]] = {
    # At the top of the model its patterns do not match, since it saves ``model.`` before them.
    "deepseek_v4": {
        r"^model\.embed_tokens\.": "embed.",
        r"^model\.hc_head\.hc_": "hc_head_",
        r"^model\.": "",
        r"\.attn\.norm\.": ".attn.kv_norm.",
    },
    # Its attention has a ``linear_gate``, for which the MLPs' gates are taken as well. Of published
    # names, ``hc_pre`` is left out when they are read, and put back at the first ``.hc_``.
    "hy_v4": _HY_V4,
    "hy_v4_vl": _HY_V4,
}
"""By family: patterns in names of tensors that Transformers' saving changes from those that are
published, and what they are there."""

LEFT_OUT = {"longcat_flash": r"\.experts\.[89]\."}
"""By family: a pattern in names of tensors that Transformers saves and published checkpoints lack.
LongCat's zero experts have no weights; Transformers has rows for them in ``gate_up_proj``."""

BESIDE: dict[str, tuple[str, tuple[str, ...]]] = {
    "deepseek_ocr2": ("DeepseekOcr2ImageProcessor", ("<image>",)),
    "hy_v4_vl": ("HYV4VLImageProcessor", ("<|image_pad|>", "<|video_pad|>")),
    "inkling": (
        "InklingImageProcessor",
        tuple(
            f"<|{name}|>"
            for name in (
                *("message_user", "message_model", "message_system", "message_tool"),
                *("content_text", "content_image", "content_model_end_sampling"),
                *("content_thinking", "content_audio_input", "content_xml"),
                *("content_invoke_tool_json", "end_message", "audio_end"),
            )
        ),
    ),
    "inkling2": ("Inkling2ImageProcessor", ("<|unused_200054|>",)),
    "inkling2_loop": ("Inkling2ImageProcessor", ("<|unused_200054|>",)),
    "mistral_large4": ("PixtralImageProcessor", ("[IMG]", "[IMG_BREAK]", "[IMG_END]")),
}
"""Families of which vLLM starts no model without the files of a processor beside it: the class for
images, and the tokens that the class for both looks for."""

ROWS, TOKENS = 3, 48


def prompts() -> list[list[int]]:
    """``[ROWS][TOKENS]`` tokens, without the first few: configs give these special meanings."""
    draw = random.Random(0)
    return [[draw.randrange(16, 250) for _ in range(TOKENS)] for _ in range(ROWS)]


def _larger(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _larger(value)
        if isinstance(value, dict)
        else (_LARGER.get(name, value) if isinstance(value, int) and value else value)
        for name, value in fields.items()
    }


def config_of(family: str) -> PreTrainedConfig:
    """The config of the family's model, as a whole."""
    more = _larger(families.SPECIAL.get(family, {})), SPECIAL.get(family, {})
    sizes = SIZES
    if hasattr(families.config(family).get_text_config(), "kv_lora_rank"):  # MLA: as many of both
        sizes = SIZES | {"num_key_value_heads": SIZES["num_attention_heads"]}
    return families.sized(family, sizes, *more)


def build(family: str, text: bool) -> torch.nn.Module | None:
    """The model in float32, whose sums are about 1.

    Args:
        text: the language model alone; None if the family has no class for it, or no other.
    """
    torch.manual_seed(0)
    config = config_of(family)
    if text:
        inner = config.get_text_config()
        mapping = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
        if inner is config or type(inner) not in mapping:
            return None
        config = inner
    model = families.of_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith("bias"):
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
            elif name == "lm_head.bias":  # vLLM's class for PhiMoE leaves it out
                parameter.normal_(0, 0.03)
            elif name.rpartition(".")[2] not in ("A_log", "D", "dt_bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    return model


def set_experts(model: torch.nn.Module, gates: Gates) -> None:
    """Give the experts weights such that they matter, and that their gate does: the products before
    it go beyond its limit, if it has one. Then round all of the model to what bfloat16 has."""
    limits = [gate.limit for gate in (gates.default, *gates.layers.values()) if gate.limit]
    size = 0.6 * min(limits) if limits else 1.5
    with torch.no_grad():
        for experts in put_back.experts_of(model):
            for expert in range(count(experts)):
                parts, down = experts.views(expert)
                for part in parts:
                    part.normal_(0, size / part.shape[-1] ** 0.5)
                # Products of two, or squares, of that size.
                down.normal_(0, 2 / size**2 / down.shape[-1] ** 0.5)
        for tensor in model.state_dict().values():  # which are saved
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())


def count(experts: put_back.Experts) -> int:
    """How many experts the module has."""
    if hasattr(experts.module, "mlp"):  # DBRX
        return int(experts.module.num_experts)
    return min(map(len, experts.stacked()))  # LongCat's zero experts have rows in one alone


def log_probabilities(model: Any) -> list[float]:
    """Of each token of the prompts but the first of each, one after another."""
    found = []
    with torch.inference_mode():
        for row in map(torch.tensor, prompts()):
            logits = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0, :-1]
            table = logits.double().log_softmax(-1)
            found.extend(table.gather(1, row[1:, None]).flatten().tolist())
    return found


def restore(model: torch.nn.Module, source: Path, target: Path) -> None:
    """Put the weights of ``target``, dequantized, into the experts of ``model``."""
    tensors = put_back.written(target)
    with Checkpoint(source) as checkpoint:
        groups = find(checkpoint)
    for experts, group in zip(put_back.experts_of(model), groups, strict=True):
        for expert in range(group.num_experts):
            parts, down = experts.views(expert)
            for view, name in zip((*parts, down), group.projections, strict=True):
                weight = tensors.pop(f"{group.prefix}.{group.first + expert}.{name}.weight")
                view.copy_(weight)
    assert not [name for name in tensors if name.endswith("weight")]


def spoil(model: torch.nn.Module, gates: Gates) -> str:
    """Give the experts a fault that engines have made: SiLU for another gate, and for SiLU's, gate
    and up exchanged. Returns its name."""
    silu = {gates.default.form, *(gate.form for gate in gates.layers.values())} == {"silu"}
    for experts in put_back.experts_of(model):
        if silu and not gates.default.post_norm:
            for expert in range(count(experts)):
                (gate, up), _ = experts.views(expert)
                first = gate.clone()
                gate.copy_(up)
                up.copy_(first)
        else:
            experts.module.forward = _with_silu(experts)
    return "gate and up exchanged" if silu else "SiLU"


def _with_silu(experts: put_back.Experts) -> Callable[..., torch.Tensor]:
    """What a module's ``forward`` does, with SiLU."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)

    def forward(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.zeros_like(rows)
        for expert in ids.unique().tolist():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            parts, down = experts.views(expert)
            *first, last = experts.biases(expert)
            products = [linear(rows[token], *each) for each in zip(parts, first, strict=True)]
            middle = torch.nn.functional.silu(products[0])
            own = linear(middle * products[1] if len(parts) == 2 else middle, down, last)
            out.index_add_(0, token, own * weights[token, slot, None].to(own.dtype))
        return out.reshape(x.shape)

    return forward


def put_beside(folder: Path, images: str, special: tuple[str, ...]) -> None:
    """Write the files of a processor, whose tokenizer has a word for each token.

    Args:
        images: the class of its image processor, with what that does by default.
        special: the names of the tokens after the first; no prompt has one of the first 16.
    """
    size = SIZES["vocab_size"]
    names = ["w0", *special, *(f"w{i}" for i in range(len(special) + 1, size))]
    words = {name: token for token, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, fields in {
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "w0"},
        "preprocessor_config": {"image_processor_type": images},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))


def make(family: str, folder: Path, text: bool = False) -> dict[str, Any] | None:
    """Write all of a family's files into ``folder``. Returns what the fault in ``wrong.json`` is;
    None if there is no such model (see :func:`build`)."""
    model: Any = build(family, text)
    if model is None:
        return None
    gates = identify_config(model.config)
    set_experts(model, gates)
    source, target = folder / "source", folder / "nvfp4"
    copy.deepcopy(model).bfloat16().save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    if family in FLAT and not text:
        config = config["text_config"] | config
    fields = {} if text else PUBLISHED.get(family, {})
    families.merged(config, fields)
    for name in (name for name, value in fields.items() if value is None):
        del config[name]
    (source / "config.json").write_text(json.dumps(config))
    if family in RENAMED or family in LEFT_OUT:
        tensors = load_file(source / "model.safetensors")
        for pattern, name in RENAMED.get(family, {}).items():
            tensors = {re.sub(pattern, name, n): t for n, t in tensors.items()}
        left_out = re.compile(LEFT_OUT.get(family, "$."))
        tensors = {n: t for n, t in tensors.items() if not left_out.search(n)}
        checkpoints.save(source, tensors, config)
    if family in BESIDE and not text:
        put_beside(source, *BESIDE[family])
    checkpoints.convert(source, target, overwrite=True)
    found = {"source": log_probabilities(model)}
    restore(model, source, target)
    found["right"] = log_probabilities(model)
    fault = spoil(model, gates)
    found["wrong"] = log_probabilities(model)
    for name, values in found.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return {"gate": str(gates), "fault": fault}


def read(folder: Path, name: str) -> list[float]:
    """What :func:`make` has written as ``name``.json."""
    return list(json.loads((folder / f"{name}.json").read_text()))


def difference(a: list[float], b: list[float]) -> float:
    """The mean absolute difference."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)
