"""When a Hopper kernel is chosen, and what vLLM's layer makes of it.

The device is pretended where the choice is at issue; where results are, the kernel is its CUDA
source on a CPU (``test_hopper_emulated``), from the weights as they were packed.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from vllm.config import VllmConfig, set_current_vllm_config

from quantize.gates import Gate, Gates
from quantize.layouts import LAYOUTS
from tests.plugin.blackwell import ACTIVATION, GELU, GELU_TANH, M3, SILU, STEP, moe_config, pretend
from tests.plugin.emulation import Emulated, body, build
from tests.plugin.reference import experts_of, routed
from tests.plugin.test_layer import relative, routing
from vllm_nvfp4_moe import backends, settings
from vllm_nvfp4_moe.backends.hopper import support
from vllm_nvfp4_moe.backends.hopper.method import HopperMethod
from vllm_nvfp4_moe.config import NvFp4MoEConfig
from vllm_nvfp4_moe.kernels import jit
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS
from vllm_nvfp4_moe.kernels.jit import KernelError

LAYER = "model.layers.1.mlp.experts"
NAME = KERNELS["bf16"].name
ERROR = {"bf16": 6e-3, "fp8": 0.08}
"""Of a batch, relative: bf16 roundings; E4M3's, of weights and activations."""
CHECKED = {"bf16": 8e-3, "fp8": 0.1}
"""Of the self-check's worst token."""
Load = Callable[..., dict[str, Any]]
MonkeyPatch = pytest.MonkeyPatch


def layer_of(gate: Gate = M3, **config: Any) -> Any:
    """As much of a vLLM layer as the choice looks at."""
    told = moe_config(gate, **config)
    quantization = NvFp4MoEConfig.from_config(LAYOUTS["modelopt"].quantization_config([]))
    quantization.gates = Gates.uniform(gate)
    return SimpleNamespace(
        layer_name=LAYER,
        params_dtype=torch.bfloat16,
        activation=ACTIVATION[gate.form],
        swiglu_alpha=told.swiglu_alpha,
        swiglu_beta=told.swiglu_beta,
        swiglu_limit=told.swiglu_limit,
        apply_router_weight_on_input=False,
        local_num_experts=told.num_local_experts,
        moe_config=told,
        quant_config=quantization,
    )


def choose(layer: Any) -> Any:
    return backends.choose(layer.quant_config.context, layer, weight_only=False)


@pytest.fixture
def config() -> Iterator[VllmConfig]:
    found = VllmConfig()
    with set_current_vllm_config(found):
        yield found


@pytest.fixture
def warnings(monkeypatch: MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(
        support.logger, "warning_once", lambda text, *args: found.append(text % args)
    )
    return found


@pytest.fixture
def hopper(
    config: VllmConfig, warnings: list[str], monkeypatch: MonkeyPatch
) -> Iterator[VllmConfig]:
    """A machine with a Hopper GPU, on which the kernel can be built."""
    layer_of()  # imports of vLLM what would keep the pretended platform
    pretend(monkeypatch, (9, 0))
    wishes = (settings.HOPPER, settings.ACTIVATIONS, settings.HUMMING_INPUT)
    for name in wishes:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "library", lambda device: None)
    support.missing.cache_clear()
    yield config
    support.missing.cache_clear()


@pytest.mark.parametrize("gate", [SILU, M3, GELU_TANH], ids=str)
def test_hopper_takes_our_kernel(hopper: VllmConfig, gate: Gate) -> None:
    method = choose(layer_of(gate))
    assert type(method) is HopperMethod
    assert method.kernel == NAME
    assert method.passed_over == []
    assert (method.quantizes_activations, method.activation_bits) == (False, 16)
    assert method.supports_eplb


