"""One line per model, logged once its experts are loaded: how many, which gate, which kernel runs
them, and why not one that vLLM would have preferred."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from vllm_nvfp4_moe import metrics, settings

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from quantize.experts.gates import Gates
    from vllm_nvfp4_moe.interface import ExpertsBackend
    from vllm_nvfp4_moe.loading.format import Format
    from vllm_nvfp4_moe.self_check import SelfCheck

logger = init_logger("vllm.nvfp4_moe")


class Summary:
    """Counts a model's layers as they are built and loaded. The last one to load logs the line.

    Args:
        storage: how the experts are stored.
        gates: which gates they apply.
        self_check: of the layers' kernels.
    """

    def __init__(self, storage: Format, gates: Gates, self_check: SelfCheck) -> None:
        self._storage, self._gates, self._self_check = storage, gates, self_check
        self._built = 0
        self._left: list[str] = []
        self._lacking: list[str] = []
        self._loaded: list[tuple[RoutedExperts, ExpertsBackend]] = []
        self._begin: float | None = None

    def built(self) -> None:
        """Note that a layer has been built."""
        self._built += 1

    def left(self, name: str) -> None:
        """Note that the layer ``name`` has experts that are not NVFP4, and is left to vLLM."""
        self._left.append(name)

    def lacks_input_scales(self, first: str) -> None:
        """Note that a layer, whose kernel uses none, lacks input scales; ``first`` names one."""
        self._lacking.append(first)

    def begins(self) -> None:
        """Note that a tensor of an expert has come: the time from the first one is told."""
        if self._begin is None:
            self._begin = time.perf_counter()

    def loaded(self, layer: RoutedExperts, method: ExpertsBackend) -> None:
        """Note that a layer's weights are what its kernel reads; log the line after the last."""
        if not self._built:  # this is a reload
            return
        self._loaded.append((layer, method))
        if len(self._loaded) == self._built:
            # By one rank only. With pipeline parallelism it has some of the layers.
            logger.info_once("%s", self.line(), scope="global")
            metrics.report(_rank(), self._labels(), self._self_check.worst)
            if self._lacking:
                logger.warning(
                    "Input scales that the checkpoint's config speaks of are missing, or are no "
                    "scales, in %d of %d layers of NVFP4 experts (first: %s). The kernel does not "
                    "use them, and the text is right; kernels with 4-bit activations would refuse "
                    "the checkpoint",
                    len(self._lacking), len(self._loaded), self._lacking[0],
                )  # fmt: skip
            self._compare_ranks()
            self._loaded.clear()  # the layers belong to vLLM
            self._left.clear()
            self._lacking.clear()
            self._begin, self._built = None, 0  # a draft model's layers may follow

    def _kernels(self) -> list[str]:
        """The part of the line that ranks may differ in without a fault of the checkpoint."""
        kernels = dict.fromkeys(method.kernel for _, method in self._loaded)
        passed = dict.fromkeys(
            f"{name} ({reason})"
            for _, method in self._loaded
            for name, reason in method.passed_over
        )
        told = [f"kernel {', '.join(kernels)}"]
        tables = dict.fromkeys(m.measured for _, m in self._loaded if m.measured is not None)
        told += [f"chosen by {table} ({settings.SELECT}={settings.MEASURED})" for table in tables]
        return [*told, f"passed over: {', '.join(passed)}"] if passed else told

    def _compare_ranks(self) -> None:
        """Warn if the first rank to come here runs other kernels: only one rank logs the line.

        No rank waits for another, since with pipeline parallelism some may have no experts.
        """
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return
        variants = dict.fromkeys(method.variant for _, method in self._loaded)
        rank, mine = _rank(), f"{'; '.join(self._kernels())} [{', '.join(variants)}]"
        store = torch.distributed.distributed_c10d._get_default_store()
        model = f"{self._storage.layout.name}/{self._gates}/{self._loaded[0][0].global_num_experts}"
        try:
            first = store.compare_set(f"nvfp4_moe/{model}", "", f"{rank} {mine}").decode()
        except RuntimeError:  # not all kinds of stores can
            return
        other, theirs = first.split(" ", 1)
        if theirs != mine and other != str(rank):
            logger.warning(
                "Ranks run different kernels for NVFP4 experts. Rank %d: %s. Rank %s: %s",
                rank, mine, other, theirs,
            )  # fmt: skip
            logger.info("Rank %d: %s", rank, self.line())

    def _labels(self) -> dict[str, str]:
        """What ``/metrics`` says, by :data:`metrics.INFO`."""
        layers, methods = zip(*self._loaded, strict=True)
        check = self._self_check
        ran = "impossible" if check.skipped else "none" if check.worst is None else "passed"
        return {
            "layers": str(len(layers)),
            "experts": _either(layer.global_num_experts for layer in layers),
            "layout": self._storage.layout.name,
            "gate": str(self._gates),
            "kernel": ", ".join(dict.fromkeys(method.kernel for method in methods)),
            "variant": ", ".join(dict.fromkeys(method.variant for method in methods)),
            "passed_over": ", ".join(
                dict.fromkeys(name for method in methods for name, _ in method.passed_over)
            ),
            "self_check": ran,
        }

    def line(self) -> str:
        """The line, for what has been loaded so far."""
        layers = [layer for layer, _ in self._loaded]
        first = layers[0]
        experts = f"{_either(layer.global_num_experts for layer in layers)} experts"
        if first.local_num_experts != first.global_num_experts:
            experts += f" ({_either(layer.local_num_experts for layer in layers)} on this rank)"
        storage = self._storage
        source = "quantized on the fly" if storage.on_the_fly else f"{storage.layout.name} layout"
        weights = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for layer in layers
            for tensor in layer.parameters()
        }
        seconds = time.perf_counter() - self._begin if self._begin is not None else 0.0
        return "; ".join(
            [
                f"NVFP4 experts: {len(layers)} layers x {experts}, {source}",
                *([f"{len(self._left)} more are not NVFP4, and vLLM's"] if self._left else []),
                f"gate {self._gates}",
                *self._kernels(),
                f"{sum(weights.values()) / 2**30:.2f} GiB on this rank",
                f"{seconds:.1f} s",
                self._self_check.told(),
            ]
        )


def _rank() -> int:
    """Of all processes that the model runs in."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _either(counts: Iterable[int]) -> str:
    """Each number once: layers may have different numbers of experts."""
    return " or ".join(dict.fromkeys(map(str, counts)))
