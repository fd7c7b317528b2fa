"""Small checkpoints for tests: random models of several families, saved and quantized."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import Summary, execute
from quantize.run.options import Options
from quantize.run.plan import plan
from quantize.run.report_files import REPORT, REPORT_DATA
from tests.quantize.reference import INDEX

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS, HIDDEN, INTERMEDIATE = 4, 32, 48

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
"""Environment of processes that tests start, with one OpenMP thread: several would wait for each
other by spinning, which is slow on a busy machine."""


def qwen3_moe(**more: Any) -> transformers.PreTrainedConfig:
    return transformers.Qwen3MoeConfig(
        **SIZES | {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2} | more,
        head_dim=16,
        intermediate_size=64,
        decoder_sparse_step=1,
    )


def mixtral(**more: Any) -> transformers.PreTrainedConfig:
    return transformers.MixtralConfig(
        **SIZES | {"intermediate_size": 48, "num_local_experts": 4} | more
    )


def deepseek_v3(**more: Any) -> transformers.PreTrainedConfig:
    return transformers.DeepseekV3Config(
        **SIZES | {"moe_intermediate_size": 48, "n_routed_experts": 4} | more,
        intermediate_size=64,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )


def minimax_m3(**more: Any) -> transformers.PreTrainedConfig:
    from transformers.models.minimax_m3_vl import MiniMaxM3VLTextConfig

    sizes = SIZES | {
        "intermediate_size": 48,
        "num_local_experts": 4,
        "head_dim": 16,
        "rotary_dim": 8,
        "dense_intermediate_size": 64,
        "shared_intermediate_size": 48,
        "num_experts_per_tok": 2,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "layer_types": ["full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return MiniMaxM3VLTextConfig(**sizes | more)


def trained(layers: int) -> transformers.PreTrainedConfig:
    """Of m3-nano's sizes: those of a real model's, in tiles and blocks that kernels have."""
    return minimax_m3(
        vocab_size=4096, hidden_size=384, num_hidden_layers=layers, intermediate_size=128,
        dense_intermediate_size=768, shared_intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, rotary_dim=64, num_local_experts=32,
        num_experts_per_tok=4, routed_scaling_factor=2.0, max_position_embeddings=2048,
        layer_types=["full_attention"] * layers,
        mlp_layer_types=["dense"] + ["sparse"] * (layers - 1),
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        },
    )  # fmt: skip


def gpt_oss(**more: Any) -> transformers.PreTrainedConfig:
    return transformers.GptOssConfig(
        **SIZES | {"intermediate_size": 48, "num_local_experts": 4, "head_dim": 16} | more,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=2,
    )


def llama(**more: Any) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(**SIZES | {"intermediate_size": 48} | more)


CONFIGS: dict[str, Callable[..., transformers.PreTrainedConfig]] = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "deepseek_v3": deepseek_v3,
    "minimax_m3": minimax_m3,
    "gpt_oss": gpt_oss,
    "llama": llama,
}


def build(name: str, **more: Any) -> transformers.PreTrainedModel:
    """A random model of a name in ``CONFIGS``, as :func:`random_model` makes it."""
    return random_model(CONFIGS[name](**more))


def save_m3_nano(folder: Path, layers: int) -> Path:
    """A random model of m3-nano's sizes, saved by Transformers as ``folder``, which is returned.
    With stacked experts, as m3-nano itself."""
    model = random_model(trained(layers))
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return save(folder, dict(model.state_dict()), config)


def random_model(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """In bfloat16. No two parameters have the same values."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.05)
    return model


def save(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    shard_of: Callable[[str], int] | None = None,
) -> Path:
    """Write a checkpoint to ``folder``, which is returned.

    Args:
        shard_of: the number of the shard for the name of a tensor. With it, an index is written;
            without it, there is one file and no index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shard_of is None:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    numbers = sorted({shard_of(name) for name in tensors})
    files = {n: f"model-{i:05d}-of-{len(numbers):05d}.safetensors" for i, n in enumerate(numbers)}
    for number, file in files.items():
        part = {name: t for name, t in tensors.items() if shard_of(name) == number}
        save_file(part, folder / file, {"format": "pt"})
    write_index(folder, {name: files[shard_of(name)] for name in tensors})
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def per_expert(
    fused: dict[str, torch.Tensor], names: tuple[str, str, str] = PROJECTIONS
) -> dict[str, torch.Tensor]:
    """Split stacked ``gate_up_proj`` and ``down_proj`` into one tensor per expert and projection.

    ``gate_up_proj`` is ``[experts, 2 * intermediate, hidden]``: all of gate, then all of up.

    Args:
        names: the names of gate, up and down.
    """
    gate_name, up_name, down_name = names
    out = {}
    for name, tensor in fused.items():
        prefix, _, kind = name.rpartition(".")
        for expert in range(len(tensor)) if prefix.endswith(".experts") else ():
            module = f"{prefix}.{expert}"
            if kind == "gate_up_proj":
                half = tensor.shape[1] // 2
                out[f"{module}.{gate_name}.weight"] = tensor[expert, :half].clone()
                out[f"{module}.{up_name}.weight"] = tensor[expert, half:].clone()
            else:
                out[f"{module}.{down_name}.weight"] = tensor[expert].clone()
        if not prefix.endswith(".experts"):
            out[name] = tensor
    return out


def convert(
    source: Path,
    target: Path,
    layout: str = "modelopt",
    scales: str = Options.scales,
    overwrite: bool = False,
    resume: bool = False,
    **more: Any,
) -> Summary:
    """Quantize the checkpoint ``source`` to ``target``. ``more`` are fields of ``Options``."""
    with Checkpoint(source) as checkpoint:
        steps = plan(checkpoint, Options(layout=layout, scales=scales, **more))
        return execute(checkpoint, steps, target, overwrite=overwrite, resume=resume)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by relative path, except the report, which names source and target."""
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file() and f.name not in (REPORT, REPORT_DATA)
    }
