"""Experts in other formats beside NVFP4 in vLLM's own class for MiniMax-M3.

The class cannot be imported on a CPU, so its loading is run from its source, on modules that are
called as its own. Names are those of the published model. What is compared is what lies in memory
before kernels change it.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import vllm
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.fused_moe import (
    FusedMoEFactory,
    fused_moe_make_expert_params_mapping,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.model_loader import weight_utils
from vllm.model_executor.models.utils import is_pp_missing_parameter

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.layouts import LAYOUTS
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.hub_layout import publish
from tests.plugin.conftest import Damage
from tests.plugin.test_base import decoded, fp8_on_cpus  # noqa: F401
from tests.plugin.test_bits import as_loaded, loaded, without_nvfp4_kernels  # noqa: F401
from tests.plugin.test_layer import relative
from vllm_nvfp4_moe.errors import RefusedError
from vllm_nvfp4_moe.experts_config import ExpertsConfig
from vllm_nvfp4_moe.formats import from_checkpoint
from vllm_nvfp4_moe.loading import minimax_m3
from vllm_nvfp4_moe.method import NvFp4MoEMethod

LAYER = "model.layers.2"
NVFP4, OTHER = "model.layers.1.block_sparse_moe.experts", f"{LAYER}.block_sparse_moe.experts"
EXPERTS = 32
ARCHITECTURES = ["MiniMaxM3SparseForCausalLM"]
each = pytest.mark.parametrize("layout", LAYOUTS)
pytestmark = pytest.mark.usefixtures("as_loaded")


@pytest.fixture(scope="module")
def hub(random_m3: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sparse layers, as the hub publishes the model. The last has the indexer of sparse
    attention."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name, rows in (("index_q_proj", 256), ("index_k_proj", 128)):
            tensors[f"{LAYER}.self_attn.{name}.weight"] = torch.randn(rows, 384).bfloat16()

    folder = tmp_path_factory.mktemp("m3")
    return Damage(publish(random_m3[3], folder / "plain"), folder / "hub").tensors(add)


@pytest.fixture(scope="module")
def made(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """``made(layout, name)``: a layer in NVFP4, and one in another format."""
    folders: dict[tuple[str, str], Path] = {}

    def made(layout: str, name: str) -> Path:
        if (layout, name) not in folders:
            folder = tmp_path_factory.mktemp("m3") / "out"
            more: dict[str, Any] = {"bits": 9.0, "formats": ((OTHER, name),)}
            if name == "weight-only":
                more = {"weight_only": (OTHER,), "activations": True}
            elif name.startswith("base-"):
                more = {"base": name.removeprefix("base-")}
            with Checkpoint(hub) as checkpoint:
                execute(checkpoint, plan(checkpoint, Options(layout=layout, **more)), folder)
            folders[layout, name] = folder
        return folders[layout, name]

    return made


def class_of(vendor: str) -> type[torch.nn.Module]:
    """vLLM's ``MiniMaxM3Model`` with nothing but how it loads, from its source."""
    file = Path(vllm.__file__).parent / "models/minimax_m3" / vendor / "model.py"
    tree = ast.parse(file.read_text())
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "MiniMaxM3Model")
    kept = ("get_expert_mapping", "load_weights")
    found.body = [n for n in found.body if isinstance(n, ast.FunctionDef) and n.name in kept]
    assert len(found.body) == 2
    found.bases, found.decorator_list = [ast.parse("torch.nn.Module", mode="eval").body], []
    future = ast.parse("from __future__ import annotations").body
    names: dict[str, Any] = {
        "torch": torch,
        "fused_moe_make_expert_params_mapping": fused_moe_make_expert_params_mapping,
        "is_pp_missing_parameter": is_pp_missing_parameter,
        "default_weight_loader": weight_utils.default_weight_loader,
        "maybe_remap_kv_scale_name": weight_utils.maybe_remap_kv_scale_name,
        "__name__": f"vllm.models.minimax_m3.{vendor}.model",
    }
    exec(compile(ast.Module([*future, found], []), str(file), "exec"), names)
    made: type[torch.nn.Module] = names["MiniMaxM3Model"]
    return made


