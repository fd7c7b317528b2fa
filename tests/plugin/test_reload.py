"""Weights are loaded again: everything stays where it is, and has the values of a fresh load.

vLLM's own reloading runs here (``reload_weights``, which ``update_weights`` shares), in this
process on the CPU. The second checkpoint has other weights in every tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
from vllm_nvfp4_moe.loading.loaders import QuantizingLoader
from vllm_nvfp4_moe.loading.tensors import TensorKind

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
            execute(source, plan(source, Options(layout=layout, activations=True)), folders[layout])
    return folders


def reload(model: torch.nn.Module, folder: Path, at_once: bool = True) -> None:
    """What vLLM's worker does for ``reload_weights(weights_path=folder)``, without a current
    config, as in trainers that call this themselves."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    assert get_current_vllm_config_or_none() is None
    config = EngineArgs(model=str(folder), quantization="nvfp4_moe").create_engine_config()
    loader: Any = get_model_loader(config.load_config)
    initialize_layerwise_reload(model)
    model.load_weights(loader.get_all_weights(config.model_config, model))  # type: ignore[operator]
    # Each layer once it is complete: whole models in bf16 do not fit into memory beside this.
    assert not get_layerwise_info(experts(model)).can_load() or not at_once
    finalize_layerwise_reload(model, config.model_config)


def experts(model: torch.nn.Module) -> Any:
    (layer,) = [m for m in model.modules() if hasattr(m, "local_num_experts")]
    return layer


def everything(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All tensors that a forward pass may read, by name: of modules, methods and kernels.

    Without attention's, which vLLM keeps itself: its copies of scales for the host move, and 0.32
    does not load GPT-OSS's sinks again.
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
    return {
        name: tensor for name, tensor in found.items() if not re.search(r"\.(self_)?attn\.", name)
    }


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
    """Load ``first``, then others over it. The layer's experts, for a further look."""
    model = load(first)["model"]
    before = places(model)
    layer = experts(model)
    method, kernel = layer.quant_method, layer.quant_method.moe_kernel
    fresh = {folder: load(folder)["model"] for folder in (first, second)}
    one, two = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in fresh.values())
    constant = [name for name in one if torch.equal(bits(one[name]), bits(two[name]))]
    # vLLM-CPU leaves nothing in linear layers' weights, which it has packed.
    changes = [n for n in constant if one[n].numel() and ("weight" in n or "bias" in n)]
    assert changes == []
    for folder in (second, first, second, second):
        reload(model, folder)
        assert places(model) == before
        assert layer.quant_method is method
        assert method.moe_kernel is kernel
        same(model, fresh[folder])
    return layer


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_on_a_cpu(
    load: Load, shallow: dict[str, Path], other: dict[str, Path], layout: str
) -> None:
    check(load, shallow[layout], other[layout])


def test_on_the_fly(load: Load, shallow_bf16: Path, other_bf16: Path, other: Any) -> None:
    layer = check(load, shallow_bf16, other_bf16)
    offline = load(other["modelopt"])[LAYER].routed_experts
    for name, parameter in layer.named_parameters():  # without input scales
        assert torch.equal(bits(parameter), bits(getattr(offline, name))), name


def convert_for(name: str, monkeypatch: MonkeyPatch) -> None:
    """Layers are converted for these kernels, which are not run. None of it needs a GPU."""
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4

    from vllm_nvfp4_moe.backends import vllm_kernels
    from vllm_nvfp4_moe.backends.hopper.method import HopperMethod
    from vllm_nvfp4_moe.backends.selection import Selection

    monkeypatch.setenv("NVFP4_MOE_SELF_CHECK", "0")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    method: Any = vllm_kernels.VllmKernelsMethod
    if name.startswith("hopper"):
        monkeypatch.setenv("NVFP4_MOE_ACTIVATIONS", name.split()[1])
        method = HopperMethod
    else:
        monkeypatch.setenv("NVFP4_MOE_ACTIVATIONS", "nvfp4")  # which on the fly must be asked for
        backend = nvfp4.NvFp4MoeBackend(name)
        (experts_cls,) = nvfp4.backend_to_kernel_cls(backend)
        monkeypatch.setattr(vllm_kernels, "select", lambda *_: Selection(backend, experts_cls, []))
    monkeypatch.setattr(method, "unsupported", classmethod(lambda cls, layer: None))


