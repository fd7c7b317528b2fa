"""A checkpoint that was converted from the other layout loads as the one that it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

from tests.quantize.checkpoints import convert

LAYER = "model.layers.1.mlp.experts"
OTHER = {"modelopt": "compressed-tensors", "compressed-tensors": "modelopt"}


@pytest.mark.parametrize("layout", OTHER)
def test_a_converted_checkpoint(
    load, shallow: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    convert(shallow[OTHER[layout]], tmp_path / "converted", layout=layout)
    layer = load(tmp_path / "converted")[LAYER].routed_experts
    assert layer.quant_method.layout.name == layout
    same = load(shallow[OTHER[layout]])[LAYER].routed_experts
    assert layer.quant_method.weight_only is same.quant_method.weight_only is False
    for name, wanted in same.named_parameters():
        found = layer.get_parameter(name)
        if name.endswith(("scale_2", "input_scale")):  # float32's reciprocal of a reciprocal
            assert torch.allclose(found, wanted, rtol=2**-22, atol=0)
        else:
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), name


def test_as_vllm_dequantizes_it(shallow: dict[str, Path], tmp_path: Path) -> None:
    """vLLM's own arithmetic, on both files. compressed-tensors' scale it takes as ``1.0 / scale``
    (``compressed_tensors_w4a4_nvfp4.py``), and so does this package: from there it is exact."""
    tensors = {}
    for layout in OTHER:
        convert(shallow[layout], tmp_path / layout, layout=OTHER[layout])
        tensors[layout] = load_file(shallow[layout] / "model.safetensors")
        tensors[f"from {layout}"] = load_file(tmp_path / layout / "model.safetensors")

    def read(which: str, module: str) -> torch.Tensor:
        found = tensors[which]
        if f"{module}.weight_packed" in found:
            codes, scale = found[f"{module}.weight_packed"], found[f"{module}.weight_global_scale"]
            scale = 1.0 / scale
        else:
            codes, scale = found[f"{module}.weight"], found[f"{module}.weight_scale_2"]
        blocks = found[f"{module}.weight_scale"]
        return dequantize_to_dtype(codes, blocks, scale, torch.float32, swizzle=False)

    for expert in range(32):
        for name in ("gate_proj", "up_proj", "down_proj"):
            module = f"{LAYER}.{expert}.{name}"
            whole = read("compressed-tensors", module)
            assert torch.equal(read("from compressed-tensors", module), whole)
            converted, whole = read("from modelopt", module), read("modelopt", module)
            assert torch.allclose(converted, whole, rtol=2**-22, atol=0)
            assert whole.abs().max() > 0
