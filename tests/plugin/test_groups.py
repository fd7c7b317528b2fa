"""compressed-tensors describes groups of modules: each layer's experts are what their group says,
and those that are not NVFP4 are served by stock vLLM."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import silu
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from tests.plugin import others
from tests.plugin.others import EXPERTS, HIDDEN, LAYERS, PROJECTIONS, WEIGHTS, int8, nvfp4
from tests.plugin.reference import experts_of, routed
from tests.plugin.test_layer import relative
from vllm_nvfp4_moe.method import NvFp4MoEMethod

Load = Callable[..., dict[str, Any]]
BOTH = "re:.*mlp.experts.*"
INPUTS = WEIGHTS | {"dynamic": "local"}


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return others.plain(tmp_path_factory.mktemp("groups") / "bf16")


@pytest.fixture(scope="module")
def weights_only(bf16: Path) -> Path:
    """All experts NVFP4 without input scales."""
    return others.quantized(bf16, bf16.parent / "a16", layout="compressed-tensors")


def outputs(layer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, the router's weights and experts, and what ``layer`` makes of them."""
    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.rand(7, EXPERTS, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :2].int()
    weights = torch.full((7, 2), 0.5)
    return x, weights, ids, layer.quant_method.apply(layer, x, weights, ids, None, None)


def check(layer: Any, experts: list[list[torch.Tensor]], bound: float) -> None:
    x, weights, ids, out = outputs(layer)
    truth = routed(x, experts, weights, ids, lambda g, u: silu(g) * u)
    assert relative(out, truth) < bound


