"""A layer of experts as vLLM builds it, with the kernel that is asked for."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from quantize.experts.gates import Gates
from quantize.layouts import LAYOUTS
from vllm_nvfp4_moe import settings
from vllm_nvfp4_moe.doctor import children
from vllm_nvfp4_moe.doctor.inputs import Batch, Biases, Stored
from vllm_nvfp4_moe.doctor.routing import correction_bias
from vllm_nvfp4_moe.doctor.shape import Shape

PLAIN = "UnquantizedFusedMoEMethod"
"""vLLM's method for experts in bf16."""


class Way(NamedTuple):
    """What is asked for, and what must come of it.

    Attributes:
        backend: vLLM's ``moe_backend``.
        method: the class of the layer's method.
        kernel: how its kernel's name begins.
        activations: the value of ``NVFP4_MOE_ACTIVATIONS``.
        cpu: what this package's CPU kernel takes, as ``CpuMethod.by_tokens`` says it.
    """

    backend: str
    method: str
    kernel: str
    activations: str = "bf16"
    cpu: str = ""


class WrongKernelError(Exception):
    """Another kernel runs than was asked for."""


class Layer:
    """A built layer, called below its router, unless its kernel routes by itself."""

    def __init__(self, runner: Any, config: Any) -> None:
        self.runner = runner
        self.experts = runner.routed_experts
        self.method = self.experts.quant_method
        self.config = config

    def __call__(self, given: Batch) -> torch.Tensor:
        """bf16 ``[tokens, hidden]``; the memory may be a workspace that the next call reuses."""
        from vllm.forward_context import set_forward_context

        hidden = given.x.shape[1]
        padding = self.experts.moe_config.hidden_dim - hidden
        x = torch.nn.functional.pad(given.x, (0, padding)) if padding else given.x
        with (
            torch.inference_mode(),
            set_forward_context(None, self.config, num_tokens=len(x)),
        ):
            if self.method.is_monolithic:
                # Since 0.33 a router may have the kernel see other logits than it sees itself.
                prepare = getattr(self.runner.router, "prepare_monolithic_logits", None)
                logits = given.logits if prepare is None else prepare(given.logits)
                out = self.method.apply_monolithic(self.experts, x, logits)
            else:
                out = self.method.apply(self.experts, x, given.weights, given.ids, None, None)
        return out[:, :hidden]

    def routed(self, given: Batch) -> Batch:
        """``given`` with what vLLM's router makes of its logits."""
        assert given.logits is not None
        with torch.inference_mode():
            weights, ids = self.runner.router.select_experts(
                hidden_states=given.x, router_logits=given.logits
            )
        return given._replace(weights=weights.float(), ids=ids)

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
    with tempfile.TemporaryDirectory(dir=children.How.folder) as folder:
        with set_current_vllm_config(VllmConfig()):
            backend = "nccl" if device.type == "cuda" else "gloo"
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend)
            initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def make(shape: Shape, way: Way, device: torch.device, weights_only: bool = False) -> Layer:
    """vLLM's layer with empty parameters; quantized by this package's method, unless ``way`` is
    that of bf16.

    Args:
        device: may be ``meta``, to see what is chosen.
        weights_only: the checkpoint's experts come without input scales.

    Raises:
        ValueError: if nothing can run the layer.
    """
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.config.kernel import KernelConfig
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    from vllm_nvfp4_moe.config import NvFp4MoEConfig
    from vllm_nvfp4_moe.registration import register

    register()  # as vLLM does in each of its processes
    gate = shape.gate
    quantization: Any = None
    told: dict[str, Any] = {}
    if not gate.gated:  # as vLLM's Nemotron-H says it
        told = {"activation": "relu2_no_mul", "ckpt_names": ("up_proj", "down_proj", None)}
    if way.method != PLAIN:
        layout = LAYOUTS["modelopt"]
        stored = layout.weights_only if weights_only else layout
        quantization = NvFp4MoEConfig.from_config(stored.quantization_config([]))
        quantization.gates = Gates.uniform(gate)
    elif gate.form == "swiglu_oai":  # as vLLM's MiniMax-M3 says it
        told = {
            "activation": "swigluoai_uninterleave",
            "swiglu_alpha": gate.alpha,
            "swiglu_beta": gate.beta,
            "swiglu_limit": gate.limit,
        }
    if shape.router == "sigmoid":
        bias = correction_bias(shape.experts).to(device)
        told |= {"scoring_func": "sigmoid", "e_score_correction_bias": bias}
    config = VllmConfig(kernel_config=KernelConfig(moe_backend=way.backend))
    config.quant_config = quantization
    with told_to(way), set_current_vllm_config(config), torch.device(device):
        runner = FusedMoEFactory(
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            params_dtype=torch.bfloat16,
            router_logits_dtype=torch.float32,
            quant_config=quantization,
            has_bias=shape.biased,
            prefix="model.layers.0.mlp.experts",
            **told,
        )
    layer = Layer(runner, config)
    if way.cpu:
        layer.method.by_tokens = way.cpu
    return layer


def told_to(way: Way) -> contextlib.AbstractContextManager[None]:
    """Within, the environment asks for ``way``, and for no self-check: who builds layers here
    compares their outputs."""
    told = {settings.ACTIVATIONS: way.activations, settings.SELF_CHECK: "0", settings.SELECT: ""}
    return settings.set_to(told)


def build(
    shape: Shape,
    w13: Stored,
    w2: Stored,
    way: Way,
    biases: Biases | None = None,
    weights_only: bool = False,
    input_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Layer:
    """The layer of :func:`make` with these weights, converted for its kernel.

    Args:
        input_scales: of w13 and w2, float32 ``[experts]``; ones if they are not given.

    Raises:
        WrongKernelError: before anything is converted.
    """
    from vllm.config import set_current_vllm_config

    layer = make(shape, way, w13.codes.device, weights_only)
    layer.check(way)
    with told_to(way), set_current_vllm_config(layer.config), torch.device(w13.codes.device):
        fill(layer.experts, w13, w2, biases, input_scales)
        if loads := getattr(layer.method, "loads", None):
            # Weights came all at once, not through loaders that count them.
            loads.complete = list
        layer.method.process_weights_after_loading(layer.experts)
    return layer


def fill(
    experts: Any,
    w13: Stored,
    w2: Stored,
    biases: Biases | None = None,
    input_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Put the weights where a checkpoint's would be, as they are or dequantized."""
    parameters = dict(experts.named_parameters())
    for prefix, bias in zip(("w13", "w2"), biases or (), strict=False):
        parameters[f"{prefix}_bias"].data.copy_(bias)
    for place, (prefix, stored) in enumerate((("w13", w13), ("w2", w2))):
        weight = parameters[f"{prefix}_weight"].data
        if weight.dtype == torch.bfloat16:
            for expert in range(len(weight)):
                weight[expert].copy_(stored.weight(expert))
            continue
        given = [*stored]
        if f"{prefix}_input_scale" in parameters:
            ones = torch.ones_like(stored.global_scale)
            given.append(ones if input_scales is None else input_scales[place])
        for suffix, tensor in zip(LAYOUTS["modelopt"].suffixes, given, strict=False):
            parameter = parameters[f"{prefix}_{suffix}"].data
            if tensor.ndim == 1:  # of w13, a pair each
                tensor = tensor.view(-1, *[1] * (parameter.ndim - 1)).expand_as(parameter)
            parameter.copy_(tensor)
