"""What vLLM's layer makes of a Hopper kernel.

The kernel is its CUDA source on a CPU (``test_hopper_emulated``), and gets the weights as the
method packed them.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from quantize.experts.gates import Gate
from quantize.native.jit import KernelError
from tests.plugin.blackwell import M3, SILU
from tests.plugin.emulation import Emulated, body, build
from tests.plugin.reference import experts_of, m3_gate, routed
from tests.plugin.test_layer import relative, routing
from vllm_nvfp4_moe.backends.hopper.method import HopperMethod
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS
from vllm_nvfp4_moe.kernels.hopper.source import Form

LAYER = "model.layers.1.mlp.experts"
ERROR = {"bf16": 6e-3, "fp8": 0.08}
"""How large a batch's relative error may be: of bf16's roundings, and of E4M3's of weights and
activations."""
CHECKED = {"bf16": 8e-3, "fp8": 0.1}
"""How large the error of the self-check's worst token may be."""
Load = Callable[..., dict[str, Any]]
MonkeyPatch = pytest.MonkeyPatch


@pytest.fixture(scope="module", params=KERNELS)
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ctypes.CDLL]:
    kernel = KERNELS[request.param]
    return request.param, build(tmp_path_factory.mktemp("emulated"), body(kernel), kernel)


@pytest.fixture
def kernel(library: tuple[str, ctypes.CDLL], monkeypatch: MonkeyPatch) -> Any:
    """Layers take our method here, and one kernel after the other runs on the CPU. It is a copy of
    the kernel's object, with the errors that it may have, and ``calls``, the options it was called
    with."""
    name, loaded = library
    emulated = Emulated(loaded, KERNELS[name], monkeypatch)
    calls: list[dict[str, Any]] = []

    def run(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(options)
        return emulated.run(*args, **options)

    found: Any = copy.copy(KERNELS[name])
    found.run, found.calls = run, calls
    found.error, found.checked = ERROR[name], CHECKED[name]
    monkeypatch.setitem(KERNELS, name, found)
    monkeypatch.setenv("NVFP4_MOE_ACTIVATIONS", name)
    monkeypatch.setattr(HopperMethod, "unsupported", classmethod(lambda cls, layer: None))
    return found


def batch(tokens: int, hidden: int = 384) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights and ids."""
    torch.manual_seed(tokens)
    return torch.randn(tokens, hidden).bfloat16() * 2, *routing(tokens)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_experts_match_the_reference(
    load: Load, shallow: dict[str, Path], kernel: Any, layout: str
) -> None:
    layer = load(shallow[layout])[LAYER].routed_experts
    method = layer.quant_method
    assert type(method) is HopperMethod
    check = method.context.self_check
    assert check.skipped is None
    assert 0 < check.worst < kernel.checked
    truth = experts_of(shallow[layout], LAYER, layout, 32)
    for tokens in (1, 7, 40):
        x, weights, ids = batch(tokens)
        out = method.apply(layer, x, weights, ids, None, None)
        assert out.dtype == torch.bfloat16
        assert relative(out, routed(x, truth, weights, ids)) < kernel.error, tokens
        # vLLM's own output, without a copy.
        assert kernel.calls[-1]["out"].data_ptr() == out.data_ptr()
        again = method.apply(layer, x, weights.double(), ids.long(), None, None)
        assert torch.equal(again, out)
        apart = torch.zeros(tokens, 400).bfloat16()[:, 3:387]
        apart.copy_(x)
        assert torch.equal(method.apply(layer, apart, weights, ids, None, None), out)


def test_a_norm_on_each_experts_output_is_refused(
    load: Load, shallow: dict[str, Path], kernel: Any
) -> None:
    """vLLM 0.33's Muse Spark sets one so, and a class that does not look loses it."""
    experts = load(shallow["modelopt"])[LAYER].routed_experts.quant_method.moe_kernel.fused_experts
    assert experts.post_gemm2_hook is None
    experts.post_gemm2_hook = None
    with pytest.raises(ValueError, match=rf"{LAYER}: the model changes each expert's output"):
        experts.post_gemm2_hook = lambda rows, output: None


def test_each_tile_shape_is_checked(
    load: Load, shallow: dict[str, Path], kernel: Any, monkeypatch: MonkeyPatch
) -> None:
    """What is compiled wrong may be one of them, which the first request does not take."""
    run = kernel.run
    for wrong in kernel.tile_shapes:

        def broken(*args: Any, wrong: Any = wrong, **options: Any) -> torch.Tensor:
            out = run(*args, **options)
            return out.mul_(1.3) if options["tile_shape"] == wrong else out

        monkeypatch.setattr(kernel, "run", broken)
        with pytest.raises(ValueError, match=rf"means \(tile shape {wrong}\), of 1 token"):
            load(shallow["modelopt"])
    monkeypatch.setattr(kernel, "run", run)
    kernel.calls.clear()
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    assert {options["tile_shape"] for options in kernel.calls} == set(kernel.tile_shapes)
    assert layer.quant_method.moe_kernel.fused_experts.tile_shape is None


def test_the_line_at_load(
    load: Load, shallow: dict[str, Path], kernel: Any, monkeypatch: MonkeyPatch
) -> None:
    from vllm_nvfp4_moe import summary

    lines: list[str] = []
    monkeypatch.setattr(
        summary.logger, "info_once", lambda text, *args, scope: lines.append(text % args)
    )
    load(shallow["modelopt"])
    (line,) = lines
    assert f"; kernel {kernel.name}; 0.00 GiB on this rank; " in line
    assert "self-check passed" in line


def test_weights_stay_four_bit_and_have_an_expert_a_row(
    load: Load, shallow: dict[str, Path], kernel: Any
) -> None:
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    held = {name: tensor.nbytes for name, tensor in layer.named_parameters()}
    held.pop("e_score_correction_bias", None)
    assert held == {
        "w13_weight": 32 * 256 * 384 * 9 // 16,
        "w2_weight": 32 * 384 * 128 * 9 // 16,
        "w13_weight_scale_2": 32 * 4,
        "w2_weight_scale_2": 32 * 4,
    }
    assert [len(tensor) for tensor in layer.get_expert_weights()] == [32] * 4


def test_load_balancing_moves_experts(load: Load, shallow: dict[str, Path], kernel: Any) -> None:
    """As vLLM does it: rows of what ``get_expert_weights`` gives, in place."""
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    x, weights, ids = batch(9)

    def out(ids: torch.Tensor) -> torch.Tensor:
        return layer.quant_method.apply(layer, x, weights, ids, None, None)

    before = out(ids)
    order = torch.randperm(32)
    for tensor in layer.get_expert_weights():
        tensor.data.copy_(tensor.data[order])
    assert not torch.equal(out(ids), before)
    assert torch.equal(out(order.argsort().int()[ids]), before)


@pytest.mark.parametrize("gated", [True, False])
def test_biases_with_and_without_a_gate(
    load: Load,
    shallow: dict[str, Path],
    gated: bool,
    tmp_path: Path,
    monkeypatch: MonkeyPatch,
) -> None:
    """As loading leaves them to the method: in the model's dtype, in the rows' order. Without a
    gate w13 is up alone, here the checkpoint's gate. Load balancing moves biases too."""
    form = Form(gated, biased=True)
    kernel: Any = copy.copy(KERNELS["bf16"])
    library = build(tmp_path, body(kernel, form), kernel)
    kernel.run = Emulated(library, KERNELS["bf16"], monkeypatch, form).run
    monkeypatch.setitem(KERNELS, "bf16", kernel)
    monkeypatch.setattr(HopperMethod, "unsupported", classmethod(lambda cls, layer: None))
    monkeypatch.setenv("NVFP4_MOE_SELF_CHECK", "0")  # its reference is of the checkpoint
    prepare, given = HopperMethod.prepare, {}

    def prepare_others(self: HopperMethod, layer: Any) -> None:
        self.moe.has_bias = True
        if not gated:
            self.gate = Gate("relu2")
            for name, rows in (("weight", 128), ("weight_scale", 128), ("weight_scale_2", 1)):
                parameter = getattr(layer, f"w13_{name}")
                parameter.data = parameter.data[:, :rows].contiguous()
        for name, of in (("w13_bias", layer.w13_weight), ("w2_bias", layer.w2_weight)):
            biases = torch.randn(of.shape[:2]).bfloat16()
            given[layer.layer_name, name] = biases.double()
            layer.register_parameter(name, torch.nn.Parameter(biases, requires_grad=False))
        prepare(self, layer)

    monkeypatch.setattr(HopperMethod, "prepare", prepare_others)
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    bias13, bias2 = given[layer.layer_name, "w13_bias"], given[layer.layer_name, "w2_bias"]
    experts = experts_of(shallow["modelopt"], LAYER, "modelopt", 32)
    x, weights, ids = batch(5)
    truth = torch.zeros(x.shape, dtype=torch.float64)
    for token, chosen in enumerate(ids.tolist()):
        for place, expert in enumerate(chosen):
            gate, up, down = experts[expert]
            first = gate @ x[token].double() + bias13[expert, :128]
            if gated:
                middle = m3_gate(first, up @ x[token].double() + bias13[expert, 128:])
            else:
                middle = first.clamp(min=0) ** 2
            truth[token] += weights[token, place].double() * (down @ middle + bias2[expert])
    out = layer.quant_method.apply(layer, x, weights, ids, None, None)
    assert relative(out, truth) < ERROR["bf16"]
    order = torch.randperm(32)
    moved = list(layer.get_expert_weights())
    assert len(moved) == 6
    for tensor in moved:
        tensor.data.copy_(tensor.data[order])
    ids = order.argsort().int()[ids]
    assert torch.equal(layer.quant_method.apply(layer, x, weights, ids, None, None), out)


def test_experts_of_other_ranks(load: Load, shallow: dict[str, Path], kernel: Any) -> None:
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    x, weights, ids = batch(12)
    layer._expert_map = torch.arange(32, dtype=torch.int32).where(torch.arange(32) % 3 > 0, -1)
    out = layer.quant_method.apply(layer, x, weights, ids, None, None)
    truth = experts_of(shallow["modelopt"], LAYER, "modelopt", 32)
    assert relative(out, routed(x, truth, weights.where(ids % 3 > 0, 0), ids)) < kernel.error


def test_a_hidden_size_that_is_padded(
    load: Load, shallow: dict[str, Path], kernel: Any, monkeypatch: MonkeyPatch
) -> None:
    """As DeepEP asks for."""
    monkeypatch.setattr(
        HopperMethod, "maybe_roundup_sizes", lambda self, hidden, inner, *_: (512, inner)
    )
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    assert layer.quant_method.context.self_check.worst < kernel.checked
    x, weights, ids = batch(5)
    padded = torch.nn.functional.pad(x, (0, 128))
    out = layer.quant_method.apply(layer, padded, weights, ids, None, None)
    truth = routed(x, experts_of(shallow["modelopt"], LAYER, "modelopt", 32), weights, ids)
    assert relative(out[:, :384], truth) < kernel.error
    assert not out[:, 384:].count_nonzero()


@pytest.mark.parametrize("wrong", [SILU, replace(M3, limit=None), replace(M3, beta=0.0)], ids=str)
def test_another_gate_is_noticed(
    load: Load, shallow: dict[str, Path], kernel: Any, wrong: Gate
) -> None:
    right = kernel.run
    kernel.run = lambda x, experts, ids, weights, gate, **more: right(
        x, experts, ids, weights, wrong, **more
    )
    with pytest.raises(ValueError, match=r"self-check: HOPPER.* does not compute"):
        load(shallow["modelopt"])


def test_one_matrix_is_twice_in_memory(
    load: Load, shallow: dict[str, Path], kernel: Any, monkeypatch: MonkeyPatch
) -> None:
    """Codes and scales of gate and up are gone before down's are packed, and those after it. Nor
    does PyTorch keep what was freed."""
    given_back: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(None))
    pack = kernel.pack_matrix
    before: list[StorageWeakRef] = []
    left = []

    def packing(codes: torch.Tensor, scales: torch.Tensor, *rest: Any, **more: Any) -> Any:
        left.append([storage.expired() for storage in before])
        before.extend(StorageWeakRef(t.untyped_storage()) for t in (codes, scales))
        return pack(codes, scales, *rest, **more)

    kernel.pack_matrix = packing
    load(shallow["modelopt"])
    assert left == [[], [True, True]]
    assert len(given_back) == 2
    assert all(storage.expired() for storage in before)


def test_vllm_can_let_go_of_a_model(load: Load, shallow: dict[str, Path], kernel: Any) -> None:
    runners = load(shallow["modelopt"])
    layer = weakref.ref(runners[LAYER].routed_experts)
    runners.clear()
    gc.collect()
    assert layer() is None


def test_arguments_that_the_kernel_refuses(
    load: Load, shallow: dict[str, Path], kernel: Any
) -> None:
    """Never garbage: float32 where bf16 was promised is an error."""
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    x, weights, ids = batch(2)
    with pytest.raises(KernelError, match="bfloat16"):
        layer.quant_method.apply(layer, x.float(), weights, ids, None, None)
