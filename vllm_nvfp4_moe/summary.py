"""One line per model, once its experts are loaded: what runs, with what, and why not faster."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.config import NvFp4MoEConfig
    from vllm_nvfp4_moe.method import NvFp4MoEMethod

logger = init_logger("vllm.nvfp4_moe")


class Summary:
    """Counts a model's layers as they are built and loaded; the last one to load logs the line."""

    def __init__(self, config: NvFp4MoEConfig) -> None:
        self._config = config
        self._built = 0
        self._loaded: list[tuple[RoutedExperts, NvFp4MoEMethod]] = []
        self._begin: float | None = None

    def built(self) -> None:
        """A layer has been built."""
        self._built += 1

    def begins(self) -> None:
        """A tensor of an expert has come."""
        if self._begin is None:
            self._begin = time.perf_counter()

    def loaded(self, layer: RoutedExperts, method: NvFp4MoEMethod) -> None:
        """A layer's weights are what its kernel reads."""
        if not self._built:  # loaded again
            return
        self._loaded.append((layer, method))
        if len(self._loaded) == self._built:
            # On one rank; which layers it has, pipeline parallelism decides.
            logger.info_once("%s", self.line(), scope="global")
            self._loaded.clear()  # the layers belong to vLLM
            self._begin, self._built = None, 0  # a draft model's layers may follow

    def line(self) -> str:
        """The line, of what has been loaded so far."""
        layers = [layer for layer, _ in self._loaded]
        first = layers[0]
        experts = f"{first.global_num_experts} experts"
        if first.local_num_experts != first.global_num_experts:
            experts += f" ({first.local_num_experts} on this rank)"
        storage = self._config.format
        source = "quantized on the fly" if storage.on_the_fly else f"{storage.layout.name} layout"
        kernels = dict.fromkeys(method.kernel for _, method in self._loaded)
        passed = dict.fromkeys(
            f"{name} ({reason})"
            for _, method in self._loaded
            for name, reason in method.passed_over
        )
        weights = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for layer in layers
            for tensor in layer.parameters()
        }
        seconds = time.perf_counter() - self._begin if self._begin is not None else 0.0
        return "; ".join(
            [
                f"NVFP4 experts: {len(layers)} layers x {experts}, {source}",
                f"gate {self._config.gates}",
                f"kernel {', '.join(kernels)}",
                *([f"passed over: {', '.join(passed)}"] if passed else []),
                f"{sum(weights.values()) / 2**30:.2f} GiB on this rank",
                f"{seconds:.1f} s",
                self._config.self_check.told(),
            ]
        )
