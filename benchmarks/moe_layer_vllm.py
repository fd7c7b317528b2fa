"""The layers that ``benchmarks.moe_layer`` times: vLLM's, each with the kernel asked for."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.moe_layer_inputs import Batch, Biases, Stored
from benchmarks.moe_layer_table import Shape
from quantize.experts.gates import Gates
from quantize.layouts import LAYOUTS


class Way(NamedTuple):
    """vLLM's ``moe_backend``, and what must come of it: the method's class, its kernel's name.
    Activations are as this package's Hopper kernels take them."""

    backend: str
    method: str
    kernel: str
    activations: str = "bf16"


WAYS = {
    "cuda": {
        "ours": Way("auto", "HopperMethod", "HOPPER ("),
        "fp8": Way("auto", "HopperMethod", "HOPPER FP8 (", "fp8"),
        "humming": Way("humming", "VllmKernelsMethod", "HUMMING"),
        "marlin": Way("marlin", "VllmKernelsMethod", "MARLIN"),
        "bf16": Way("triton", "UnquantizedFusedMoEMethod", "TRITON"),
    },
    # Where this file only tries itself out.
    "cpu": {
        "ours": Way("auto", "CpuMethod", "the CPU kernel"),
        "bf16": Way("auto", "UnquantizedFusedMoEMethod", "CPU"),
    },
}


class WrongKernelError(Exception):
    """Another kernel runs than was asked for."""


class Layer:
    """A built layer, called below its router."""

    def __init__(self, experts: Any, config: Any) -> None:
        self.experts = experts
        self.method = experts.quant_method
        self.config = config

    def __call__(self, given: Batch) -> torch.Tensor:
        """bf16 ``[tokens, hidden]``; the memory may be a workspace that the next call reuses."""
        from vllm.forward_context import set_forward_context

        with (
            torch.inference_mode(),
            set_forward_context(None, self.config, num_tokens=len(given.x)),
        ):
            return self.method.apply(self.experts, *given, None, None)

    @property
    def kernel(self) -> str:
        """The name of what runs."""
        if hasattr(self.method, "kernel"):
            return str(self.method.kernel)
        return f"{self.method.unquantized_backend.value} ({self.method.experts_cls.__name__})"

    def check(self, way: Way) -> None:
        """Raises WrongKernelError if this is not the kernel of ``way``."""
        found = type(self.method).__name__
        if found != way.method or not self.kernel.startswith(way.kernel):
            passed = getattr(self.method, "passed_over", ())
            raise WrongKernelError(
                f"{found} runs {self.kernel}, where {way.method} {way.kernel} was asked for; "
                f"passed over: {'; '.join(map(str, passed)) or 'none'}"
            )


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """This process is a rank of one, as vLLM's worker is before it builds a model."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )

    if device.type == "cuda":
        from vllm.v1.worker.workspace import init_workspace_manager

        torch.cuda.set_device(device)
        init_workspace_manager(device)
    else:
        from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

        _set_torch_accelerator_to_noop()
    if torch.distributed.is_initialized():  # by others in this process, who also end it
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        with set_current_vllm_config(VllmConfig()):
            backend = "nccl" if device.type == "cuda" else "gloo"
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend)
            initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def build(shape: Shape, w13: Stored, w2: Stored, way: Way, biases: Biases | None = None) -> Layer:
    """vLLM's layer with these weights, converted for its kernel; quantized by this package's
    method, unless ``way`` is that of bf16.

    Raises:
        WrongKernelError: before anything is converted.
    """
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.config.kernel import KernelConfig
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    from vllm_nvfp4_moe import settings
    from vllm_nvfp4_moe.config import NvFp4MoEConfig

    device, gate = w13.codes.device, shape.gate
    quantization: Any = None
    told: dict[str, Any] = {}
    if not gate.gated:  # as vLLM's Nemotron-H says it
        told = {"activation": "relu2_no_mul", "ckpt_names": ("up_proj", "down_proj", None)}
    if way.method != "UnquantizedFusedMoEMethod":
        quantization = NvFp4MoEConfig.from_config(LAYOUTS["modelopt"].quantization_config([]))
        quantization.gates = Gates.uniform(gate)
    elif gate.form == "swiglu_oai":  # as vLLM's MiniMax-M3 says it
        told = {
            "activation": "swigluoai_uninterleave",
            "swiglu_alpha": gate.alpha,
            "swiglu_beta": gate.beta,
            "swiglu_limit": gate.limit,
        }
    config = VllmConfig(kernel_config=KernelConfig(moe_backend=way.backend))
    # This benchmark compares outputs itself.
    told_ours = {settings.ACTIVATIONS: way.activations, settings.SELF_CHECK: "0"}
    asked = mock.patch.dict(os.environ, told_ours)
    with asked, set_current_vllm_config(config), torch.device(device):
        runner = FusedMoEFactory(
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            params_dtype=torch.bfloat16,
            quant_config=quantization,
            has_bias=shape.biased,
            prefix="model.layers.0.mlp.experts",
            **told,
        )
        layer = Layer(runner.routed_experts, config)
        layer.check(way)
        fill(layer.experts, w13, w2, biases)
        if loads := getattr(layer.method, "loads", None):
            # Weights came all at once, not through loaders that count them.
            loads.complete = lambda: None
        layer.method.process_weights_after_loading(layer.experts)
    return layer


def fill(experts: Any, w13: Stored, w2: Stored, biases: Biases | None = None) -> None:
    """Put the weights where a checkpoint's would be, as they are or dequantized."""
    parameters = dict(experts.named_parameters())
    for prefix, bias in zip(("w13", "w2"), biases or (), strict=False):
        parameters[f"{prefix}_bias"].data.copy_(bias)
    for prefix, stored in (("w13", w13), ("w2", w2)):
        weight = parameters[f"{prefix}_weight"].data
        if weight.dtype == torch.bfloat16:
            for expert in range(len(weight)):
                weight[expert].copy_(stored.weight(expert))
            continue
        suffixes = LAYOUTS["modelopt"].suffixes
        codes, scales, globals_, inputs = (parameters[f"{prefix}_{s}"].data for s in suffixes)
        codes.copy_(stored.codes)
        scales.copy_(stored.block_scale)
        # Of w13, a pair each.
        globals_.copy_(stored.global_scale.view(-1, *[1] * (globals_.ndim - 1)).expand_as(globals_))
        inputs.fill_(1.0)
