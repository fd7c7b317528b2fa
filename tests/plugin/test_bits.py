"""Checkpoints of ``--bits``: vLLM's own readers of each layer's format get the source's weights.

vLLM 0.32 has no MXFP8 experts for CPUs, so what is compared is what its loaders leave in memory,
before kernels change it.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from quantize.experts.gates import Gate
from quantize.layouts import LAYOUTS
from tests.quantize import checkpoints
from vllm_nvfp4_moe.activation import differs
from vllm_nvfp4_moe.method import NvFp4MoEMethod

Load = Callable[..., dict[str, Any]]
LAYERS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
each = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE of two layers, whose blocks every format has."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, intermediate_size=64, moe_intermediate_size=256,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bits") / "source"
    transformers.Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """``made(layout, name)``: the model with a layer in NVFP4, and one in another format."""
    folders: dict[tuple[str, str], Path] = {}

    def made(layout: str, name: str) -> Path:
        if (layout, name) not in folders:
            folder = tmp_path_factory.mktemp("bits") / "out"
            formats = ((LAYERS[1], name),)
            checkpoints.convert(source, folder, layout=layout, bits=9.0, formats=formats)
            folders[layout, name] = folder
        return folders[layout, name]

    return made


@pytest.fixture
def as_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's methods for experts of 8 bits load stays so, and no kernel is looked for."""
    from vllm.model_executor.layers.quantization import fp8, modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8 as ct_fp8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_mxfp8 as ct_mxfp8,
    )

    def none(*_: Any, **__: Any) -> tuple[Any, Any]:
        return SimpleNamespace(value="none"), None

    for module, name, method in (
        (fp8, "select_fp8_moe_backend", fp8.Fp8MoEMethod),
        (modelopt, "select_mxfp8_moe_backend", modelopt.ModelOptMxFp8FusedMoE),
        (ct_fp8, "select_fp8_moe_backend", ct_fp8.CompressedTensorsW8A8Fp8MoEMethod),
        (ct_mxfp8, "select_mxfp8_moe_backend", ct_mxfp8.CompressedTensorsW8A8Mxfp8MoEMethod),
    ):
        monkeypatch.setattr(module, name, none)
        monkeypatch.setattr(method, "process_weights_after_loading", lambda self, layer: None)


def without_nvfp4_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise of vLLM's own methods for NVFP4."""
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as ct,
    )

    for module, method in (
        (modelopt, modelopt.ModelOptNvFp4FusedMoE),
        (ct, ct.CompressedTensorsW4A4Nvfp4MoEMethod),
    ):
        none = SimpleNamespace(value="none"), None
        monkeypatch.setattr(module, "select_nvfp4_moe_backend", lambda *_, found=none, **__: found)
        monkeypatch.setattr(method, "process_weights_after_loading", lambda self, layer: None)


