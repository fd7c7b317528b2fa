"""Both layouts on disk: names, dtypes, shapes, meaning, and the configs that engines read."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
)
from safetensors.torch import load_file

from quantize import layouts
from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.layouts import LAYOUTS
from quantize.nvfp4.format import NvFp4
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.quantize import checkpoints, reference
from tests.quantize.checkpoints import EXPERTS, HIDDEN, INTERMEDIATE

EXPERTS_AT = "model.layers.1.mlp.experts"
SHAPES = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
MODULES = [f"{EXPERTS_AT}.{e}.{kind}" for e in range(EXPERTS) for kind in SHAPES]
PROJECTIONS = [pytest.param(m, id=m.removeprefix(f"{EXPERTS_AT}.")) for m in MODULES[:4]]


@pytest.fixture(scope="module")
def written(
    saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A tiny MiniMax-M3 (one sparse layer), quantized in each layout."""
    folders = {name: tmp_path_factory.mktemp("layouts") / name for name in LAYOUTS}
    for name, folder in folders.items():
        with Checkpoint(saved("minimax_m3")) as source:
            execute(source, plan(source, Options(layout=name, activations=True)), folder)
    return folders


@pytest.fixture(scope="module")
def weights_only(
    saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same, as it is by default: nobody has seen the experts' inputs."""
    folders = {name: tmp_path_factory.mktemp("weights") / name for name in LAYOUTS}
    for name, folder in folders.items():
        with Checkpoint(saved("minimax_m3")) as source:
            execute(source, plan(source, Options(layout=name)), folder)
    return folders


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_modelopt_names_dtypes_and_shapes(written: dict[str, Path]) -> None:
    tensors = reference.read_folder(written["modelopt"])
    wanted = {}
    for module in MODULES:
        rows, columns = SHAPES[module.rpartition(".")[2]]
        wanted[f"{module}.weight"] = ("U8", (rows, columns // 2))
        wanted[f"{module}.weight_scale"] = ("F8_E4M3", (rows, columns // 16))
        wanted[f"{module}.weight_scale_2"] = ("F32", ())
        wanted[f"{module}.input_scale"] = ("F32", ())
    found = {name: (t.dtype, t.shape) for name, t in tensors.items() if f"{EXPERTS_AT}." in name}
    assert found == wanted
    for module in MODULES:
        assert tensors[f"{module}.input_scale"].array() == 1.0


def test_compressed_tensors_names_dtypes_and_shapes(written: dict[str, Path]) -> None:
    tensors = reference.read_folder(written["compressed-tensors"])
    wanted = {}
    for module in MODULES:
        rows, columns = SHAPES[module.rpartition(".")[2]]
        wanted[f"{module}.weight_packed"] = ("U8", (rows, columns // 2))
        wanted[f"{module}.weight_scale"] = ("F8_E4M3", (rows, columns // 16))
        wanted[f"{module}.weight_global_scale"] = ("F32", (1,))
        wanted[f"{module}.input_global_scale"] = ("F32", (1,))
    found = {name: (t.dtype, t.shape) for name, t in tensors.items() if f"{EXPERTS_AT}." in name}
    assert found == wanted
    for module in MODULES:
        assert tensors[f"{module}.input_global_scale"].array() == [1.0]


def test_both_layouts_hold_the_same_numbers(written: dict[str, Path]) -> None:
    ours = reference.read_folder(written["modelopt"])
    theirs = reference.read_folder(written["compressed-tensors"])
    for module in MODULES:
        assert ours[f"{module}.weight"].data == theirs[f"{module}.weight_packed"].data
        assert ours[f"{module}.weight_scale"].data == theirs[f"{module}.weight_scale"].data
        product = (
            ours[f"{module}.weight_scale_2"].array().astype(np.float64)
            * theirs[f"{module}.weight_global_scale"].array()
        )
        assert product == pytest.approx(1, rel=2.0**-23)


def test_gate_and_up_share_their_global_scale(written: dict[str, Path]) -> None:
    for layout, suffix in (
        ("modelopt", "weight_scale_2"),
        ("compressed-tensors", "weight_global_scale"),
    ):
        tensors = reference.read_folder(written[layout])
        for expert in range(EXPERTS):
            gate, up, down = (
                tensors[f"{EXPERTS_AT}.{expert}.{kind}.{suffix}"].data for kind in SHAPES
            )
            assert gate == up
            assert down != up


@pytest.mark.parametrize("layout", LAYOUTS)
def test_store_and_restore_are_inverse(layout: str) -> None:
    generator = np.random.default_rng(0)
    codes = torch.from_numpy(generator.integers(0, 256, (4, 16), dtype=np.uint8))
    scales = torch.from_numpy(generator.integers(1, 127, (4, 2), dtype=np.uint8))
    weight = NvFp4(codes, scales.view(torch.float8_e4m3fn), torch.tensor(0.00371))
    stored = LAYOUTS[layout].store(weight) | LAYOUTS[layout].store_input_scale(0.25)
    assert tuple(stored) == LAYOUTS[layout].suffixes
    restored, input_scale = LAYOUTS[layout].restore(stored)
    assert input_scale is not None
    assert torch.equal(restored.codes, codes)
    assert torch.equal(restored.block_scale.view(torch.uint8), scales)
    assert restored.global_scale.item() == pytest.approx(0.00371, rel=2.0**-22)
    assert restored.global_scale.shape == ()
    assert input_scale.item() == 0.25


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_input_scales_all_else_is_the_same(
    written: dict[str, Path], weights_only: dict[str, Path], layout: str
) -> None:
    scaled, plain = (reference.read_folder(at[layout]) for at in (written, weights_only))
    inputs = {name for name in scaled if name.endswith(("input_scale", "input_global_scale"))}
    assert len(inputs) == len(MODULES)
    assert plain.keys() == scaled.keys() - inputs
    assert all(plain[name].data == scaled[name].data for name in plain)
    found = layouts.detect(config_of(weights_only[layout]))
    assert found is LAYOUTS[layout].weights_only
    assert layouts.detect(config_of(written[layout])) is LAYOUTS[layout]


def test_vllm_reads_the_modelopt_layout_as_weights_only(weights_only: dict[str, Path]) -> None:
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    folder = weights_only["modelopt"]
    for file in ("config.json", "hf_quant_config.json"):
        stored = json.loads((folder / file).read_text())
        if file == "config.json":
            stored = stored["quantization_config"]
            claimed = ModelOptNvFp4Config.override_quantization_method(stored, None)
            assert claimed == "modelopt_fp4"
        config = ModelOptNvFp4Config.from_config(stored)
        # By which vLLM's expert layers leave activations alone, and need no input scales.
        assert config.quant_method == "W4A16_NVFP4"


def test_vllm_reads_the_compressed_tensors_layout_as_weights_only(
    written: dict[str, Path], weights_only: dict[str, Path]
) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    for folder, activations in (
        (written["compressed-tensors"], True),
        (weights_only["compressed-tensors"], False),
    ):
        config = CompressedTensorsConfig.from_config(config_of(folder))
        scheme = config.get_scheme_dict(torch.nn.Linear(16, 16), MODULES[0])
        assert scheme is not None
        assert scheme["format"] == "nvfp4-pack-quantized"
        assert (scheme["input_activations"] is not None) is activations
        assert scheme["weights"].num_bits == 4
        assert scheme["weights"].group_size == 16


def test_ranges_matter_to_kernels_with_four_bit_activations() -> None:
    """What an input scale of 1.0 does to inputs that are small: see ``INPUT_SCALE``."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def lost(size: float, input_scale: float) -> float:
        """By exact arithmetic on the values that E4M3 and E2M1 have."""
        blocks = (x * size).unflatten(-1, (-1, 16))
        e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        wanted = blocks.abs().amax(-1, keepdim=True) / 6 / input_scale
        scale = e4m3[(wanted.unsqueeze(-1) - e4m3).abs().argmin(-1)] * input_scale
        ratio = torch.where(scale > 0, blocks.abs() / scale, 0)
        rounded = e2m1[(ratio.unsqueeze(-1) - e2m1).abs().argmin(-1)] * scale * blocks.sign()
        return float((rounded - blocks).norm() / blocks.norm())

    for size in (1e-3, 3e-3, 1e-2):
        assert lost(size, 2 * float(x.abs().max()) * size / (6 * 448)) < 0.11
    assert lost(1e-3, 1.0) > 0.99
    assert lost(3e-3, 1.0) > 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_recognise_their_own_config_only(layout: str, written: dict[str, Path]) -> None:
    found = layouts.detect(config_of(written[layout]))
    assert found is not None
    assert found.name == layout
    assert layouts.detect({"quant_method": "fp8"}) is None
    assert layouts.detect({"quant_method": "modelopt", "quant_algo": "FP8"}) is None
    assert (
        layouts.detect({"quant_method": "compressed-tensors", "format": "float-quantized"}) is None
    )


# -- compressed_tensors' own reading ---------------------------------------------------------------


def decompressed(folder: Path, module: str) -> torch.Tensor:
    """A weight by the compressor that the folder's own config names."""
    config = QuantizationConfig.model_validate(config_of(folder))
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    tensors = load_file(folder / "model.safetensors")
    prefix = f"{module}."
    state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    assert set(state) == set(compressor.compression_param_names(scheme))
    return compressor.decompress(state, scheme)["weight"]


@pytest.mark.parametrize("module", PROJECTIONS)
def test_the_library_decompresses_to_the_same_weights(
    written: dict[str, Path], module: str
) -> None:
    folder = written["compressed-tensors"]
    want = reference.weight(reference.read_folder(folder), module)
    got = decompressed(folder, module)
    assert got.shape == SHAPES[module.rpartition(".")[2]]
    # The library computes in bfloat16 (8 bits), in at most two roundings.
    np.testing.assert_allclose(got.double().numpy(), want, rtol=2 * 2.0**-9, atol=0)


def test_the_library_decompresses_exactly_where_bfloat16_can(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """With a global scale that is a power of two, products have 6 significant bits."""
    tensors = load_file(saved("minimax_m3") / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name and ".shared_experts." not in name:
            tensor.clamp_(-0.3, 0.3)
            tensor[:, 0, 0] = 6 * 448 * 2.0**-12
            tensor[:, -1, 0] = 6 * 448 * 2.0**-12
    config = json.loads((saved("minimax_m3") / "config.json").read_text())
    checkpoints.save(tmp_path / "source", tensors, config)
    with Checkpoint(tmp_path / "source") as source:
        steps = plan(source, Options(layout="compressed-tensors"))
        execute(source, steps, tmp_path / "out")
    written = reference.read_folder(tmp_path / "out")
    for module in MODULES:
        assert written[f"{module}.weight_global_scale"].array() == 2.0**12
        want = reference.weight(written, module)
        np.testing.assert_array_equal(decompressed(tmp_path / "out", module).double().numpy(), want)


def test_the_library_applies_our_config_to_the_experts_alone(written: dict[str, Path]) -> None:
    """Linear modules named as in the checkpoint: only the routed experts get a scheme."""
    folder = written["compressed-tensors"]
    config = QuantizationConfig.model_validate(config_of(folder))
    assert config.format == "nvfp4-pack-quantized"
    assert config.quantization_status == QuantizationStatus.COMPRESSED
    (scheme,) = config.config_groups.values()
    assert (scheme.weights.num_bits, scheme.weights.type) == (4, "float")
    assert (scheme.weights.group_size, scheme.weights.strategy) == (16, "tensor_group")
    assert scheme.weights.scale_dtype == torch.float8_e4m3fn

    model = torch.nn.Module()
    linear = {module: SHAPES[module.rpartition(".")[2]] for module in MODULES}
    for name, tensor in reference.read_folder(folder).items():
        if name.endswith(".weight") and len(tensor.shape) == 2:
            linear[name.removesuffix(".weight")] = tensor.shape
    for path, (rows, columns) in linear.items():
        parent = model
        *parents, last = path.split(".")
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, torch.nn.Linear(columns, rows, bias=False))
    apply_quantization_config(model, config)
    chosen = {n for n, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    assert chosen == set(MODULES)


# -- vLLM's reading of the ModelOpt layout ---------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_vllm_parses_the_modelopt_config(written: dict[str, Path], file: str) -> None:
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    folder = written["modelopt"]
    stored = json.loads((folder / file).read_text())
    if file == "config.json":
        stored = stored["quantization_config"]
        assert ModelOptNvFp4Config.override_quantization_method(stored, None) == "modelopt_fp4"
    config = ModelOptNvFp4Config.from_config(stored)
    assert config.is_checkpoint_nvfp4_serialized
    assert config.quant_method == "NVFP4"
    assert config.group_size == 16
    assert config.kv_cache_quant_algo is None
    assert config.moe_activation_override is None
    tensors = reference.read_folder(folder)
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if f"{EXPERTS_AT}." in name:
            assert not config.is_layer_excluded(EXPERTS_AT)
            assert not config.is_layer_excluded(module.rpartition(".")[0])
        elif name.endswith(".weight") and len(tensor.shape) == 2:
            assert config.is_layer_excluded(module), module


def test_both_modelopt_files_list_the_same_modules(written: dict[str, Path]) -> None:
    older = json.loads((written["modelopt"] / "hf_quant_config.json").read_text())["quantization"]
    newer = config_of(written["modelopt"])
    assert older["exclude_modules"] == newer["ignore"]
    assert "lm_head" in newer["ignore"]
    assert "model.layers.1.mlp.gate" in newer["ignore"]
    assert not any(f"{EXPERTS_AT}." in name for name in newer["ignore"])


def test_the_compressed_tensors_layout_has_no_modelopt_file(written: dict[str, Path]) -> None:
    assert not (written["compressed-tensors"] / "hf_quant_config.json").exists()