@pytest.mark.parametrize(
    ("kernel", "source"),
    [
        ("hopper bf16", "modelopt"),
        ("hopper bf16", "compressed-tensors"),
        ("hopper bf16", "on the fly"),
        ("hopper fp8", "on the fly"),
        ("VLLM_CUTLASS", "modelopt"),
        ("VLLM_CUTLASS", "on the fly"),
        ("FLASHINFER_CUTLASS", "compressed-tensors"),
    ],
)
def test_for_a_gpu(
    load: Load, shallow: dict[str, Path], other: dict[str, Path], shallow_bf16: Path,
    other_bf16: Path, kernel: str, source: str, monkeypatch: MonkeyPatch,
) -> None:  # fmt: skip
    convert_for(kernel, monkeypatch)
    pairs = {name: (shallow[name], other[name]) for name in other}
    pairs["on the fly"] = shallow_bf16, other_bf16
    layer = check(load, *pairs[source])
    # vLLM's CUDA router demands it, and m3-nano has it in bfloat16.
    assert layer.e_score_correction_bias.dtype == torch.float32


def test_processing_twice_is_refused(load: Load, shallow: dict[str, Path]) -> None:
    """A trainer that calls vLLM's function of that name without having loaded anything."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    model = load(shallow["modelopt"])["model"]
    config: Any = SimpleNamespace(word_embeddings_untied_by_checkpoint=False)
    with pytest.raises(ValueError, match=rf"{LAYER}: .*converted already.* reload_weights"):
        process_weights_after_loading(model, config, torch.device("cpu"))


def test_a_reload_that_fails(load: Load, shallow_bf16: Path, other_bf16: Path) -> None:
    """Half of an expert came; it is not paired with a half of the next checkpoint. vLLM keeps it
    for the next reload, which is then refused, too."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    model = load(shallow_bf16)["model"]
    layer = experts(model)
    initialize_layerwise_reload(model)
    parameter = layer.w13_weight
    parameter.weight_loader(
        parameter, torch.ones(128, 384).bfloat16(), f"{LAYER}.w13_weight", "w3", 7, True
    )
    with pytest.raises(ValueError, match=r"missing .*expert 0, gate \(w1\), weight;.* 92 more"):
        finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=rf"{LAYER}: missing|came twice"):
        reload(model, other_bf16, at_once=False)


def test_a_half_that_comes_twice(load: Load, shallow_bf16: Path) -> None:
    layer = experts(load(shallow_bf16)["model"])
    loads = layer.quant_method.loads
    quantizing = QuantizingLoader(loads, {})
    loads.seen = {(TensorKind.CODES, s, e) for s in ("w1", "w2", "w3") for e in range(32)}
    stored: list[Any] = []
    quantizing._store = lambda *args: stored.append(args)  # type: ignore[method-assign]
    for shard in ("w3", "w1", "w3"):
        quantizing(torch.empty(1), torch.ones(128, 384).bfloat16(), "", shard, 7)
    assert len(stored) == 2
    with pytest.raises(ValueError, match=rf"{LAYER}: expert 7, up \(w3\), weight came twice"):
        loads.complete()


def test_dummy_weights_first(load: Load, other: dict[str, Path]) -> None:
    """As trainers start: the real weights come by a reload, and are checked like any others."""
    model = load(other["modelopt"], load_format="dummy")["model"]
    method = experts(model).quant_method
    assert method.context.self_check.worst is None
    reload(model, other["modelopt"])
    assert method.context.self_check.worst is not None
    same(model, load(other["modelopt"])["model"])
