"""Each layer of NVFP4 experts is ours, or the model does not start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.layers.fused_moe import (
    FusedMoEMethodBase,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
)

from tests.plugin import others
from tests.plugin.others import LAYERS
from vllm_nvfp4_moe.method import NvFp4MoEMethod

Load = Callable[..., dict[str, Any]]
LAYOUTS = ("modelopt", "compressed-tensors")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return others.plain(tmp_path_factory.mktemp("left") / "bf16")


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("layout", [*LAYOUTS, "on the fly"])
def test_a_model_that_chooses_by_itself(
    load: Load, bf16: Path, tmp_path: Path, monkeypatch, layout: str, every: bool
) -> None:
    """vLLM 0.33's Muse Spark gives its experts a method without asking the config."""
    folder = bf16
    if layout != "on the fly":
        folder = others.quantized(bf16, tmp_path / "nvfp4", layout=layout)
    asks = RoutedExperts._get_quant_method

    def chooses(self: Any, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        if every or prefix == LAYERS[1]:
            return UnquantizedFusedMoEMethod(moe_config)
        return asks(self, prefix, quant_config, moe_config)

    monkeypatch.setattr(RoutedExperts, "_get_quant_method", chooses)
    # It would not notice: it reads what it has names for.
    monkeypatch.setattr(
        "vllm.model_executor.model_loader.default_loader.DefaultModelLoader.load_weights",
        lambda *args: None,
    )
    count, name = ("2", LAYERS[0]) if every else ("1", LAYERS[1])
    with pytest.raises(ValueError, match=rf"{count} of 2 layers are not served by") as caught:
        load(folder)
    assert f"gave {name} the method UnquantizedFusedMoEMethod without asking" in str(caught.value)


class OwnMethod(FusedMoEMethodBase):
    """Stands for the quantized method of vLLM's class for Muse Spark."""

    def create_weights(self, *args: Any, **more: Any) -> None:
        UnquantizedFusedMoEMethod(self.moe).create_weights(*args, **more)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(self, *args: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("method", [OwnMethod, UnquantizedFusedMoEMethod, None])
def test_experts_with_a_norm_after_down(
    load: Load, bf16: Path, tmp_path: Path, monkeypatch, method: Any
) -> None:
    """Only a method of the model's own class may run them; ours has no such norm, and a method that
    reads codes as floats is none."""
    folder = others.quantized(bf16, tmp_path / "nvfp4")
    config = json.loads((folder / "config.json").read_text())
    config["nvfp4_moe"] |= {"version": 3, "gate": {"form": "silu", "post_norm": True}}
    (folder / "config.json").write_text(json.dumps(config))
    if method is None:
        with pytest.raises(ValueError, match=rf"{LAYERS[0]}: .*silu\(post_norm\): a norm follows"):
            load(folder)
        return
    monkeypatch.setattr(
        RoutedExperts, "_get_quant_method", lambda self, prefix, quant, moe: method(moe)
    )
    monkeypatch.setattr(
        "vllm.model_executor.model_loader.default_loader.DefaultModelLoader.load_weights",
        lambda *args: None,
    )
    if method is OwnMethod:
        runners = load(folder)
        assert type(runners[LAYERS[0]].routed_experts.quant_method) is OwnMethod
        return
    with pytest.raises(ValueError, match="2 of 2 layers are not served by"):
        load(folder)


def spoil(folder: Path, layout: str, names: list[str]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["ignore"] += names
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_list_that_names_nvfp4_experts(
    load: Load, bf16: Path, tmp_path: Path, layout: str
) -> None:
    """vLLM would copy their codes into half of each row, and leave the rest as it was."""
    folder = others.quantized(bf16, tmp_path / "nvfp4", layout=layout)
    projections = [f"{LAYERS[1]}.{e}.{p}" for e in range(4) for p in others.PROJECTIONS]
    spoil(folder, layout, projections)
    with pytest.raises(ValueError, match=rf"{LAYERS[1]}: by the .*its experts are not NVFP4, but "):
        load(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_that_was_left_out(
    load: Load, bf16: Path, tmp_path: Path, summary_lines: list[str], layout: str
) -> None:
    """By ``--exclude``: it holds no NVFP4, and stays in bf16. The line counts it."""
    folder = others.quantized(bf16, tmp_path / "nvfp4", layout=layout, exclude=(f"{LAYERS[1]}*",))
    runners = load(folder)
    assert isinstance(runners[LAYERS[0]].routed_experts.quant_method, NvFp4MoEMethod)
    assert not isinstance(runners[LAYERS[1]].routed_experts.quant_method, NvFp4MoEMethod)
    (line,) = summary_lines
    assert f"1 layers x 4 experts, {layout} layout; 1 more are not NVFP4, and vLLM's; " in line


def test_a_model_with_experts_of_its_own(bf16: Path, tmp_path: Path, monkeypatch) -> None:
    """vLLM 0.33's Flint and Step-5 run experts that are no layers of vLLM's, for some GPUs."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_nvfp4_moe import experts_config
    from vllm_nvfp4_moe.config import NvFp4MoEConfig
    from vllm_nvfp4_moe.loading.stored import Stored

    said: list[str] = []
    monkeypatch.setattr(experts_config.logger, "warning", lambda text, *a: said.append(text % a))
    folder = others.quantized(bf16, tmp_path / "nvfp4", layout="modelopt")
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    done: list[Any] = []
    finish = {"process_weights_after_loading": lambda self, layer: done.append(layer)}
    for model, warned in ((folder, [True]), (bf16, [])):
        ours: Any = NvFp4MoEConfig.from_config(stored)
        ours.stored = Stored(str(model), None, "weight_scale_2")
        said.clear()
        method: Any = type("Method", (), finish)()
        with set_current_vllm_config(VllmConfig(), check_compile=False):
            ours._watch(method)
            method.process_weights_after_loading("layer")
        assert done.pop() == "layer"
        assert [f"{LAYERS[0]}.0.down_proj is NVFP4, but vLLM's" in text for text in said] == warned


def test_nothing_to_do(load: Load, tmp_path: Path, monkeypatch, summary_lines: list[str]) -> None:
    """All experts are excluded, and in bf16."""
    from vllm_nvfp4_moe import experts_config

    said: list[str] = []
    monkeypatch.setattr(experts_config.logger, "warning", said.append)
    config = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "ignore": ["model.layers*", "lm_head"],
    }
    others.rewrite(others.plain(tmp_path / "plain"), config)
    load(tmp_path / "plain")
    assert not summary_lines
    (warning,) = said
    assert "--quantization nvfp4_moe does nothing here" in warning