def attention_in_int8(source: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "self_attn." in name and name.endswith("_proj.weight"):
            found[name], found[f"{name}_scale"] = others.to_int8(weight)
    return found


def test_weights_alone_beside_attention_with_activations(
    load: Load, weights_only: Path, tmp_path: Path
) -> None:
    """As llm-compressor writes it: one group quantizes its activations, the experts' does not."""
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors

    folder = tmp_path / "mixed"
    shutil.copytree(weights_only, folder)
    config = others.grouped(int8("re:.*self_attn.*"), nvfp4(BOTH))
    others.rewrite(folder, config, **attention_in_int8(folder))
    runners = load(folder)
    for name in LAYERS:
        layer = runners[name].routed_experts
        assert isinstance(layer.quant_method, NvFp4MoEMethod)
        assert layer.quant_method.weight_only
        check(layer, experts_of(folder, name, "compressed-tensors", EXPERTS), 6e-3)
    attention = runners["model"].model.layers[0].self_attn.qkv_proj
    assert isinstance(attention.scheme, compressed_tensors.CompressedTensorsW8A8Int8)


@pytest.mark.parametrize("how", ["no group", "ignored", "int8"])
def test_a_layer_that_is_not_nvfp4(
    load: Load, bf16: Path, weights_only: Path, tmp_path: Path, how: str
) -> None:
    """Layer 0 is NVFP4, layer 1 is as vLLM serves it: in bf16 or INT8."""
    folder = tmp_path / "partly"
    shutil.copytree(weights_only, folder)
    changed: dict[str, torch.Tensor | None] = {}
    original = load_file(bf16 / "model.safetensors")
    experts = []
    for expert in range(EXPERTS):
        experts.append([])
        for projection in PROJECTIONS:
            module = f"{LAYERS[1]}.{expert}.{projection}"
            weight = original[f"{module}.weight"]
            suffixes = ("weight_packed", "weight_scale", "weight_global_scale")
            changed |= {f"{module}.{suffix}": None for suffix in suffixes}
            if how == "int8":
                codes, scale = others.to_int8(weight)
                changed |= {f"{module}.weight": codes, f"{module}.weight_scale": scale}
            else:
                changed[f"{module}.weight"] = weight
            experts[-1].append(weight.double())
    ignore = ("lm_head", "re:.*mlp.gate$", "re:.*self_attn.*")
    if how == "ignored":
        config = others.grouped(nvfp4("Linear"), ignore=(*ignore, f"re:{LAYERS[1]}.*"))
    else:
        groups = [int8(f"re:{LAYERS[1]}.*")] if how == "int8" else []
        config = others.grouped(nvfp4(f"re:{LAYERS[0]}.*"), *groups, ignore=ignore)
    others.rewrite(folder, config, **changed)
    if how == "int8":  # stock vLLM's own word: it has no such kernels on a CPU
        with pytest.raises(NotImplementedError, match="No Int8 MoE backend supports"):
            load(folder)
        return
    first, second = (r.routed_experts for n, r in load(folder).items() if n in LAYERS)
    assert isinstance(first.quant_method, NvFp4MoEMethod)
    check(first, experts_of(folder, LAYERS[0], "compressed-tensors", EXPERTS), 6e-3)
    assert not isinstance(second.quant_method, NvFp4MoEMethod)
    assert type(second.quant_method).__name__ == "UnquantizedFusedMoEMethod"
    check(second, experts, 6e-3)


class Layer(RoutedExperts):
    """As much of a layer as groups are matched by."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    ckpt_gate_proj_name, ckpt_up_proj_name, ckpt_down_proj_name = PROJECTIONS


Layer.__name__ = "RoutedExperts"


INT4 = WEIGHTS | {"type": "int", "strategy": "group", "group_size": 32}
FP8 = WEIGHTS | {"num_bits": 8, "strategy": "channel", "group_size": None}


@pytest.mark.parametrize(
    ("groups", "ignore", "expected"),
    [
        ([nvfp4("Linear")], (), True),
        ([nvfp4("Linear", inputs=INPUTS)], (), False),
        ([nvfp4("Linear", inputs=INPUTS), int8("re:.*self_attn.*")], (), False),
        ([int8("Linear"), nvfp4(BOTH)], (), True),
        ([nvfp4("re:.*self_attn.*", inputs=INPUTS), int8(BOTH)], (), None),
        ([nvfp4("re:.*self_attn.*", inputs=INPUTS)], (), None),
        ([nvfp4("Linear")], (f"{LAYERS[0]}.0.down_proj", f"re:{LAYERS[0]}.*"), None),
        ([nvfp4("re:.*(gate|up)_proj"), int8("re:.*down_proj")], (), None),
        ([others.group([BOTH], FP8, FP8, "float-quantized"), nvfp4("re:.*self_attn.*")], (), None),
        ([nvfp4("Linear", inputs=others.INT8_INPUTS)], (), None),
        ([others.group([BOTH], INT4, None, "pack-quantized"), nvfp4("re:.*attn.*")], (), None),
    ],
)
def test_each_group_as_stock_takes_it(
    groups: list[Any], ignore: tuple[str, ...], expected: bool | None
) -> None:
    """Beside our answer, the method that stock vLLM chooses, or refuses, for the same layer."""
    from unittest import mock

    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_moe
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    from vllm_nvfp4_moe.config import NvFp4MoEConfig

    told = others.grouped(*groups, ignore=ignore)
    ours: Any = NvFp4MoEConfig.from_config(told)
    layer: Any = Layer()
    layer.moe_config = None
    assert ours.weight_only(layer, LAYERS[0]) is expected
    package = compressed_tensors_moe.__name__
    made: list[tuple[str, Any]] = []
    nv = f"{package}.compressed_tensors_moe_w4a4_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod"
    with (
        mock.patch(nv, lambda *args, use_a16: made.append(("nvfp4", use_a16))),
        mock.patch.object(UnquantizedFusedMoEMethod, "__init__", lambda self, moe: None),
    ):
        method = compressed_tensors_moe.CompressedTensorsMoEMethod.get_moe_method
        try:
            found = method(CompressedTensorsConfig.from_config(told), layer, LAYERS[0])
        except Exception:
            found = "refused, or another format"
    if expected is None:
        assert not made
        assert found is not None
    else:
        assert made == [("nvfp4", expected)]


@pytest.mark.parametrize("groups", [None, {}])
def test_a_config_without_groups(load: Load, weights_only: Path, tmp_path: Path, groups) -> None:
    folder = tmp_path / "no-groups"
    shutil.copytree(weights_only, folder)
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": []}
    others.rewrite(folder, config if groups is None else config | {"config_groups": groups})
    with pytest.raises(ValueError, match="config_groups: it does not say which modules are"):
        load(folder)


@pytest.mark.parametrize("groups", [{"a": {"weights": WEIGHTS}}, {"a": None}, [], "all", {"a": {}}])
def test_a_config_that_vllm_cannot_read(groups: Any) -> None:
    from vllm_nvfp4_moe.config import NvFp4MoEConfig

    config = others.grouped() | {"format": "nvfp4-pack-quantized", "config_groups": groups}
    with pytest.raises(ValueError, match=r"quantization_config of config\.json"):
        NvFp4MoEConfig.from_config(config)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_variant_of_nvfp4(load: Load, bf16: Path, tmp_path: Path, mixed: bool) -> None:
    folder = others.quantized(bf16, tmp_path / "awq")
    config: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ", "ignore": []}
    if mixed:
        layers = {f"{LAYERS[0]}.0.up_proj": {"quant_algo": "NVFP4_AWQ"}}
        config |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    others.rewrite(folder, config)
    with pytest.raises(ValueError, match=r"with .*NVFP4_AWQ\. NVFP4_AWQ is not plain NVFP4") as e:
        load(folder)
    assert "nvfp4-moe quantize SOURCE TARGET" in str(e.value)
