"""The choice among vLLM's NVFP4 kernels: vLLM's own choice, without those that would not apply the
gate, not add the experts' biases, or weigh tokens twice."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm import platforms
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import backend_to_kernel_cls

from vllm_nvfp4_moe import quirks
from vllm_nvfp4_moe.backends.bias_support import drops_biases
from vllm_nvfp4_moe.backends.gate_support import drops
from vllm_nvfp4_moe.backends.router_weight_support import routes_otherwise

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
    from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey

    from quantize.experts.gates import Gate


@dataclass(frozen=True)
class Selection:
    """What was chosen, and why nothing that vLLM would have preferred.

    Attributes:
        backend: vLLM's name of the kernels.
        experts_cls: vLLM's class that runs them.
        passed_over: (backend, reason) of each backend that vLLM would have preferred, in its order.
            Where a backend's classes have different reasons, each class is named. Where the user
            named a backend, only its own classes are here.
    """

    backend: NvFp4MoeBackend
    experts_cls: type[FusedMoEExperts]
    passed_over: list[tuple[str, str]]


class _Candidate:
    """Stands for an experts class in vLLM's loop: asks the class, then ``gate_support``,
    ``bias_support`` and ``router_weight_support``, and keeps the answer.

    Attributes:
        reason: why the class cannot be used. None before it is asked, and if it can.
    """

    def __init__(
        self,
        backend: NvFp4MoeBackend,
        experts_cls: type[FusedMoEExperts],
        gate: Gate,
        weighs_input: bool,
    ) -> None:
        self.backend = backend
        self.experts_cls = experts_cls
        self.gate = gate
        self.weighs_input = weighs_input
        self.reason: str | None = None

    def is_supported_config(
        self, _: Any, moe_config: FusedMoEConfig, *keys: Any
    ) -> tuple[bool, str | None]:
        cls = self.experts_cls
        supported, reason = cls.is_supported_config(cls, moe_config, *keys)
        if supported:
            self.reason = drops(self.backend, self.gate)
            if self.reason is None and moe_config.has_bias:
                self.reason = drops_biases(self.backend)
            if self.reason is None and self.weighs_input:
                self.reason = routes_otherwise(self.backend, cls)
        else:
            self.reason = _short(reason or "it gives no reason")
        return self.reason is None, self.reason


def _short(reason: str) -> str:
    """vLLM's reason, without the contents of its objects, which fill lines."""
    text = reason.split("(")[0].removesuffix("QuantKey").strip()
    platform = platforms.current_platform
    capability = platform.get_device_capability()
    device = f"current device {platform.device_name}"
    if capability is not None and text.endswith(device):  # "cuda", which all of them support
        return text.removesuffix(device) + f"compute capability {capability.as_version_str()}"
    if text == "kernel does not support":  # the standard format has no name
        return f"{text} standard activation format"
    return text


def select(
    moe_config: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
    gate: Gate,
    weighs_input: bool = False,
) -> Selection:
    """The kernels that vLLM prefers among those that support the layer, apply ``gate``, add biases
    if there are any, and weigh a token once.

    Args:
        moe_config: the layer's, with its activation and numbers set to ``gate``.
        weight_key: vLLM's key for the format of the weights.
        activation_key: vLLM's key for the format of the activations; None if they are not
            quantized.
        gate: the contract's.
        weighs_input: the layer's ``apply_router_weight_on_input``.

    Raises:
        ValueError: if there are none, or the backend that the user asked for is not among them. The
            message has the reason of each.
    """
    asked: list[_Candidate] = []

    def candidates(backend: NvFp4MoeBackend) -> list[_Candidate]:
        new = [
            _Candidate(backend, cls, gate, weighs_input) for cls in backend_to_kernel_cls(backend)
        ]
        asked.extend(new)
        return new

    try:
        backend, chosen = quirks.select_nvfp4_moe_backend(candidates)(
            moe_config, weight_key, activation_key
        )
    except (ValueError, NotImplementedError) as error:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in _reasons(asked, moe_config))
        biases = " and have biases" if moe_config.has_bias else ""
        raise ValueError(
            f"no NVFP4 kernels for experts that apply {gate}{biases}: {error}"
            + (f" Asked: {reasons}" if reasons else "")
        ) from error
    return Selection(backend, chosen.experts_cls, _reasons(asked, moe_config, before=backend))


def _reasons(
    asked: Iterable[_Candidate], moe_config: FusedMoEConfig, before: NvFp4MoeBackend | None = None
) -> list[tuple[str, str]]:
    """(backend, reason) of each that said no, in vLLM's order, and of each that vLLM did not ask.

    Args:
        before: only backends up to this one, in vLLM's order.
    """
    by_backend: dict[NvFp4MoeBackend, list[_Candidate]] = {}
    for candidate in asked:
        by_backend.setdefault(candidate.backend, []).append(candidate)
    order = _order(moe_config) if moe_config.moe_backend == "auto" else list(by_backend)
    found: list[tuple[str, str]] = []
    for backend in order:
        candidates = by_backend.get(backend, [])
        reasons = [c.reason for c in candidates]
        if not candidates:
            found.append((backend.value, "vLLM lists it among those that do not clamp at a limit"))
        elif reasons[0] is not None and len(set(reasons)) == 1:
            found.append((backend.value, reasons[0]))
        else:
            found += [
                (f"{backend.value} {c.experts_cls.__name__}", c.reason)
                for c in candidates
                if c.reason is not None
            ]
        if backend == before:
            break
    return found


def _order(moe_config: FusedMoEConfig) -> list[NvFp4MoeBackend]:
    """All backends that vLLM considers on this device, the preferred one first."""
    order: list[NvFp4MoeBackend] = []

    def note(backend: NvFp4MoeBackend) -> list[_Candidate]:
        order.append(backend)
        return []

    # With a limit, vLLM leaves out the backends that do not clamp. Here none of them says yes, so
    # that vLLM asks all.
    unlimited = copy.copy(moe_config)
    unlimited.swiglu_limit = None
    with suppress(NotImplementedError):
        quirks.select_nvfp4_moe_backend(note)(unlimited, None, None)
    return order