def config_of(folder: Path, ours: bool) -> Any:
    """The quantization config of a checkpoint, by this package or by vLLM."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.architectures = ARCHITECTURES
    value = json.loads((folder / "config.json").read_text())["quantization_config"]
    if not ours:
        name = value["quant_method"]
        if name == "modelopt":
            mixed = value["quant_algo"] == "MIXED_PRECISION"
            name = "modelopt_mixed" if mixed else "modelopt_fp4"
        found = get_quantization_config(name).from_config(value)
    else:
        found = from_checkpoint(value)
    found.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    with pytest.MonkeyPatch.context() as patch:  # else this is refused on CPUs, as it should be
        patch.setattr("vllm_nvfp4_moe.gpu_only.refusal", lambda _: None)
        found.maybe_update_config(str(folder), config)
    return found


@pytest.fixture(scope="module")
def engine(load: Callable[..., Any], shallow_bf16: Path) -> Any:
    load(shallow_bf16, None)  # vLLM's groups of ranks are there then
    return EngineArgs(model=str(shallow_bf16), max_model_len=64).create_engine_config()


@pytest.fixture
def build(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """``build(folder, ours)``: the model with the checkpoint's weights, as the class builds and
    loads it; ``lost``: but for those tensors."""

    def build(folder: Path, ours: bool = True, lost: str = "never", vendor: str = "nvidia") -> Any:
        owner = class_of(vendor)
        module = ModuleType(owner.__module__)
        module.MiniMaxM3Model = owner  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, owner.__module__, module)
        if not ours:
            without_nvfp4_kernels(monkeypatch)
        config = config_of(folder, ours)
        engine.compilation_config.static_forward_context.clear()
        model: Any = owner()
        model.config = SimpleNamespace(num_local_experts=EXPERTS, n_shared_experts=1)
        model.is_fused_shared_expert_enabled = False  # on AMD
        model.layers = torch.nn.ModuleDict({"1": torch.nn.Module(), "2": torch.nn.Module()})
        for number, layer in model.layers.items():
            add_layer(layer, f"model.layers.{number}", config)
        tensors = load_file(folder / "model.safetensors").items()
        model.load_weights(
            (name.removeprefix("model."), tensor)
            for name, tensor in tensors
            if not re.fullmatch(lost, name)
        )
        return model

    with set_current_vllm_config(engine):
        yield build


def add_layer(layer: Any, prefix: str, config: Any) -> None:
    """As ``MiniMaxM3DecoderLayer`` makes it: all that may be quantized."""
    block, mlp, attention = (torch.nn.Module() for _ in range(3))
    layer.block_sparse_moe, layer.self_attn = block, attention
    more: dict[str, Any] = {"bias": False, "quant_config": config}
    sizes = (384, 128, 4, 2)
    name = f"{prefix}.self_attn.qkv_proj"
    if prefix == LAYER:
        attention.qkv_proj = linear.MinimaxM3QKVParallelLinearWithIndexer(
            *sizes, 2, 128, prefix=name, **more
        )
    else:
        attention.qkv_proj = linear.QKVParallelLinear(*sizes, prefix=name, **more)
    attention.o_proj = linear.RowParallelLinear(
        512, 384, prefix=f"{prefix}.self_attn.o_proj", **more
    )
    prefix = f"{prefix}.block_sparse_moe"
    name = f"{prefix}.shared_experts"
    mlp.gate_up_proj = linear.MergedColumnParallelLinear(
        384, [128, 128], prefix=f"{name}.gate_up_proj", **more
    )
    mlp.down_proj = linear.RowParallelLinear(128, 384, prefix=f"{name}.down_proj", **more)
    block.shared_experts = mlp
    block.experts = FusedMoEFactory(
        num_experts=EXPERTS, top_k=4, hidden_size=384, intermediate_size=128,
        scoring_func="sigmoid", e_score_correction_bias=torch.nn.Parameter(torch.zeros(EXPERTS)),
        renormalize=True, activation="swigluoai_uninterleave", swiglu_limit=7.0,
        swiglu_alpha=1.702, swiglu_beta=1.0, quant_config=config, prefix=f"{prefix}.experts",
    )  # fmt: skip


def experts(model: Any, name: str) -> Any:
    return model.get_submodule(name.removeprefix("model.")).routed_experts


def truth(hub: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The source's weights of the layer that is not NVFP4: gate above up, and down."""
    tensors = load_file(hub / "model.safetensors")

    def stack(name: str) -> torch.Tensor:
        found = [tensors[f"{OTHER}.{e}.{name}.weight"].double() for e in range(EXPERTS)]
        return torch.stack(found)

    return torch.cat([stack("w1"), stack("w3")], 1), stack("w2")


