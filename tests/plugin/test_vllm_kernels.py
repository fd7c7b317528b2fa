"""What the GPU backend hands to vLLM's oracle, with its conversion and kernel taken out.

The conversions and kernels themselves need a GPU; docs/evidence/ has what ran on one.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantize.experts.gates import Gate

LAYER = "model.layers.1.mlp.experts"
Calls = dict[str, dict[str, Any]]
Load = Callable[..., dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The oracle's functions record their arguments; weights pass through unconverted."""
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
    from vllm.model_executor.layers.quantization import modelopt

    from vllm_nvfp4_moe.backends import vllm_kernels
    from vllm_nvfp4_moe.backends.selection import Selection

    seen: Calls = {}

    def select(
        moe_config: Any, weight_key: Any, activation_key: Any, gate: Gate, weighs_input: bool
    ) -> Selection:
        activation = moe_config.activation.value
        seen["select"] = {"activation_key": activation_key, "activation": activation, "gate": gate}
        experts: Any = SimpleNamespace(is_monolithic=lambda: False, __name__="Stub")
        return Selection(NvFp4MoeBackend.MARLIN, experts, [])

    def convert(**kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        seen["convert"] = kwargs
        names = ("", "_scale", "_scale_2")
        first, second = ([kwargs[f"{w}{n}"] for n in names] for w in ("w13", "w2"))
        return (*first, kwargs["a13_scale"], *second, kwargs["a2_scale"])

    def kernel(**kwargs: Any) -> SimpleNamespace:
        seen["kernel"] = kwargs
        experts = SimpleNamespace(process_weights_after_loading=lambda layer: None)
        return SimpleNamespace(fused_experts=experts, is_monolithic=False)

    monkeypatch.setattr(vllm_kernels, "select", select)
    monkeypatch.setattr(vllm_kernels, "convert_to_nvfp4_moe_kernel_format", convert)
    monkeypatch.setattr(modelopt, "make_nvfp4_moe_kernel", kernel)
    monkeypatch.setenv("NVFP4_MOE_SELF_CHECK", "0")  # nothing computes here
    monkeypatch.setattr(
        vllm_kernels.VllmKernelsMethod, "unsupported", classmethod(lambda cls, layer: None)
    )
    return seen


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_gate_and_weights_reach_the_oracle(
    load: Callable, shallow: dict[str, Path], calls: Calls, layout: str
) -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic

    layer = load(shallow[layout])[LAYER].routed_experts
    # The gate is set before kernels are chosen by it, and its numbers reach the kernels' config.
    assert calls["select"]["activation"] == "swigluoai_uninterleave"
    assert calls["select"]["gate"] == Gate("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0)
    assert calls["select"]["activation_key"] == kNvfp4Dynamic
    config = calls["kernel"]["moe_quant_config"]
    assert (config.gemm1_alpha, config.gemm1_beta, config.gemm1_clamp_limit) == (1.702, 1.0, 7.0)
    assert calls["kernel"]["moe_config"].swiglu_limit == 7.0

    # Gate above up, in the checkpoint's own numbers, whatever it calls them.
    tensors = load_file(shallow[layout] / "model.safetensors")
    codes = "weight" if layout == "modelopt" else "weight_packed"
    given = calls["convert"]
    for expert in (0, 31):
        base = f"{LAYER}.{expert}."
        for name, rows in (("gate_proj", slice(0, 128)), ("up_proj", slice(128, 256))):
            assert torch.equal(given["w13"][expert, rows], tensors[f"{base}{name}.{codes}"])
            scale = tensors[f"{base}{name}.weight_scale"]
            assert torch.equal(given["w13_scale"][expert, rows].float(), scale.float())
        assert torch.equal(given["w2"][expert], tensors[f"{base}down_proj.{codes}"])
        for mine, name in (("w13_scale_2", "up_proj"), ("w2_scale_2", "down_proj")):
            if layout == "modelopt":
                truth = tensors[f"{base}{name}.weight_scale_2"]
            else:
                truth = 1 / tensors[f"{base}{name}.weight_global_scale"][0]
            torch.testing.assert_close(given[mine][expert], truth, rtol=1e-6, atol=0)
    assert given["w13_scale_2"].shape == given["w2_scale_2"].shape == (32,)
    assert torch.all(given["a13_scale"] == 1) and given["a13_scale"].shape == (32, 2)
    assert torch.all(given["a2_scale"] == 1) and given["a2_scale"].shape == (32,)
    assert layer.e_score_correction_bias.dtype == torch.float32  # which vLLM's CUDA router demands


def test_what_a_kernel_that_routes_is_given(
    load: Load, shallow: dict[str, Path], calls: Calls
) -> None:
    """All that vLLM's method gives it, and what chooses experts by tokens' numbers if there is
    such a table."""
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    method = layer.quant_method
    given: list[dict[str, Any]] = []

    def apply(*tensors: torch.Tensor, **named: Any) -> str:
        given.append({str(number): tensor for number, tensor in enumerate(tensors)} | named)
        return "output"

    experts = SimpleNamespace(consumes_expert_mask=False)
    method.moe_kernel = SimpleNamespace(
        apply_monolithic=apply, is_monolithic=True, fused_experts=experts
    )
    x, logits, ids, table = (torch.zeros(size) for size in (1, 2, 3, 4))
    assert method.apply_monolithic(layer, x, logits, input_ids=ids) == "output"
    object.__setattr__(layer, "hash_indices_table", table)  # as vLLM sets it
    assert method.apply_monolithic(layer, x, logits, input_ids=ids) == "output"
    stock, ours = given
    assert ours.pop("input_ids") is ids
    assert ours.pop("hash_indices_table") is table
    assert ours.keys() == stock.keys() > {"0", "3", "activation", "e_score_correction_bias"}
    assert all(ours[name] is stock[name] for name in stock)


def test_weight_only_checkpoints_have_no_input_scales(
    load: Callable, damage: Callable, calls: Calls
) -> None:
    """As llm-compressor's NVFP4A16 and ModelOpt's W4A16_NVFP4 write them."""

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "input_scale" in n or "input_global_scale" in n]:
            del tensors[name]

    def w4a16(config: dict[str, Any]) -> None:
        config["quantization_config"]["quant_algo"] = "W4A16_NVFP4"

    def no_activations(config: dict[str, Any]) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            group["input_activations"] = None

    for layout, change in (("modelopt", w4a16), ("compressed-tensors", no_activations)):
        copy = damage(layout)
        copy.tensors(drop)
        load(copy.config(change))
        assert calls["select"]["activation_key"] is None
        assert calls["convert"]["a13_scale"] is None
        assert calls["convert"]["use_a16"] is True


def test_vllm_can_let_go_of_a_model(load: Callable, shallow: dict[str, Path]) -> None:
    """vLLM keeps weight loaders of every model for reloading; ours must not keep the weights."""
    runners = load(shallow["modelopt"])
    layer = weakref.ref(runners[LAYER].routed_experts)
    runners.clear()
    gc.collect()
    assert layer() is None


def test_nothing_is_copied_for_no_padding() -> None:
    """Humming pads whole layers, most of them by nothing; elsewhere PyTorch is as it was."""
    from vllm_nvfp4_moe.backends.padding import pad_only_what_needs_it

    x = torch.arange(6.0).view(2, 3)
    before = torch.nn.functional.pad
    with pad_only_what_needs_it():
        assert torch.nn.functional.pad(x, pad=[0, 0, 0, 0], value=0).data_ptr() == x.data_ptr()
        padded = torch.nn.functional.pad(x, (0, 1, 2, 0), value=7)
        reflected = torch.nn.functional.pad(x, (1, 0), mode="reflect")
        expanded = torch.nn.functional.pad(x[:, :1].expand(-1, 3), [0, 0])
    # As a copy is: Humming's kernels refuse an expanded global scale.
    assert expanded.is_contiguous()
    assert torch.equal(expanded, x[:, :1].repeat(1, 3))
    assert torch.nn.functional.pad is before
    assert torch.equal(padded, before(x, (0, 1, 2, 0), value=7))
    assert torch.equal(reflected, before(x, (1, 0), mode="reflect"))
    with pytest.raises(ZeroDivisionError), pad_only_what_needs_it():
        raise ZeroDivisionError
    assert torch.nn.functional.pad is before


def test_other_threads_pad_as_ever() -> None:
    """Two engines convert layers at the same time, one ends first, and a third thread pads."""
    from vllm_nvfp4_moe.backends.padding import pad_only_what_needs_it

    before = torch.nn.functional.pad
    x = torch.arange(6.0)
    first, second = threading.Event(), threading.Event()

    def load(begins: threading.Event, goes_on: threading.Event) -> bool:
        with pad_only_what_needs_it():
            begins.set()
            assert goes_on.wait(10)
            return torch.nn.functional.pad(x, (0, 0)).data_ptr() == x.data_ptr()

    last = threading.Event()
    with ThreadPoolExecutor() as pool:
        one = pool.submit(load, first, second)
        assert first.wait(10)
        two = pool.submit(load, second, last)
        assert one.result(10)  # it has left, and the other has not
        assert torch.nn.functional.pad(x, (0, 0)).data_ptr() != x.data_ptr()
        last.set()
        assert two.result(10)
    assert torch.nn.functional.pad is before
