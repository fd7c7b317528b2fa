"""Output heads: a tied one has no tensors that a list could name, and some of vLLM's models give
theirs no name. Folders that list neither serve all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.plugin import others

Load = Callable[..., dict[str, Any]]


def unlisted(folder: Path) -> Path:
    """The folder as it was written before heads were listed always."""
    lists = (
        ("config.json", "quantization_config", "ignore"),
        ("hf_quant_config.json", "quantization", "exclude_modules"),
    )
    for file, *keys in lists:
        path = folder / file
        if path.exists():
            whole = json.loads(path.read_text())
            listed = whole[keys[0]][keys[1]]
            whole[keys[0]][keys[1]] = [name for name in listed if "head" not in name]
            path.write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_no_list_names(load: Load, tmp_path: Path, layout: str, tied: bool) -> None:
    """Its weight is the embeddings' where they are tied, and the file's own where not."""
    source = others.plain(tmp_path / "bf16", tie_word_embeddings=tied)
    folder = unlisted(others.quantized(source, tmp_path / "nvfp4", layout=layout))
    original = load_file(source / "model.safetensors")
    assert ("lm_head.weight" in original) != tied
    head = load(folder)["model"].lm_head
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert torch.equal(head.weight[:256], original[name])
    x = torch.randn(3, others.HIDDEN).bfloat16()
    out = head.quant_method.apply(head, x)[:, :256]
    assert torch.allclose(out.double(), x.double() @ original[name].double().T, atol=0.05)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_a_head_without_a_prefix(load: Load, tmp_path: Path, layout: str) -> None:
    """As vLLM builds AFMoE's."""
    source = tmp_path / "bf16"
    torch.manual_seed(0)
    config = transformers.AfmoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, moe_intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_experts=4, num_experts_per_tok=2, num_shared_experts=1, num_dense_layers=1, n_group=1,
        topk_group=1, layer_types=["full_attention"] * 2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.AfmoeForCausalLM(config).bfloat16().save_pretrained(source)
    published = {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0}
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | published))
    runners = load(others.quantized(source, tmp_path / "nvfp4", layout=layout))
    head = runners["model"].lm_head
    assert head.prefix == ""
    assert torch.equal(head.weight[:256], load_file(source / "model.safetensors")["lm_head.weight"])


def test_a_head_that_is_nvfp4(load: Load, tmp_path: Path) -> None:
    """Others may store one so. Then it is stock vLLM's, which has no such kernel on CPUs."""
    folder = others.quantized(others.plain(tmp_path / "bf16"), tmp_path / "nvfp4")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors |= {
        "lm_head.weight": torch.zeros(256, 32, dtype=torch.uint8),
        "lm_head.weight_scale": torch.ones(256, 4).to(torch.float8_e4m3fn),
        "lm_head.weight_scale_2": torch.tensor(1.0),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="NVFP4 kernel"):
        load(unlisted(folder))
