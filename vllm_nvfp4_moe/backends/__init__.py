"""The backends, each of which runs NVFP4 experts with one family of kernels.

A new backend is one file or folder here, with a class that inherits
:class:`vllm_nvfp4_moe.method.NvFp4MoEMethod`, and one entry in ``methods``.
:mod:`vllm_nvfp4_moe.interface` says what the class must have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_nvfp4_moe import measured, settings
from vllm_nvfp4_moe.activation import apply_contract

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from quantize.experts.gates import Gate
    from vllm_nvfp4_moe.context import ModelContext
    from vllm_nvfp4_moe.method import NvFp4MoEMethod

logger = init_logger("vllm.nvfp4_moe.backends")

_PER_TOKEN = "--quantization-config asks for activations with a scale for each token"


def methods() -> Iterator[type[NvFp4MoEMethod]]:
    """The methods in order of preference. Each is imported only if none before it fits."""
    from vllm_nvfp4_moe.backends.hopper.method import HopperMethod

    yield HopperMethod
    from vllm_nvfp4_moe.backends.vllm_kernels import VllmKernelsMethod

    yield VllmKernelsMethod
    from vllm_nvfp4_moe.backends.cpu.method import CpuMethod

    yield CpuMethod


def choose(context: ModelContext, layer: RoutedExperts, weight_only: bool) -> NvFp4MoEMethod:
    """The method for ``layer``. Sets the layer to the contract's gate before it chooses.

    Args:
        context: of the model that the layer belongs to.
        weight_only: the layer's experts come without input scales.

    Raises:
        ValueError: if no backend supports the layer; the message has each one's reason.
    """
    apply_contract(layer, context.gates.of(layer.layer_name))
    if settings.measured() and (fastest := _by_table(context, layer, weight_only)) is not None:
        return fastest
    reasons = []
    missed: list[tuple[str, str]] = []
    for method in methods():
        asked = context.format.per_token and not method.takes_per_token
        reason = _PER_TOKEN if asked else method.unsupported(layer)
        if reason is None:
            chosen = method(context, layer, weight_only)
            chosen.passed_over = [*missed, *chosen.passed_over]
            return chosen
        reasons.append(f"{method.__name__}: {reason}")
        if not asked and (name := method.missed(layer)):
            missed.append((name, reason))
    raise ValueError(f"{layer.layer_name}: no way to run its NVFP4 experts; {'; '.join(reasons)}")


def _by_table(
    context: ModelContext, layer: RoutedExperts, weight_only: bool
) -> NvFp4MoEMethod | None:
    """The fastest method for ``layer`` by doctor's table of this machine; None, with a warning, if
    there is none. None, too, where the user has named a kernel."""
    config = layer.moe_config
    if config.moe_backend != "auto" or context.format.per_token:
        return None
    parallel = config.moe_parallel_config
    if parallel.enable_eplb and parallel.ep_size > 1:
        # Ranks exchange weights as they lie in memory; their machines' tables may differ.
        logger.warning_once(
            "%s=%s: not with --enable-eplb, whose ranks must all run one kernel. Kernels are "
            "chosen in the usual order",
            settings.SELECT,
            settings.MEASURED,
        )
        return None
    key = key_of(layer, context.gates.of(layer.layer_name), weight_only)
    try:
        table = measured.load(key)
    except ValueError as error:
        logger.warning_once(
            "%s=%s: the table cannot be read (%s); delete the file and run nvfp4-moe doctor again. "
            "Kernels are chosen in the usual order",
            settings.SELECT,
            settings.MEASURED,
            str(error),
        )
        return None
    if table is None:
        logger.warning_once(
            "%s=%s: there is no table of this machine (%s, vLLM %s) for layers of %d experts, "
            "%d x %d, top %d, %s%s. Make one with: nvfp4-moe doctor CHECKPOINT --tp RANKS. Kernels "
            "are chosen in the usual order",
            settings.SELECT, settings.MEASURED, key["device"], key["vllm"], key["experts"],
            key["hidden"], key["intermediate"], key["top_k"], key["gate"],
            ", weights alone" if weight_only else "",
        )  # fmt: skip
        return None
    for name in table.ranked():
        for method in methods():
            if name in method.kernel_names():
                chosen = method.measured_best(name, table, context, layer, weight_only)
                if chosen is not None:
                    chosen.measured = f"doctor's table of {table.date}"
                    return chosen
    logger.warning_once(
        "%s=%s: none of the kernels in doctor's table (%s) can run here as the options are. "
        "Kernels are chosen in the usual order",
        settings.SELECT,
        settings.MEASURED,
        ", ".join(table.ranked()),
    )
    return None


def key_of(layer: RoutedExperts, gate: Gate, weight_only: bool) -> dict[str, Any]:
    """What a table of measurements for ``layer`` is kept under."""
    config = layer.moe_config
    return measured.key_of(
        str(gate),
        config.num_local_experts,
        config.hidden_dim_unpadded or config.hidden_dim,
        config.intermediate_size_per_partition_unpadded or config.intermediate_size_per_partition,
        config.experts_per_token,
        config.has_bias,
        weight_only,
    )
