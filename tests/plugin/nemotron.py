"""Nemotron-H with random weights, as NVIDIA publishes it: experts without a gate, by ReLU²."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.experts.gates import Gate
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.quantize import checkpoints

LAYER = "model.layers.1.mixer.experts"
"""Of the pattern ``*E``, by vLLM's name; in files ``model`` is ``backbone``."""
STORED = "backbone.layers.1.mixer.experts"
EXPERTS, HIDDEN, LATENT, INNER, TOP_K = 8, 128, 64, 48, 3

CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "vocab_size": 256,
    "hidden_size": HIDDEN, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "intermediate_size": 96, "mlp_hidden_act": "relu2", "n_routed_experts": EXPERTS,
    "n_shared_experts": 1, "num_experts_per_tok": TOP_K, "moe_intermediate_size": INNER,
    "moe_latent_size": LATENT, "moe_shared_expert_intermediate_size": 80, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "mamba_num_heads": 4,
    "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4, "expand": 2,
    "chunk_size": 16, "max_position_embeddings": 128, "layer_norm_epsilon": 1e-5, "mlp_bias": False,
    "use_bias": False, "use_conv_bias": True, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip

PUZZLE = '''"""What vLLM asks of a Puzzle model's config: what holds for one layer alone."""
import copy
from transformers import PretrainedConfig

class NemotronHPuzzleConfig(PretrainedConfig):
    model_type = "nemotron_h_puzzle"

    @property
    def hybrid_override_pattern(self):
        return "".join({"attention": "*", "moe": "E"}[b["block_type"]] for b in self.block_configs)

    def get_nemotron_h_config_for_layer(self, number):
        own = copy.copy(self)
        for name, value in self.block_configs[number].items():
            setattr(own, name, value)
        return own
'''


def tensors_of(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """All tensors of a model of attention and experts, by their published names."""
    random = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}

    def put(name: str, *shape: int) -> None:
        scale = 1 if len(shape) == 1 else 1.5 / shape[-1] ** 0.5
        found[name] = (torch.randn(shape, generator=random) * scale).bfloat16()

    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    put("backbone.embeddings.weight", vocabulary, hidden)
    put("backbone.norm_f.weight", hidden)
    put("lm_head.weight", vocabulary, hidden)
    blocks = config.get("block_configs") or [
        {"block_type": {"*": "attention", "E": "moe"}[kind]}
        for kind in config["hybrid_override_pattern"]
    ]
    for number, block in enumerate(blocks):
        own, prefix = config | block, f"backbone.layers.{number}"
        put(f"{prefix}.norm.weight", hidden)
        if block["block_type"] == "attention":
            sizes = (("q", 128, hidden), ("k", 64, hidden), ("v", 64, hidden), ("o", hidden, 128))
            for name, rows, columns in sizes:
                put(f"{prefix}.mixer.{name}_proj.weight", rows, columns)
            continue
        put(f"{prefix}.mixer.gate.weight", own["n_routed_experts"], hidden)
        bias = torch.randn(own["n_routed_experts"], generator=random) * 0.1
        found[f"{prefix}.mixer.gate.e_score_correction_bias"] = bias
        shared = own["moe_shared_expert_intermediate_size"]
        put(f"{prefix}.mixer.shared_experts.up_proj.weight", shared, hidden)
        put(f"{prefix}.mixer.shared_experts.down_proj.weight", hidden, shared)
        width, inner = own["moe_latent_size"] or hidden, own["moe_intermediate_size"]
        if own["moe_latent_size"]:
            put(f"{prefix}.mixer.fc1_latent_proj.weight", width, hidden)
            put(f"{prefix}.mixer.fc2_latent_proj.weight", hidden, width)
        for expert in range(own["n_routed_experts"]):
            put(f"{prefix}.mixer.experts.{expert}.up_proj.weight", inner, width)
            put(f"{prefix}.mixer.experts.{expert}.down_proj.weight", width, inner)
    return found


def write(folder: Path, pattern: str = "*E", seed: int = 0, **more: Any) -> Path:
    """A checkpoint in bfloat16. ``more`` are fields of its config."""
    config = CONFIG | {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)} | more
    return checkpoints.save(folder, tensors_of(config, seed), config)


def write_puzzle(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """A Puzzle: layers of attention, and behind each one experts, (number, intermediate size)."""
    blocks: list[dict[str, Any]] = []
    for experts, inner in sizes:
        own = {"n_routed_experts": experts, "moe_intermediate_size": inner}
        blocks += [{"block_type": "attention"}, {"block_type": "moe"} | own]
    config = CONFIG | {
        "architectures": ["NemotronHPuzzleForCausalLM"],
        "model_type": "nemotron_h_puzzle",
        "auto_map": {"AutoConfig": "configuration_nemotron_h_puzzle.NemotronHPuzzleConfig"},
        "block_configs": blocks,
        "layers_block_type": [block["block_type"] for block in blocks],
        "num_hidden_layers": len(blocks),
        "n_routed_experts": max(experts for experts, _ in sizes),
    }
    del config["moe_intermediate_size"]
    checkpoints.save(folder, tensors_of(config), config)
    (folder / "configuration_nemotron_h_puzzle.py").write_text(PUZZLE)
    return folder


def stacked(source: Path, folder: Path) -> Path:
    """The same with a layer's experts in one tensor for each projection, as Transformers' own
    class has them."""
    from safetensors.torch import load_file

    tensors = load_file(source / "model.safetensors")
    layers = {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
    for layer in sorted(layers):
        for projection in ("up_proj", "down_proj"):
            names = [f"{layer}.experts.{e}.{projection}.weight" for e in range(EXPERTS)]
            whole = torch.stack([tensors.pop(name) for name in names])
            tensors[f"{layer}.experts.{projection}"] = whole
    return checkpoints.save(folder, tensors, json.loads((source / "config.json").read_text()))


def quantized(source: Path, folder: Path, layout: str = "modelopt") -> Path:
    """``source`` quantized, with input scales. The gate is stated, as for a Puzzle it must be."""
    options = Options(layout=layout, activations=True, gate=Gate("relu2"))
    with Checkpoint(source) as checkpoint:
        execute(checkpoint, plan(checkpoint, options), folder)
    return folder
