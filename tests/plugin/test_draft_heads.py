"""Heads for drafting of three families, loaded by vLLM's own classes, against plain floats.

What is in a head is what is in its files, whatever the checkpoint's lists say.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.linear import (
    LinearBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from tests.plugin import draft_heads
from tests.plugin.reference import experts_of, routed
from tests.plugin.test_layer import relative
from vllm_nvfp4_moe.drafts import name_in_files
from vllm_nvfp4_moe.formats import from_checkpoint
from vllm_nvfp4_moe.method import NvFp4MoEMethod

Load = Callable[..., dict[str, Any]]
SPECULATE = {"method": "mtp", "num_speculative_tokens": 1}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp(family) for family in draft_heads.FAMILIES}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(draft_heads.make, made, made.values()))
    return made


def check_rest(draft: torch.nn.Module, tensors: dict[str, torch.Tensor], head: str) -> None:
    """All of a head but its experts gives what plain products of its tensors give."""
    x = torch.Generator().manual_seed(1)
    seen = set()
    for path, module in draft.named_modules():
        if not isinstance(module, (LinearBase, torch.nn.Linear)):
            continue
        name = re.sub(r"^model\.", "mtp.", path) if head.startswith("mtp") else path
        above, last = name.replace(".mtp_block", "").rpartition(".")[::2]
        parts = [f"{above}.{part}.weight" for part in FUSED.get(last, (last,))]
        weight = torch.cat([tensors[part] for part in parts]).float()
        given = torch.randn(5, weight.shape[1], generator=x).bfloat16()
        if isinstance(module, LinearBase):  # routers are float32
            out = module.quant_method.apply(module, given.to(module.params_dtype))
        else:
            out = module(given)
        assert relative(out.detach(), given.float() @ weight.T) < 0.01, path
        seen.update(parts)
    norms = dict(draft.named_parameters())
    for name, tensor in tensors.items():
        if name.startswith((head, "mtp.")) and "norm" in name:
            mine = name.replace(head, f"{head}mtp_block.")
            mine = re.sub("^mtp", "model", name) if head.startswith("mtp") else mine
            found = norms[mine] if mine in norms else norms[name]
            assert torch.equal(found, tensor), name
            seen.add(name)
    # Nothing is left over that nobody compared.
    left = {n for n in tensors if n.startswith((head, "mtp.")) and ".experts." not in n} - seen
    assert {n.rsplit(".", 2)[-2] for n in left} <= {"head", "embed_tokens", "gate"}, left


@pytest.mark.parametrize("family", draft_heads.FAMILIES)
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize(
    ("stored", "listed"), [("plain", True), ("plain", False), ("nvfp4", False)]
)
def test_a_head_is_what_its_files_hold(
    load: Load, folders: dict[str, Path], tmp_path: Path,
    family: str, layout: str, stored: str, listed: bool,
) -> None:  # fmt: skip
    served = folders[family] / f"{layout}-{stored}"
    if not listed:
        served = draft_heads.without_list(served, tmp_path / "served", family)
    head = draft_heads.HEAD[family]
    prefix = f"{head}mlp.experts"
    runners = load(served, "nvfp4_moe", speculative_config=SPECULATE)
    target = runners["model.layers.1.mlp.experts"].routed_experts
    assert isinstance(target.quant_method, NvFp4MoEMethod)
    experts = runners[prefix].routed_experts
    assert isinstance(experts.quant_method, NvFp4MoEMethod) == (stored == "nvfp4")

    tensors = load_file(served / "model.safetensors")
    if stored == "nvfp4":
        weights = experts_of(served, prefix, layout, draft_heads.EXPERTS)
    else:
        weights = [
            [tensors[f"{prefix}.{n}.{name}.weight"].double() for name in PROJECTIONS]
            for n in range(draft_heads.EXPERTS)
        ]
    x = torch.randn(5, draft_heads.HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    shares, ids = torch.full((5, 2), 0.5), torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]])
    out = experts.quant_method.apply(experts, x, shares, ids.int(), None, None)
    truth = routed(x, weights, shares, ids, lambda g, u: torch.nn.functional.silu(g) * u)
    assert relative(out, truth) < 0.01
    check_rest(runners["model"].draft, tensors, head)


@pytest.mark.parametrize("on_the_fly", [True, False])
def test_a_draft_model_of_its_own_is_not_quantized(
    load: Load, folders: dict[str, Path], tmp_path: Path, on_the_fly: bool
) -> None:
    eagle = tmp_path / "eagle3"
    draft_heads.save_eagle3(eagle)
    target = folders["Glm4Moe"] / ("bf16" if on_the_fly else "modelopt-plain")
    speculate = {"method": "eagle3", "model": str(eagle), "num_speculative_tokens": 1}
    runners = load(target, "nvfp4_moe", speculative_config=speculate)
    for layer in range(draft_heads.LAYERS):
        experts = runners[f"model.layers.{layer}.mlp.experts"].routed_experts
        assert isinstance(experts.quant_method, NvFp4MoEMethod)
    tensors = load_file(eagle / "model.safetensors")
    x, compared = torch.Generator().manual_seed(1), set()
    for path, module in runners["model"].draft.named_modules():
        if not isinstance(module, (LinearBase, ParallelLMHead)):
            continue
        name = path.removeprefix("model.").replace("layers.0.", "midlayer.")
        above, _, last = name.rpartition(".")
        parts = [f"{above}.{part}.weight".lstrip(".") for part in FUSED.get(last, (last,))]
        weight = torch.cat([tensors[part] for part in parts]).float()
        given = torch.randn(5, weight.shape[1], generator=x).bfloat16()
        out = module.quant_method.apply(module, given)
        assert relative(out, given.float() @ weight.T) < 0.01, path
        compared.update(parts)
    assert {n for n, t in tensors.items() if t.ndim == 2} - compared == {"embed_tokens.weight"}


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("stored", ["plain", "nvfp4"])
def test_minimax_m3s_head_is_known_by_the_names_that_vllm_gives_it(
    load: Load, folders: dict[str, Path], tmp_path: Path, layout: str, stored: str
) -> None:
    """vLLM's class for it (models/minimax_m3/nvidia/mtp.py) needs a GPU even to be imported. It
    calls its modules as those of a first layer, and they are not built here, but asked about."""
    made = folders["Qwen3Next"] / f"{layout}-{stored}"
    folder = draft_heads.without_list(made, tmp_path / "served", "Qwen3Next")
    draft_heads.rename_as_minimax_m3(folder)
    layer = load(folders["Qwen3Next"] / f"{layout}-plain")["model.layers.1.mlp.experts"]
    experts = layer.routed_experts
    hf_config = transformers.AutoConfig.from_pretrained(folder)
    hf_config.architectures = ["MiniMaxM3SparseForConditionalGeneration"]
    config = from_checkpoint(hf_config.quantization_config)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # as its class
    with pytest.MonkeyPatch.context() as patch:  # else this is refused on CPUs, as it should be
        patch.setattr("vllm_nvfp4_moe.gpu_only.refusal", lambda _: None)
        config.maybe_update_config(str(folder), hf_config)
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "eh_proj"):
        prefix = f"model.layers.0.{name}"
        linear = ReplicatedLinear(64, 64, bias=False, prefix=prefix)
        assert type(config.get_quant_method(linear, prefix)) is UnquantizedLinearMethod, name
    asked = "model.layers.0.block_sparse_moe.experts"
    plain = config._is_plain_draft(experts, name_in_files(asked, hf_config.architectures[0]))
    assert plain == (stored == "plain")
    if plain:
        assert config.get_quant_method(experts, asked) is None  # vLLM's own method for floats
    # The model's own first layer is none of the head's.
    own = "language_model.model.layers.0.block_sparse_moe.experts"
    assert not config._is_plain_draft(experts, name_in_files(own, hf_config.architectures[0]))


def test_a_head_that_the_files_do_not_have_is_told_of(
    load: Load, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = folders["Glm4Moe"] / "modelopt-plain"
    shutil.copytree(source, tmp_path / "served")
    file = tmp_path / "served" / "model.safetensors"
    head = draft_heads.HEAD["Glm4Moe"]
    left = {n: t for n, t in load_file(file).items() if not n.startswith(head)}
    save_file(left, file, {"format": "pt"})
    logger = logging.getLogger("vllm.nvfp4_moe.config")
    logger.addHandler(caplog.handler)
    try:
        load(tmp_path / "served", "nvfp4_moe", speculative_config=SPECULATE)
        assert f"{tmp_path / 'served'} has no weights for the layers that draft" in caplog.text
        caplog.clear()
        elsewhere = SPECULATE | {"model": str(folders["Glm4Moe"] / "bf16")}
        runners = load(tmp_path / "served", "nvfp4_moe", speculative_config=elsewhere)
        assert "has no weights" not in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
    tensors = load_file(folders["Glm4Moe"] / "bf16" / "model.safetensors")
    check_rest(runners["model"].draft, tensors, head)
