"""Which layers this package's Hopper kernels run. Where they do not, vLLM's own kernels do."""

from __future__ import annotations

import functools
import subprocess
import textwrap
from typing import TYPE_CHECKING

import torch
import vllm.envs as envs
from vllm.config import get_current_vllm_config
from vllm.distributed import get_ep_group
from vllm.logger import init_logger

from quantize.native.jit import KernelError
from vllm_nvfp4_moe import settings
from vllm_nvfp4_moe.backends.hopper.experts import (
    ACTIVATIONS,
    CAPABILITY,
    HopperExperts,
    capability,
)
from vllm_nvfp4_moe.kernels.hopper.kernel import MAX_EXPERTS, HopperKernel
from vllm_nvfp4_moe.kernels.hopper.launch import FORMS
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS
from vllm_nvfp4_moe.kernels.hopper.source import Form

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

logger = init_logger("vllm.nvfp4_moe.hopper")


def asked() -> str:
    """Which of ``KERNELS`` the user wants (``NVFP4_MOE_ACTIVATIONS``).

    Raises:
        ValueError: if it is none of them.
    """
    name = settings.hopper_activations()
    if name not in KERNELS:
        raise ValueError(f"{settings.ACTIVATIONS}={name}: must be one of {', '.join(KERNELS)}")
    return name


def asked_kernel() -> HopperKernel:
    """The kernel of that name; raises as :func:`asked`."""
    return KERNELS[asked()]


def elsewhere() -> str | None:
    """Why the kernels do not run on this device, None if they do."""
    found = capability()
    if found is None:
        return "the device is not an NVIDIA GPU"
    if found != CAPABILITY:
        return "compute capability {}.{}, and the kernel is for {}.{} alone".format(
            *found, *CAPABILITY
        )
    return None


def declined(layer: RoutedExperts) -> str | None:
    """How the user has asked for another kernel, None if nobody has."""
    if not settings.hopper():
        return f"{settings.HOPPER}=0"
    if layer.moe_config.moe_backend != "auto":
        return f"--moe-backend {layer.moe_config.moe_backend}"
    if settings.humming_input():  # it asks for fewer bits than bf16 has
        return f"{settings.HUMMING_INPUT} is set, which is for Humming"
    return None


def unsupported(layer: RoutedExperts) -> str | None:
    """Why the kernel that is asked for cannot run ``layer``, None if it can.

    Builds the kernel to know.

    Raises:
        ValueError: if what is asked for does not exist.
    """
    name = asked()
    problem = _unsupported(layer, name)
    if problem and name != "bf16":
        logger.warning_once(
            "%s=%s is for this package's Hopper kernel, which does not run: %s. "
            "Another kernel is used",
            settings.ACTIVATIONS,
            name,
            problem,
        )
    return problem


def _unsupported(layer: RoutedExperts, name: str) -> str | None:
    problem = elsewhere()
    if get_current_vllm_config().parallel_config.enable_elastic_ep:
        # Not tried. Ranks that join later could not agree with those that run.
        return problem or "--enable-elastic-ep changes the number of a rank's experts"
    problem = problem or declined(layer) or _layer(layer) or _parallel(layer)
    config = layer.moe_config
    problem = problem or missing(name, Form(config.is_act_and_mul, config.has_bias))
    # Also where another device is the reason: ranks with a Hopper GPU would wait for this one.
    parallel = config.moe_parallel_config
    return _agreed(problem, name) if parallel.enable_eplb and parallel.ep_size > 1 else problem


def _agreed(problem: str | None, name: str) -> str | None:
    """``problem``, or that another rank has one, or another kernel.

    Load balancing exchanges weights between ranks as they lie in memory, so that all ranks must
    have packed them for the same kernel.
    """
    mine = 0 if problem else 1 + list(KERNELS).index(name)
    # Of all ranks this becomes the smallest number, and minus the largest.
    span = torch.tensor([mine, -mine], device="cpu")
    group = get_ep_group().cpu_group
    torch.distributed.all_reduce(span, torch.distributed.ReduceOp.MIN, group=group)
    alike = int(span.sum()) == 0
    return problem or (None if alike else "--enable-eplb, and another rank does not run it")


def _layer(layer: RoutedExperts) -> str | None:
    config = layer.moe_config
    for dtype in (layer.params_dtype, config.in_dtype):
        if dtype != torch.bfloat16:
            return f"{str(dtype).removeprefix('torch.')}, and the kernel is for bfloat16 alone"
    if layer.activation not in ACTIVATIONS:
        return f"the kernel does not apply {layer.activation.value}"
    if layer.apply_router_weight_on_input:
        return "the router's weights are for the experts' input"
    if layer.local_num_experts > MAX_EXPERTS:
        return f"{layer.local_num_experts} experts, and the kernel is for at most {MAX_EXPERTS}"
    if config.is_lora_enabled:
        return "LoRA"
    if envs.VLLM_BATCH_INVARIANT:
        # A token's sums are in another order with few tokens than with many.
        return "VLLM_BATCH_INVARIANT"
    return None


def _parallel(layer: RoutedExperts) -> str | None:
    parallel = layer.moe_config.moe_parallel_config
    if not HopperExperts._supports_parallel_config(parallel):
        return f"tokens come by {parallel.all2all_backend}"
    if parallel.enable_eplb:
        # vLLM exchanges experts of all layers through buffers of the first one's shapes.
        gates = getattr(layer.quant_config, "gates", None)
        every = [] if gates is None else [gates.default, *gates.layers.values()]
        for gate in every:
            alike = gate.gated == layer.moe_config.is_act_and_mul
            if not alike or gate.form not in FORMS:
                return f"--enable-eplb, and other layers apply {gate.form}"
    return None


@functools.cache
def missing(name: str, form: Form) -> str | None:
    """Why the kernel cannot be built for this form of experts in this process, None once it is.

    Logs a warning if it cannot.
    """
    try:
        KERNELS[name].library(torch.cuda.current_device(), form)
    except (KernelError, OSError, subprocess.SubprocessError) as error:
        problem = " ".join(str(error).split()).rstrip(".")
        if name == "bf16":  # who asked for another is told so by `unsupported`
            logger.warning_once(
                "This package's Hopper kernel cannot be built: %s. vLLM's own kernels are used; "
                "%s=0 asks for them without this message",
                problem,
                settings.HOPPER,
            )
        return textwrap.shorten(problem, 100, placeholder=" ...")
    return None