def test_fp8_activations_are_for_who_asks(
    hopper: VllmConfig, warnings: list[str], monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setenv("NVFP4_MOE_ACTIVATIONS", "fp8")
    method = choose(layer_of())
    assert type(method) is HopperMethod
    assert method.kernel.startswith("HOPPER FP8")
    assert (method.quantizes_activations, method.activation_bits) == (False, 8)
    assert warnings == []
    monkeypatch.setenv("NVFP4_MOE_ACTIVATIONS", "bf16")
    assert choose(layer_of()).kernel == NAME
    monkeypatch.setenv("NVFP4_MOE_ACTIVATIONS", "int8")
    with pytest.raises(ValueError, match="NVFP4_MOE_ACTIVATIONS=int8: must be one of bf16, fp8"):
        choose(layer_of())


def test_who_asks_for_fp8_in_vain_is_told(
    hopper: VllmConfig, warnings: list[str], monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setenv("NVFP4_MOE_ACTIVATIONS", "fp8")
    pretend(monkeypatch, (8, 9))
    assert not choose(layer_of()).kernel.startswith("HOPPER")
    (line,) = warnings
    assert line.startswith("NVFP4_MOE_ACTIVATIONS=fp8 is for this package's Hopper kernel")
    assert "compute capability 8.9" in line
    pretend(monkeypatch, (9, 0))
    monkeypatch.setenv("NVFP4_MOE_HOPPER", "0")
    assert not choose(layer_of()).kernel.startswith("HOPPER")
    assert "which does not run: NVFP4_MOE_HOPPER=0. Another kernel" in warnings[-1]


def test_the_kernel_that_was_asked_for_is_built(
    hopper: VllmConfig, warnings: list[str], monkeypatch: MonkeyPatch
) -> None:
    """Where it cannot be, the other does not step in: it runs, or vLLM's kernels do."""
    monkeypatch.setattr(KERNELS["fp8"], "library", lambda device: no_nvcc(Path()))
    assert warnings == []
    assert choose(layer_of()).kernel == NAME
    monkeypatch.setenv("NVFP4_MOE_ACTIVATIONS", "fp8")
    method = choose(layer_of())
    assert method.kernel.startswith("HUMMING")
    assert "no nvcc" in dict(method.passed_over)[KERNELS["fp8"].name]
    (line,) = warnings
    assert line.startswith("NVFP4_MOE_ACTIVATIONS=fp8 is for") and "no nvcc" in line


PARALLEL = {
    "EP": {"ep_size": 2, "use_ep": True},
    "DP": {"dp_size": 2},
    "EPLB": {"ep_size": 1, "use_ep": True, "enable_eplb": True},
}


def parallel(layer: Any, **modes: Any) -> None:
    layer.moe_config.moe_parallel_config = replace(layer.moe_config.moe_parallel_config, **modes)


@pytest.mark.parametrize("modes", PARALLEL.values(), ids=PARALLEL)
def test_parallel_modes(hopper: VllmConfig, modes: dict[str, Any]) -> None:
    layer = layer_of()
    parallel(layer, **modes)
    assert support.unsupported(layer) is None


ALL_TO_ALL = {
    "allgather_reducescatter": True,
    "deepep_high_throughput": True,
    "deepep_v2": True,
    "flashinfer_nvlink_one_sided": True,
    "flashinfer_nvlink_two_sided": False,  # its numbers of absent experts are beyond the map
    "flashinfer_all2allv": False,
    "deepep_low_latency": False,  # batches
    "nixl_ep": False,
    "moonep": False,
    "mori_high_throughput": False,
    "passthrough": False,
    "of another vLLM": False,
}


@pytest.mark.parametrize("name", ALL_TO_ALL)
def test_ways_to_other_ranks(hopper: VllmConfig, name: str) -> None:
    layer = layer_of()
    parallel(layer, dp_size=2, ep_size=2, use_ep=True, all2all_backend=name)
    expected = None if ALL_TO_ALL[name] else f"tokens come by {name}"
    assert support.unsupported(layer) == expected
    # Without data parallelism nothing travels, but experts may still dispatch for themselves.
    parallel(layer, dp_size=1)
    assert (support.unsupported(layer) is None) == (name != "passthrough")


def attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda layer: setattr(layer, name, value)


def setting(name: str, value: Any) -> Callable[[Any], None]:
    return lambda layer: setattr(layer.moe_config, name, value)


REASONS: dict[str, tuple[Callable[[Any], None], Gate]] = {
    "float16, and the kernel is for bfloat16": (attribute("params_dtype", torch.float16), M3),
    "float32, and the kernel is for bfloat16": (setting("in_dtype", torch.float32), M3),
    "the experts have biases": (setting("has_bias", True), M3),
    "does not apply swiglustep": (lambda layer: None, STEP),
    "does not apply gelu": (lambda layer: None, GELU),
    "for the experts' input": (attribute("apply_router_weight_on_input", True), M3),
    "1025 experts, and the kernel is for": (attribute("local_num_experts", 1025), M3),
    "LoRA": (setting("is_lora_enabled", True), M3),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_the_kernel_does_not_do(hopper: VllmConfig, reason: str) -> None:
    change, gate = REASONS[reason]
    layer = layer_of(gate)
    change(layer)
    assert reason in str(support.unsupported(layer))
    assert HopperMethod.missed(layer) == NAME


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
def test_another_device(
    hopper: VllmConfig, monkeypatch: MonkeyPatch, capability: tuple[int, int]
) -> None:
    pretend(monkeypatch, capability)
    layer = layer_of()
    said = "compute capability {}.{}, and the kernel is for 9.0 alone".format(*capability)
    assert support.unsupported(layer) == said
    assert HopperMethod.missed(layer) is None


def test_no_gpu(config: VllmConfig) -> None:
    layer = layer_of()
    assert support.unsupported(layer) == "the device is not an NVIDIA GPU"
    assert HopperMethod.missed(layer) is None


WISHES = {
    "NVFP4_MOE_HOPPER=0": ("NVFP4_MOE_HOPPER", "0"),
    "VLLM_HUMMING_INPUT_QUANT_CONFIG is set": ("VLLM_HUMMING_INPUT_QUANT_CONFIG", "{}"),
    "--moe-backend marlin": None,
}


@pytest.mark.parametrize("reason", WISHES)
def test_who_asks_for_another_gets_it(
    hopper: VllmConfig, monkeypatch: MonkeyPatch, reason: str
) -> None:
    wish = WISHES[reason]
    layer = layer_of(moe_backend="auto" if wish else "marlin")
    if wish:
        monkeypatch.setenv(*wish)
    assert reason in str(support.unsupported(layer))
    method = choose(layer)
    assert method.kernel.split()[0] == ("HUMMING" if wish else "MARLIN")
    assert NAME not in dict(method.passed_over)


def test_settings_of_vllm(hopper: VllmConfig, monkeypatch: MonkeyPatch) -> None:
    layer = layer_of()
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_BATCH_INVARIANT", "1")
        assert support.unsupported(layer) == "VLLM_BATCH_INVARIANT"
    monkeypatch.setattr(hopper.parallel_config, "enable_elastic_ep", True)
    assert "--enable-elastic-ep" in str(support.unsupported(layer))


def test_load_balancing_wants_one_layout_in_all_layers(hopper: VllmConfig) -> None:
    """Its buffers have the first layer's shapes; Step-3.7's last layers have another gate."""
    layer = layer_of(SILU)
    parallel(layer, use_ep=True, enable_eplb=True)
    layer.quant_config.gates = Gates(SILU, {3: M3})
    assert support.unsupported(layer) is None
    layer.quant_config.gates = Gates(SILU, {3: STEP})
    assert "other layers apply swiglu_step" in str(support.unsupported(layer))
    parallel(layer, enable_eplb=False)
    assert support.unsupported(layer) is None


def no_nvcc(path: Path) -> Path:
    raise KernelError("no nvcc: not in $CUDA_HOME, on the path or in /usr/local/cuda")


def nvcc_that_fails(path: Path) -> Path:
    file = path / "nvcc"
    file.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 11.8 && exit\necho 'no\n wgmma' >&2\nexit 1\n"
    )
    file.chmod(0o755)
    return file


def nvcc_that_is_broken(path: Path) -> Path:
    file = path / "nvcc"
    file.write_text("#!/bin/sh\nexit 3\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        (no_nvcc, "no nvcc: not in"),
        (nvcc_that_fails, "nvcc failed: no wgmma"),
        (nvcc_that_is_broken, "Command "),
    ],
)
def test_without_a_compiler(
    hopper: VllmConfig,
    warnings: list[str],
    monkeypatch: MonkeyPatch,
    tmp_path: Path,
    compiler: Callable[[Path], Path],
    said: str,
) -> None:
    """vLLM's kernels run, and one line says why."""
    monkeypatch.setenv(settings.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "nvcc", lambda: compiler(tmp_path))
    source = "int nothing;"
    monkeypatch.setattr(KERNELS["bf16"], "library", lambda device: jit.load(source, "90a"))
    for _ in range(2):
        method = choose(layer_of())
        assert method.kernel.startswith("HUMMING")
        assert said in dict(method.passed_over)[NAME]
    (line,) = warnings
    assert said in line
    assert "vLLM's own kernels are used; NVFP4_MOE_HOPPER=0" in line


def test_ranks_on_other_devices_do_not_keep_others_waiting(
    hopper: VllmConfig, monkeypatch: MonkeyPatch
) -> None:
    met: list[list[int]] = []
    monkeypatch.setattr(support, "get_ep_group", lambda: SimpleNamespace(cpu_group="ours"))
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda span, *_, **__: met.append(span.tolist())
    )
    pretend(monkeypatch, (10, 0))
    layer = layer_of()
    parallel(layer, ep_size=2, use_ep=True, enable_eplb=True)
    assert "compute capability 10.0" in str(support.unsupported(layer))
    assert met == [[0, 0]]