def decoded(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``[experts, out, in]``, by the formats' definitions."""
    if scale.dtype == torch.uint8:
        return codes.double() * (scale.double() - 127).exp2().repeat_interleave(32, -1)
    return codes.double() * scale.double().repeat_interleave(128, 1).repeat_interleave(128, 2)


def loaded(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What is in memory: gate above up, and down."""
    parts = dict(layer.named_parameters())
    found = []
    for name in ("w13", "w2"):
        scale = parts.get(f"{name}_weight_scale_inv", parts.get(f"{name}_weight_scale"))
        assert scale is not None
        found.append(decoded(parts[f"{name}_weight"], scale))
    return found[0], found[1]


@pytest.mark.parametrize("name", ["fp8", "mxfp8"])
@pytest.mark.parametrize("ours", [True, False])
@each
@pytest.mark.usefixtures("as_loaded")
def test_vllm_loads_the_weights(
    load: Load, made: Callable, source: Path, layout: str, ours: bool, name: str, monkeypatch: Any
) -> None:
    """By our config and by vLLM's own."""
    folder = made(layout, name)
    if not ours:
        without_nvfp4_kernels(monkeypatch)
        stock = Path(shutil.copytree(folder, folder.with_name("stock"), dirs_exist_ok=True))
        config = json.loads((stock / "config.json").read_text())
        del config["nvfp4_moe"]
        (stock / "config.json").write_text(json.dumps(config))
        folder = stock
    runners = load(folder, "nvfp4_moe" if ours else None)
    first, second = (runners[layer].routed_experts for layer in LAYERS)
    assert isinstance(first.quant_method, NvFp4MoEMethod) is ours
    assert not isinstance(second.quant_method, NvFp4MoEMethod)
    original = load_file(source / "model.safetensors")

    def stack(name: str) -> torch.Tensor:
        return torch.stack([original[f"{LAYERS[1]}.{e}.{name}.weight"].double() for e in range(4)])

    truth = torch.cat([stack("gate_proj"), stack("up_proj")], 1), stack("down_proj")
    for weight, wanted in zip(loaded(second), truth, strict=True):
        assert weight.shape == wanted.shape
        assert 0.02 < (weight - wanted).norm() / wanted.norm() < 0.03


@each
def test_layers_that_stay(load: Load, made: Callable, source: Path, layout: str) -> None:
    layer = load(made(layout, "bf16"))[LAYERS[1]].routed_experts
    assert type(layer.quant_method).__name__ == "UnquantizedFusedMoEMethod"


def save_mixtral(folder: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    model = checkpoints.build("mixtral", vocab_size=256, num_experts_per_tok=2, **sizes)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral") / "source"
    # In another process: where vLLM has loaded a model, Transformers' classes cannot be built.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(save_mixtral, folder).result()
    return folder


@pytest.mark.parametrize("ours", [True, False])
@each
@pytest.mark.usefixtures("as_loaded")
def test_a_class_with_other_names(
    load: Load, mixtral: Path, layout: str, ours: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    """vLLM's for Mixtral says to its layers that files have ``w1``."""
    prefix = "model.layers.1.block_sparse_moe.experts"
    formats = ((prefix, "fp8"),)
    checkpoints.convert(mixtral, tmp_path / "out", layout=layout, bits=9.0, formats=formats)
    if not ours:
        without_nvfp4_kernels(monkeypatch)
        config = json.loads((tmp_path / "out/config.json").read_text())
        del config["nvfp4_moe"]
        (tmp_path / "out/config.json").write_text(json.dumps(config))
    runners = load(tmp_path / "out", "nvfp4_moe" if ours else None, skip_tokenizer_init=True)
    layer = runners[prefix].routed_experts
    assert layer.ckpt_gate_proj_name == "w1"
    original = load_file(mixtral / "model.safetensors")
    names = [[f"{prefix}.{e}.{n}.weight" for e in range(4)] for n in ("w1", "w3", "w2")]
    w1, w3, w2 = (torch.stack([original[n].double() for n in each]) for each in names)
    for weight, wanted in zip(loaded(layer), (torch.cat([w1, w3], 1), w2), strict=True):
        assert 0.02 < (weight - wanted).norm() / wanted.norm() < 0.03


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "bf16"])
@pytest.mark.usefixtures("as_loaded")
def test_they_apply_the_checkpoints_gate(
    load: Load, random_m3: dict[int, Path], tmp_path: Path, name: str, monkeypatch: Any
) -> None:
    """vLLM's Transformers backend says SiLU, whatever the model's class does."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    # As GPUs' kernels do.
    monkeypatch.setattr(CPUUnquantizedExperts, "_supports_activation", lambda activation: True)
    formats = (("model.layers.2.mlp.experts", name),)
    checkpoints.convert(random_m3[3], tmp_path / "out", bits=9.0, formats=formats)
    layer = load(tmp_path / "out")["model.layers.2.mlp.experts"].routed_experts
    assert not isinstance(layer.quant_method, NvFp4MoEMethod)
    for owner in (layer, layer.quant_method.moe):
        assert owner.activation.value == "swigluoai_uninterleave"
        assert (owner.swiglu_alpha, owner.swiglu_beta, owner.swiglu_limit) == (1.702, 1.0, 7.0)


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_a_gate_without_kernels_is_refused(
    load: Load, random_m3: dict[int, Path], tmp_path: Path, name: str
) -> None:
    """vLLM's own kernels for CPUs do not apply MiniMax-M3's."""
    formats = (("model.layers.2.mlp.experts", name),)
    checkpoints.convert(random_m3[3], tmp_path / "out", bits=9.0, formats=formats)
    message = r"layers\.2\.mlp\.experts: the checkpoint's experts apply swiglu_oai.* apply silu"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "out")


@each
def test_a_config_that_does_not_know_8_bits(
    load: Load, made: Callable, tmp_path: Path, layout: str
) -> None:
    """vLLM would copy E4M3 codes into bf16 weights, and leave their scales out."""
    folder = Path(shutil.copytree(made(layout, "fp8"), tmp_path / "out"))
    for file in (folder / "config.json", folder / "hf_quant_config.json"):
        if not file.exists():
            continue
        whole = json.loads(file.read_text())
        config = whole.get("quantization_config") or whole["quantization"]
        if layout == "modelopt":
            layers = config["quantized_layers"]
            for name in [name for name in layers if name.startswith(LAYERS[1])]:
                del layers[name]
        else:
            groups = config["config_groups"]
            (eight,) = (name for name, group in groups.items() if group["weights"]["num_bits"] == 8)
            del groups[eight]
            config["ignore"].append(f"re:{LAYERS[1]}.*")
        file.write_text(json.dumps(whole))
    with pytest.raises(
        ValueError, match=rf"{LAYERS[1]}: by the .* not quantized, but it has {LAYERS[1]}\..*scale"
    ):
        load(folder)


OAI, STEP = Gate("swiglu_oai", 1.702, 1.0, 7.0), Gate("swiglu_step", limit=7.0)
APPLIED: list[tuple[str, tuple[float | None, ...], tuple[float | None, ...], Gate]] = [
    ("silu", (None, None, None), (), Gate("silu")),
    ("silu", (None, None, 10.0), (), Gate("swiglu_oai", 1.0, 0.0, 10.0)),
    ("gelu_tanh", (None, None, None), (), Gate("gelu_tanh")),
    ("relu2_no_mul", (None, None, None), (), Gate("relu2")),
    ("swigluoai", (None, None, None), (), OAI),
    ("swigluoai_uninterleave", (1.702, 1.0, 7.0), (), OAI),
    ("swigluoai_uninterleave", (1.702, 1.0, 9.0), (), Gate("swiglu_oai", 1.702, 1.0, 9.0)),
    ("swiglustep", (None, None, None), (), STEP),
    ("situ", (None, None, None), (4.0, 25.0), Gate("situ", 4.0, 0.0, 25.0)),
]
"""vLLM's activation, its numbers (and SiTU's), and which gate that is."""


@pytest.mark.parametrize("at", range(len(APPLIED)))
def test_what_a_layer_applies(at: int) -> None:
    """Of two layers that apply different gates, neither is taken for the other."""
    name, numbers, situ, gate = APPLIED[at]
    config = SimpleNamespace()
    if situ:
        config.activation_situ_beta, config.activation_situ_linear_beta = situ
    layer: Any = SimpleNamespace(activation=MoEActivation(name), moe_config=config)
    layer.swiglu_alpha, layer.swiglu_beta, layer.swiglu_limit = numbers
    for other in (*(gate for *_, gate in APPLIED), Gate("swiglu_step", limit=5.0), Gate("gelu")):
        assert differs(layer, other) == (other != gate), other
