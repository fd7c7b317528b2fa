"""Small checkpoints whose last layer drafts tokens, as each family publishes it, and by hand what
vLLM must make of them. The head's experts are plain, or NVFP4 as some tools write them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.layouts import LAYOUTS
from quantize.run.options import Options
from quantize.run.plan import plan

HIDDEN, INNER, EXPERTS, LAYERS = 64, 48, 4, 2
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": HIDDEN, "intermediate_size": 64,
    "moe_intermediate_size": INNER, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED: dict[str, Any] = {
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 0,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "Glm4Moe": GROUPED | {"head_dim": 32},
    "DeepseekV3": GROUPED | {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    "Qwen3Next": {
        "num_experts": EXPERTS, "shared_expert_intermediate_size": 32, "head_dim": 32,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip
LAST = f"model.layers.{LAYERS}."
HEAD = {"Glm4Moe": LAST, "DeepseekV3": LAST, "Qwen3Next": "mtp.layers.0."}
"""What a head's decoder layer is called in checkpoints."""


def save(family: str, folder: Path) -> None:
    """A model in bfloat16 whose last layer and all beside it are a head by name, and by the config
    a layer as the others are: only so do tools quantize its experts."""
    torch.manual_seed(0)
    layers = LAYERS + 1
    sizes = SIZES | FAMILIES[family] | {"num_hidden_layers": layers}
    if family == "Qwen3Next":
        sizes["layer_types"] = ["full_attention"] * layers
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).bfloat16()
    for name, tensor in model.named_parameters():
        if "norm" in name:  # else all are the same, and could be mixed up
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if family == "Qwen3Next":
        norms, wide, start = ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"), "fc", "mtp."
    else:
        norms, wide, start = ("enorm", "hnorm", "shared_head.norm"), "eh_proj", LAST
        for name, same in (("shared_head.head", "lm_head"), ("embed_tokens", "model.embed_tokens")):
            tensors[f"{LAST}{name}.weight"] = tensors[f"{same}.weight"].clone()
    for name in norms:
        tensors[f"{start}{name}.weight"] = (torch.rand(HIDDEN) + 0.5).bfloat16()
    tensors[f"{start}{wide}.weight"] = torch.randn(HIDDEN, 2 * HIDDEN).bfloat16() / 10
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def published(source: Path, folder: Path, family: str) -> Path:
    """``source`` with names and a config by which the last layer drafts."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    renamed = {n.replace(LAST, HEAD[family]): t for n, t in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace(LAST, HEAD[family]))
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    if family == "DeepseekV3":
        config["topk_method"] = "noaux_tc"  # the router's bias, which vLLM looks for by this
    for each in ("layer_types", "mlp_layer_types"):
        if config.get(each):
            config[each] = config[each][:LAYERS]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make(family: str, folder: Path) -> None:
    """Fill ``folder``: ``bf16``, and for each layout ``LAYOUT-plain`` with a plain head, and
    ``LAYOUT-nvfp4`` with one whose experts are quantized."""
    save(family, folder / "whole")
    published(folder / "whole", folder / "bf16", family)
    for layout in LAYOUTS:
        for source, target in (("bf16", f"{layout}-plain"), ("whole", f"whole-{layout}")):
            with Checkpoint(folder / source) as checkpoint:
                options = Options(layout=layout)
                execute(checkpoint, plan(checkpoint, options), folder / target)
        published(folder / f"whole-{layout}", folder / f"{layout}-nvfp4", family)


def without_list(source: Path, folder: Path, family: str) -> Path:
    """``source`` as a tool leaves it that never saw the head: no list names any of it."""
    shutil.copytree(source, folder)
    its = re.compile(rf"(?:re:)?(?:{re.escape(HEAD[family])}|mtp\.)")
    for path in (folder / "config.json", folder / "hf_quant_config.json"):
        if path.exists():
            data = json.loads(path.read_text())
            for part in (data.get("quantization_config"), data.get("quantization")):
                for key in ("ignore", "exclude_modules"):
                    if part and key in part:
                        part[key] = [name for name in part[key] if not its.match(name)]
            path.write_text(json.dumps(data))
    return folder


def rename_as_minimax_m3(folder: Path) -> None:
    """Give the head of a Qwen3-Next the names that MiniMax-M3's has in its checkpoints."""
    start, file = "language_model.model.mtp.layers.0.", folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        name = name.replace("mtp.fc.", f"{start}eh_proj.")
        name = re.sub(r"^mtp\.layers\.0\.", f"{start}transformer_layer.", name)
        if name.startswith(start):
            name = name.replace(".mlp.", ".block_sparse_moe.")
        tensors[name] = tensor
    save_file(tensors, file, {"format": "pt"})


def save_eagle3(folder: Path) -> None:
    """A draft model of its own, as EAGLE3's are published (MiniMax-M3's among them): one dense
    layer in bfloat16, whose attention reads the last token's embedding beside the target's state,
    and ``fc``, which makes that of three of the target's layers."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    wide = {f"self_attn.{kind}_proj": (HIDDEN, 2 * HIDDEN) for kind in "qkv"}
    plain = {"self_attn.o_proj": (HIDDEN, HIDDEN)}
    mlp = {
        "mlp.gate_proj": (96, HIDDEN),
        "mlp.up_proj": (96, HIDDEN),
        "mlp.down_proj": (HIDDEN, 96),
    }
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    sizes = {f"midlayer.{name}": size for name, size in (wide | plain | mlp).items()}
    sizes |= {f"midlayer.{name}": (HIDDEN,) for name in norms}
    sizes |= {"norm": (HIDDEN,), "fc": (HIDDEN, 3 * HIDDEN), "lm_head": (256, HIDDEN)}
    sizes["embed_tokens"] = (256, HIDDEN)
    tensors = {f"{name}.weight": torch.randn(size).bfloat16() / 4 for name, size in sizes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    data = config.to_dict() | {"architectures": ["LlamaForCausalLMEagle3"]}
    (folder / "config.json").write_text(json.dumps(data))
