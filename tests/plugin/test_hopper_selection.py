"""When a Hopper kernel is chosen for a layer of vLLM, on devices that are pretended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from quantize.experts.gates import Gate, Gates
from quantize.layouts import LAYOUTS
from quantize.native import jit
from quantize.native.jit import KernelError
from tests.plugin.blackwell import ACTIVATION, GELU, GELU_TANH, M3, SILU, STEP, moe_config, pretend
from vllm_nvfp4_moe import backends, settings
from vllm_nvfp4_moe.backends.hopper import support
from vllm_nvfp4_moe.backends.hopper.method import HopperMethod
from vllm_nvfp4_moe.config import NvFp4MoEConfig
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS
from vllm_nvfp4_moe.kernels.hopper.source import Form

LAYER = "model.layers.1.mlp.experts"
NAME = KERNELS["bf16"].name
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
        monkeypatch.setattr(kernel, "library", lambda device, form: None)
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


def as_ungated(layer: Any) -> None:
    layer.activation = layer.moe_config.activation = MoEActivation.RELU2_NO_MUL


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_kernel_is_built_for_the_experts_form(
    hopper: VllmConfig, monkeypatch: MonkeyPatch, gated: bool, biased: bool
) -> None:
    """And for no other: nobody waits for nvcc to compile what the model does not have."""
    built: list[tuple[int, Form]] = []
    monkeypatch.setattr(KERNELS["bf16"], "library", lambda *asked: built.append(asked))
    layer = layer_of(SILU)
    layer.moe_config.has_bias = biased
    if not gated:
        as_ungated(layer)
    for _ in range(2):
        assert support.unsupported(layer) is None
    assert built == [(0, Form(gated, biased))]


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
    monkeypatch.setattr(KERNELS["fp8"], "library", lambda device, form: no_nvcc(Path()))
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
    "does not apply silu_no_mul": (attribute("activation", MoEActivation.SILU_NO_MUL), SILU),
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
    layer.quant_config.gates = Gates(SILU, {3: Gate("relu2")})
    assert "other layers apply relu2" in str(support.unsupported(layer))
    parallel(layer, enable_eplb=False)
    assert support.unsupported(layer) is None
    layer.quant_config.gates = Gates.uniform(Gate("relu2"))
    as_ungated(layer)
    parallel(layer, enable_eplb=True)
    assert support.unsupported(layer) is None


def no_nvcc(path: Path) -> Path:
    raise KernelError("no nvcc: not in $CUDA_HOME, on the path, in /usr/local/cuda or anywhere")


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
        (nvcc_that_is_broken, "nvcc failed: it said nothing, and its exit status is 3"),
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
    monkeypatch.setattr(
        KERNELS["bf16"], "library", lambda device, form: jit.load(source, jit.cuda("90a"))
    )
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
        monkeypatch.setattr(KERNELS["bf16"], "library", lambda device, form: no_nvcc(Path()))
    layer = layer_of()
    parallel(layer, ep_size=2, use_ep=True, enable_eplb=True)
    reason = support.unsupported(layer)
    assert asked == ["ours"]
    if not mine:
        assert "no nvcc" in str(reason)
    else:
        refused = "--enable-eplb, and another rank does not run it"
        assert reason == (None if others == mine else refused)
