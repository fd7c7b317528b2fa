"""vLLM's classes of single models, in which experts come under names of their own, or are routed as
no other model's are."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from tests.plugin import others
from tests.plugin.conftest import Damage
from tests.plugin.reference import experts_of, routed
from tests.plugin.test_layer import relative, routing
from tests.quantize import families
from vllm_nvfp4_moe import quirks

LAYOUTS = ("modelopt", "compressed-tensors")
LAYERS = {
    "aria": "language_model.model.layers.1.mlp.experts",
    "dbrx": "transformer.blocks.1.ffn",
    "laguna": "model.layers.1.mlp.experts",
}
"""By family: what vLLM calls a layer."""
EXPERTS = 4


def write(family: str, folder: Path) -> None:
    """A tiny model as Transformers saves it, and quantized in each layout."""
    sizes = families.SMALL | {"hidden_size": 64, "d_model": 64, "head_dim": 32}
    if family == "laguna":
        sizes["num_hidden_layers"] = 3  # two with experts
    config = families.sized(family, sizes, families.SPECIAL.get(family, {}), {"head_dim": 32})
    others.written(config, folder, LAYOUTS)
    if family == "laguna":
        others.quantized(folder / "bf16", folder / "left", exclude=("*.layers.1.*",))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {family: tmp_path_factory.mktemp(family) for family in (*LAYERS, "minimax_m2")}
    # In another process: where vLLM has loaded a model, Transformers' classes cannot be built.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(write, found, found.values()))
    return found


@pytest.mark.parametrize("stored", [*LAYOUTS, "bf16"])
@pytest.mark.parametrize("family", LAYERS)
def test_experts_match_the_reference(
    load: Callable[..., dict[str, Any]], folders: dict[str, Path], family: str, stored: str
) -> None:
    """Offline, and on the fly, which gives the same as offline."""
    layer = load(folders[family] / stored, dtype="float32", skip_tokenizer_init=True)[
        LAYERS[family]
    ].routed_experts
    layout = "modelopt" if stored == "bf16" else stored
    folder = folders[family] / layout
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = [re.match(r"(.*\.1\..*\.experts)\.0\.", name) for name in file.keys()]  # noqa: SIM118
    (prefix,) = {match[1] for match in found if match}
    truth = experts_of(folder, prefix, layout, EXPERTS)
    torch.manual_seed(0)
    for tokens in (1, 7):
        x = torch.randn(tokens, 64)
        weights, ids = routing(tokens, EXPERTS, 2)
        out = layer.quant_method.apply(layer, x, weights, ids, None, None)
        wanted = routed(
            x, truth, weights, ids, lambda gate, up: torch.nn.functional.silu(gate) * up
        )
        assert relative(out, wanted) < 1e-5, tokens


@pytest.mark.parametrize("stored", ["modelopt", "left"])
def test_lagunas_bias(
    load: Callable[..., dict[str, Any]], folders: dict[str, Path], stored: str
) -> None:
    """The router's, which the checkpoint has among the experts, also of a layer that is left."""
    folder = folders["laguna"] / stored
    runner = load(folder, skip_tokenizer_init=True)[LAYERS["laguna"]]
    with safe_open(folder / "model.safetensors", "pt") as file:
        bias = file.get_tensor(f"{LAYERS['laguna']}.e_score_correction_bias")
    assert bias.abs().max() > 0.1
    assert torch.equal(runner.router.e_score_correction_bias, bias.float())


def test_a_routers_bias_that_is_left_out(
    load: Callable[..., dict[str, Any]], folders: dict[str, Path]
) -> None:
    """vLLM 0.32's Transformers backend routes by itself, and looks for the bias in the gate alone.
    0.33's has the model's own block choose."""
    bias = r"model\.layers\.0\.\w+\.e_score_correction_bias"
    for stored in (*LAYOUTS, "bf16"):
        try:
            runners = load(
                folders["minimax_m2"] / stored, skip_tokenizer_init=True,
                model_impl="transformers",
            )  # fmt: skip
        except ValueError as error:
            assert re.search(f"the checkpoint has {bias}, with which its router", str(error))
        else:
            for runner in (layer for name, layer in runners.items() if name.endswith("experts")):
                assert runner.router.custom_routing_function.func.__module__ == (
                    "vllm.model_executor.models.transformers.moe"
                )


def test_a_stack_that_cannot_be_cut(
    load: Callable[..., dict[str, Any]], folders: dict[str, Path], tmp_path: Path
) -> None:
    name = "transformer.blocks.1.ffn.experts.mlp.v1"

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    folder = Damage(folders["dbrx"] / "bf16", tmp_path / "cut").tensors(cut)
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn.*mlp\.v1: its 191 rows cannot be"):
        load(folder, skip_tokenizer_init=True)


def test_ernies_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax, and a bias that counts for the choice alone: as the model's own."""
    from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
    from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

    torch.manual_seed(0)
    config = transformers.Ernie4_5_MoeConfig(hidden_size=64, moe_num_experts=16, moe_k=3)
    theirs = Ernie4_5_MoeTopKRouter(config)
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.3)
    bias = theirs.moe_statics.e_score_correction_bias.data[0]
    router = create_fused_moe_router(
        top_k=3, global_num_experts=16, renormalize=True, e_score_correction_bias=bias
    )
    monkeypatch.setattr(quirks, "runner_of", lambda layer: SimpleNamespace(router=router))
    x = torch.randn(50, 64)
    logits, weights, ids = theirs(x)
    assert not torch.equal(ids.sort(1)[0], logits.topk(3)[1].sort(1)[0])  # the bias matters
    quirks.use_grouped_routing(SimpleNamespace())  # type: ignore[arg-type]
    found, found_ids = router.select_experts(hidden_states=x, router_logits=logits)
    order, found_order = ids.argsort(1), found_ids.long().argsort(1)
    assert torch.equal(ids.gather(1, order), found_ids.long().gather(1, found_order))
    torch.testing.assert_close(weights.gather(1, order), found.gather(1, found_order))
