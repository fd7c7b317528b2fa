"""Linears in 8 bits beside NVFP4 experts (``--base``), as vLLM's own layers read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.layouts import LAYOUTS
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.plugin.mixed import decode_mxfp8
from tests.plugin.reference import experts_of, routed
from tests.plugin.test_layer import relative, routing

Load = Callable[..., dict[str, Any]]
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture
def fp8_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.32's FP8 kernels for CPUs need AMX. A plain product takes their place: what is tested
    is what vLLM gives a kernel."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm import BlockScaledMMLinearKernel
    from vllm.platforms import PlatformEnum

    class Plain(BlockScaledMMLinearKernel.Fp8BlockScaledMMLinearKernel):
        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability: Any = None) -> tuple[bool, str | None]:
            return True, None

        def apply_block_scaled_mm(self, **given: torch.Tensor) -> torch.Tensor:
            return given["A"].float() @ in_blocks(given["B"], given["Bs"]).float().T

    cpu = PlatformEnum.CPU
    monkeypatch.setitem(linear._POSSIBLE_FP8_BLOCK_KERNELS, cpu, [Plain])


def in_blocks(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP8 with a scale for 128 x 128 weights, float64 ``[out, in]``."""
    grid = scale.double().reshape(codes.shape[0] // 128, codes.shape[1] // 128)
    return codes.double() * grid.repeat_interleave(128, 0).repeat_interleave(128, 1)


def decoded(folder: Path, module: str, base: str) -> torch.Tensor:
    """A weight of the checkpoint, float64 ``[out, in]``, by the formats' definitions."""
    stored = load_file(folder / "model.safetensors")
    codes, scale = stored[f"{module}.weight"], stored[f"{module}.weight_scale"]
    if base == "mxfp8":
        return decode_mxfp8(codes, scale)
    return in_blocks(codes, scale)


@pytest.mark.parametrize("base", ["fp8", "mxfp8"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("mxfp8_on_cpus", "fp8_on_cpus")
def test_each_as_it_is_stored(
    layout: str, base: str, load: Load, shallow_bf16: Path, tmp_path: Path
) -> None:
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    from vllm_nvfp4_moe.method import NvFp4MoEMethod

    folder = tmp_path / "out"
    with Checkpoint(shallow_bf16) as source:
        execute(source, plan(source, Options(layout=layout, base=base)), folder)
    runners = load(folder, quantization=None)
    layer = runners[EXPERTS].routed_experts
    assert isinstance(layer.quant_method, NvFp4MoEMethod)
    torch.manual_seed(0)
    x = torch.randn(9, 384).bfloat16()
    weights, ids = routing(9)
    out = layer.quant_method.apply(layer, x, weights, ids, None, None)
    truth = routed(x, experts_of(folder, EXPERTS, layout, 32), weights, ids)
    assert relative(out, truth) < 6e-3

    linear = {n: m for n, m in runners["model"].named_modules() if isinstance(m, LinearBase)}
    checked = 0
    for name, module in linear.items():
        plain = isinstance(module.quant_method, UnquantizedLinearMethod)
        assert plain != name.endswith("_proj"), name
        if plain:
            continue
        path, _, last = name.rpartition(".")
        path = path.split("layers.")[1].replace("experts._shared_experts._layer.", "")
        path = f"model.layers.{path}"
        parts = ["q_proj", "k_proj", "v_proj"] if last == "qkv_proj" else [last]
        weight = torch.cat([decoded(folder, f"{path}.{part}", base) for part in parts])
        y = torch.randn(5, weight.shape[1]).bfloat16()
        result = module(y)
        result = result[0] if isinstance(result, tuple) else result
        # Kernels round activations to E4M3 too: half a step of 2 ** -3, and less on average.
        assert relative(result, y.double() @ weight.T) < 0.04, name
        checked += 1
    assert checked == 8
