"""Multi-token-prediction layers draft what the model then checks: their experts stay the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.plan import plan
from tests.plugin.reference import routed
from tests.plugin.test_layer import relative
from vllm_nvfp4_moe.method import NvFp4MoEMethod

Load = Callable[..., dict[str, Any]]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SPECULATE = {"method": "mtp", "num_speculative_tokens": 1}
TARGET, DRAFT = "model.layers.1.mlp.experts", "model.layers.2.mlp.experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GLM-4.5: two layers with experts, and a third that drafts, as published."""
    folder = tmp_path_factory.mktemp("glm") / "bf16"
    torch.manual_seed(0)
    config = transformers.Glm4MoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, moe_intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=0,
        n_group=1, topk_group=1, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.Glm4MoeForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.startswith("model.layers.1.")]:
        draft = name.replace("layers.1", "layers.2")
        tensors[draft] = torch.randn_like(tensors[name].float()).to(tensors[name].dtype)
    vector = torch.ones(64).bfloat16()
    own = {"enorm": vector, "hnorm": vector.clone(), "shared_head.norm": vector.clone()}
    own["eh_proj"] = torch.randn(64, 128).bfloat16()
    own["shared_head.head"] = tensors["lm_head.weight"].clone()
    own["embed_tokens"] = tensors["model.embed_tokens.weight"].clone()
    tensors |= {f"model.layers.2.{name}.weight": tensor for name, tensor in own.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    config_json = json.loads(file.read_text()) | {"num_nextn_predict_layers": 1}
    file.write_text(json.dumps(config_json))
    return folder


@pytest.mark.parametrize("on_the_fly", [True, False])
def test_their_experts_stay_as_they_are(
    load: Load, folder: Path, tmp_path: Path, on_the_fly: bool
) -> None:
    served, flag = folder, "nvfp4_moe"
    if not on_the_fly:
        served, flag = tmp_path / "quantized", None  # its contract claims it, and its draft
        with Checkpoint(folder) as source:
            execute(source, plan(source), served)
    runners = load(served, flag, speculative_config=SPECULATE)
    assert isinstance(runners[TARGET].routed_experts.quant_method, NvFp4MoEMethod)
    draft = runners[DRAFT].routed_experts
    assert not isinstance(draft.quant_method, NvFp4MoEMethod)
    tensors = load_file(folder / "model.safetensors")
    experts = [
        [tensors[f"{DRAFT}.{n}.{name}.weight"].double() for name in PROJECTIONS] for n in range(4)
    ]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights, ids = torch.full((5, 2), 0.5), torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]])
    # vLLM packs them for its kernel. In bf16 they are right to 3 digits; NVFP4 is right to 1.
    out = draft.quant_method.apply(draft, x, weights, ids.int(), None, None)
    truth = routed(x, experts, weights, ids, lambda g, u: torch.nn.functional.silu(g) * u)
    assert relative(out, truth) < 0.01


def test_their_gate_is_not_that_of_a_layer_with_their_number() -> None:
    from quantize.experts.gates import Gate, Gates

    first, most = Gate("swiglu_step", limit=5.0), Gate("silu")
    gates = Gates(most, {0: first, 3: first})
    assert gates.of("model.layers.0.mlp.experts") == first
    for drafting in (
        "mtp.layers.0.mlp.experts",
        "model.mtp.layers.0.mlp.experts",
        "nextn.0.experts",
    ):
        assert gates.of(drafting) == most
    assert gates.of("model.layers.3.mtp_block.mlp.experts") == first  # counted with the others
