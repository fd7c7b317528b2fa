"""What the layers of one model share, and all that a method needs to know of its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.experts.gates import Gates
from vllm_nvfp4_moe.loading.format import Format
from vllm_nvfp4_moe.self_check import SelfCheck
from vllm_nvfp4_moe.summary import Summary


@dataclass(frozen=True)
class ModelContext:
    """One for each quantization config, and so for each model and its draft model.

    Attributes:
        format: how the experts are stored.
        gates: which gates they apply, by layer.
        self_check: of the kernels of this model's layers.
        summary: the line that is logged once all layers are loaded.
    """

    format: Format
    gates: Gates
    self_check: SelfCheck
    summary: Summary
