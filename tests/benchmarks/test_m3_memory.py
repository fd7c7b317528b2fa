"""The memory arithmetic in docs/operators/minimax-m3.md, against the model itself."""

from __future__ import annotations

import pytest
import torch

from benchmarks.m3_memory import SETUPS, MiniMaxM3, table
from tests.conftest import ROOT

PUBLISHED = 427_040_140_160
"""Values in the published checkpoint."""


def test_parameters_are_those_of_the_model() -> None:
    from transformers import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLConfig
    from vllm.transformers_utils.configs.minimax_m3 import MiniMaxM3TextConfig

    published = MiniMaxM3TextConfig()  # vLLM's defaults mirror the published config
    text = {
        "moe_layer_freq": published.moe_layer_freq,
        "sparse_attention_config": published.sparse_attention_config,
    }
    with torch.device("meta"):
        model = MiniMaxM3SparseForConditionalGeneration(MiniMaxM3VLConfig(text_config=text))
    routed = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    biases = sum(b.numel() for name, b in model.named_buffers() if "correction_bias" in name)
    assert MiniMaxM3().routed == routed
    assert sum(p.numel() for p in model.parameters()) + biases == MiniMaxM3().parameters
    assert MiniMaxM3().parameters == PUBLISHED


def test_one_gpu_holds_the_checkpoint() -> None:
    model = MiniMaxM3()
    assert model.weight_bytes(1) == pytest.approx(model.checkpoint_bytes(nvfp4=True))


def test_a_token_of_kv_cache_is_what_vllm_would_allocate() -> None:
    """vLLM's own cache specs for MiniMax-M3's two kinds of cache, on one of four ranks."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    block = 128
    main = FullAttentionSpec(block_size=block, num_kv_heads=1, head_size=128, dtype=torch.bfloat16)
    index = MLAAttentionSpec(block_size=block, num_kv_heads=1, head_size=128, dtype=torch.bfloat16)
    pages = 60 * main.page_size_bytes + 57 * index.page_size_bytes
    assert MiniMaxM3().kv_bytes(tensor=4) == pages / block
    assert MiniMaxM3().kv_bytes(tensor=8) == pages / block  # key/value heads are repeated


def test_the_operators_page_has_the_current_table() -> None:
    assert table() in (ROOT / "docs" / "operators" / "minimax-m3.md").read_text()
    assert len(SETUPS) == len(table().splitlines()) - 2
