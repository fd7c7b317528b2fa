"""Small random models with a tokenizer, as folders, for the accuracy bench's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MiniMaxM3VLTextConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

VOCABULARY = 259
ARCHITECTURES = ("qwen3", "m3")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ("<pad>", "<bos>", "<eos>")
    bpe = Tokenizer(models.BPE({token: k for k, token in enumerate((*special, *alphabet))}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def model(architecture: str) -> Any:
    """Float32, all weights normal with deviation 0.1, so that experts and routes matter."""
    torch.manual_seed(0)
    if architecture == "qwen3":
        made: Any = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **_COMMON, intermediate_size=64, moe_intermediate_size=32, num_experts=4,
                norm_topk_prob=True,
            )
        )  # fmt: skip
    else:
        made = MiniMaxM3VLForCausalLM(
            MiniMaxM3VLTextConfig(
                **_COMMON, dense_intermediate_size=64, shared_intermediate_size=32,
                intermediate_size=32, num_local_experts=4, routed_scaling_factor=2.0,
                swiglu_alpha=1.702, swiglu_limit=7.0, rotary_dim=16,
                layer_types=["full_attention"] * 2, mlp_layer_types=["dense", "sparse"],
                rope_parameters={
                    "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                },
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return made.eval()


def save(architecture: str, folder: Path) -> Path:
    """The checkpoint, in bf16, as ``folder``."""
    model(architecture).bfloat16().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