def check(layer: Any, hub: Path) -> None:
    layer.quant_method.process_weights_after_loading(layer)
    for weight, wanted in zip(loaded(layer), truth(hub), strict=True):
        assert weight.shape == wanted.shape
        assert 0.02 < (weight - wanted).norm() / wanted.norm() < 0.03


@pytest.mark.parametrize("name", ["fp8", "mxfp8"])
@pytest.mark.parametrize("ours", [True, False])
@each
def test_the_weights_are_loaded(
    build: Callable[..., Any], made: Any, hub: Path, layout: str, ours: bool, name: str
) -> None:
    model = build(made(layout, name), ours)
    one, other = (experts(model, prefix) for prefix in (NVFP4, OTHER))
    assert isinstance(one.quant_method, NvFp4MoEMethod) is ours
    assert "FP8" in type(other.quant_method).__name__.upper()
    if (layout, ours, name) == ("modelopt", False, "fp8"):
        # Why --bits does not choose it (quantize.run.readers). vLLM is mended if this fails.
        assert other.w13_weight_scale_inv.unique().tolist() == [1.0]
    else:
        check(other, hub)


def test_amds_class(build: Callable[..., Any], made: Any, hub: Path) -> None:
    check(experts(build(made("modelopt", "fp8"), vendor="amd"), OTHER), hub)


@pytest.mark.parametrize("ours", [True, False])
@each
def test_weights_alone_beside(
    build: Callable[..., Any], made: Any, layout: str, ours: bool
) -> None:
    """A layer without input scales, by the class's names."""
    model = build(made(layout, "weight-only"), ours)
    methods = [experts(model, prefix).quant_method for prefix in (NVFP4, OTHER)]
    name = "weight_only" if ours else "use_a16"
    assert [getattr(method, name) for method in methods] == [False, True]


@pytest.mark.parametrize("base", ["fp8", "mxfp8"])
@pytest.mark.parametrize("ours", [True, False])
@each
@pytest.mark.usefixtures("mxfp8_on_cpus", "fp8_on_cpus")
def test_linears_beside(
    build: Callable[..., Any], made: Any, layout: str, ours: bool, base: str
) -> None:
    """``--base``. Queries stay where the class fuses the indexer of sparse attention with them."""
    folder = made(layout, f"base-{base}")
    stored = load_file(folder / "model.safetensors")
    kinds = {"qkv_proj": ["q", "k", "v"], "gate_up_proj": ["gate", "up"]}
    found = []
    for name, module in build(folder, ours).named_modules():
        if not isinstance(module, linear.LinearBase) or "._shared_experts." in name:
            continue
        path, _, last = f"model.{name}".rpartition(".")
        parts = kinds.get(last, [last.removesuffix("_proj")])
        if plain := isinstance(module, linear.MinimaxM3QKVParallelLinearWithIndexer):
            parts = [*parts, "index_q", "index_k"]
        names = [f"{path}.{part}_proj" for part in parts]
        found.append(plain)
        assert isinstance(module.quant_method, linear.UnquantizedLinearMethod) == plain
        if plain:
            assert torch.equal(module.weight, torch.cat([stored[f"{n}.weight"] for n in names]))
            continue
        weight = torch.cat([decoded(folder, name, base) for name in names])
        module.quant_method.process_weights_after_loading(module)
        given = torch.randn(5, weight.shape[1]).bfloat16()
        result = module.quant_method.apply(module, given)
        assert relative(result, given.double() @ weight.T) < 0.04, name
    assert (found.count(False), found.count(True)) == (7, 1)


def by_name(folder: Path, target: Path) -> Path:
    """The checkpoint with experts named one by one, as this package wrote configs before."""

    def change(config: dict[str, Any]) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            group["targets"] = [
                name
                for target in group["targets"]
                for name in (
                    [f"{OTHER}.{e}.{w}" for e in range(EXPERTS) for w in ("w1", "w2", "w3")]
                    if target.startswith("re:")
                    else [target]
                )
            ]

    return Damage(folder, target).config(change)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj"), ("w1", "w3"), ("up_proj", None)])
