"""What no list of a checkpoint names. A tied head has no tensors to be listed by, some of vLLM's
models give theirs no name, and others merge linears under a name of their own. Folders serve all
the same."""

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


def unlisted(folder: Path, part: str = "head") -> Path:
    """The folder without what has ``part`` in its name on the lists; by default, as it was written
    before heads were listed always."""
    lists = (
        ("config.json", "quantization_config", "ignore"),
        ("hf_quant_config.json", "quantization", "exclude_modules"),
    )
    for file, *keys in lists:
        path = folder / file
        if path.exists():
            whole = json.loads(path.read_text())
            listed = whole[keys[0]][keys[1]]
            whole[keys[0]][keys[1]] = [name for name in listed if part not in name]
            path.write_text(json.dumps(whole))
    return folder


def store_nvfp4(folder: Path, module: str, out: int) -> None:
    """Exchange the module's weight, ``[out, HIDDEN]``, for one in NVFP4."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        f"{module}.weight": torch.zeros(out, others.HIDDEN // 2, dtype=torch.uint8),
        f"{module}.weight_scale": torch.ones(out, others.HIDDEN // 16).to(torch.float8_e4m3fn),
        f"{module}.weight_scale_2": torch.tensor(1.0),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


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
    store_nvfp4(folder, "lm_head", 256)
    with pytest.raises(ValueError, match="NVFP4 kernel"):
        load(unlisted(folder))


def test_linears_that_no_list_names(load: Load, tmp_path: Path) -> None:
    """As q_a_proj and kv_a_proj are when vLLM's Transformers backend merges them."""
    folder = unlisted(
        others.quantized(others.plain(tmp_path / "bf16"), tmp_path / "nvfp4"), "o_proj"
    )
    own = load_file(folder / "model.safetensors")
    linear = load(folder)["model"].model.layers[1].self_attn.o_proj
    x = torch.randn(3, others.HIDDEN).bfloat16()
    want = x.double() @ own["model.layers.1.self_attn.o_proj.weight"].double().T
    assert torch.allclose(linear(x)[0].double(), want, atol=0.05)
    # Where some linear is NVFP4, nothing but the list says which.
    store_nvfp4(folder, "model.layers.1.self_attn.o_proj", others.HIDDEN)
    with pytest.raises(ValueError, match="NVFP4 kernel"):
        load(folder)