@pytest.mark.parametrize("mine", ["bf16", "fp8", None])
@pytest.mark.parametrize("others", ["bf16", "fp8", None])
def test_ranks_that_exchange_weights_agree(
    hopper: VllmConfig, monkeypatch: MonkeyPatch, mine: str | None, others: str | None
) -> None:
    asked = []

    def reduce(span: torch.Tensor, operation: Any, group: str) -> None:
        asked.append(group)
        assert operation == torch.distributed.ReduceOp.MIN
        code = [None, "bf16", "fp8"].index(others)
        span.copy_(torch.minimum(span, torch.tensor([code, -code])))

    monkeypatch.setattr(support, "get_ep_group", lambda: SimpleNamespace(cpu_group="ours"))
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    if mine:
        monkeypatch.setenv("NVFP4_MOE_ACTIVATIONS", mine)
    else:
        monkeypatch.setattr(KERNELS["bf16"], "library", lambda device: no_nvcc(Path()))
    layer = layer_of()
    parallel(layer, ep_size=2, use_ep=True, enable_eplb=True)
    reason = support.unsupported(layer)
    assert asked == ["ours"]
    if not mine:
        assert "no nvcc" in str(reason)
    else:
        refused = "--enable-eplb, and another rank does not run it"
        assert reason == (None if others == mine else refused)


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