@pytest.mark.parametrize("path", ["{}", "language_model.{}", "model.layers.2.mlp.text_experts"])
@pytest.mark.parametrize("name", ["fp8", "mxfp8", "weight-only"])
def test_whatever_vllms_class_calls_projections(
    made: Any, name: str, path: str, names: tuple[str, str | None], monkeypatch: Any
) -> None:
    """The method that vLLM chooses for a layer whose class says these names, or none."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        CompressedTensorsMoEMethod,
        compressed_tensors_moe_w4a4_nvfp4,
        compressed_tensors_moe_w8a8_fp8,
        compressed_tensors_moe_w8a8_mxfp8,
    )

    for module, chosen, value in (
        (compressed_tensors_moe_w4a4_nvfp4, "CompressedTensorsW4A4Nvfp4MoEMethod", "weight-only"),
        (compressed_tensors_moe_w8a8_fp8, "CompressedTensorsW8A8Fp8MoEMethod", "fp8"),
        (compressed_tensors_moe_w8a8_mxfp8, "CompressedTensorsW8A8Mxfp8MoEMethod", "mxfp8"),
    ):
        monkeypatch.setattr(module, chosen, lambda *_, use_a16=True, v=value: v if use_a16 else "")
    config = config_of(made("compressed-tensors", name), ours=False)
    layer = torch.nn.Module()
    layer.__class__ = type("RoutedExperts", (torch.nn.Module,), {})
    layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name = names
    layer.ckpt_down_proj_name, layer.moe_config = "w2", None
    method = CompressedTensorsMoEMethod.get_moe_method
    assert method(config, layer, path.format(OTHER)) == name
    # Only where input scales were asked for, other layers' activations are quantized.
    others = "" if name == "weight-only" else "weight-only"
    path = path.format(OTHER).replace("layers.2", "layers.1")
    assert method(config, layer, path) == others


@pytest.mark.parametrize("name", ["fp8", "mxfp8"])
def test_older_configs(
    build: Callable[..., Any], made: Any, hub: Path, tmp_path: Path, name: str
) -> None:
    """vLLM takes such experts for NVFP4, which is why they are patterns now."""
    folder = by_name(made("compressed-tensors", name), tmp_path / "old")
    check(experts(build(folder), OTHER), hub)
    config = config_of(folder, ours=False)
    config._add_fused_moe_to_target_scheme_map()
    layer = torch.nn.Module()
    layer.__class__ = type("RoutedExperts", (torch.nn.Module,), {})
    found = config.get_scheme_dict(layer, f"{OTHER}.0.gate_proj")
    assert found["weights"].num_bits == 4


def test_scales_that_the_class_drops_are_refused(
    build: Callable[..., Any], made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If nobody shows it their parameters."""
    monkeypatch.setattr(minimax_m3, "load_scales", lambda layer: None)
    layer = experts(build(made("modelopt", "fp8")), OTHER)
    message = rf"{re.escape(OTHER)}: nothing was loaded into w13_weight_scale_inv for 32 of its"
    with pytest.raises(RefusedError, match=message):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("name", ["fp8", "mxfp8"])
@each
def test_one_tensor_that_is_not_there(
    build: Callable[..., Any], made: Any, layout: str, name: str
) -> None:
    for matrix in ("w1", "w3", "w2"):
        for kind, ending in (("weight", ""), ("weight_scale", r"_scale\w*")):
            lost = rf"{re.escape(OTHER)}\.5\.{matrix}\.weight{ending}"
            layer = experts(build(made(layout, name), lost=lost), OTHER)
            stack = "w2" if matrix == "w2" else "w13"
            message = (
                rf"into {stack}_{kind}\w* for 1 of its 32 experts here .*first is 5, {matrix}\)"
            )
            with pytest.raises(RefusedError, match=message):
                layer.quant_method.process_weights_after_loading(layer)


@each
def test_biases_that_the_class_drops_are_refused(
    build: Callable[..., Any], made: Any, tmp_path: Path, layout: str, monkeypatch: Any
) -> None:
    """Also of experts in 8 bits, which vLLM's own methods run."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{OTHER}.5.w2.bias"] = torch.ones(384)

    folder = Damage(made(layout, "mxfp8"), tmp_path / "biased").tensors(add)
    found = rf"{re.escape(OTHER)}: the checkpoint has .*5\.w2\.bias, and vLLM's"
    with pytest.raises(RefusedError, match=f"{found} class for the model would"):
        build(folder)
    # Of a class that knows biases, which the method does not.
    monkeypatch.setattr(ExpertsConfig, "_refuse_biases_left_out", lambda *_: None)
    with pytest.raises(RefusedError, match=rf"{found} \w+M[oO]E\w* would leave"):
        build(folder)
