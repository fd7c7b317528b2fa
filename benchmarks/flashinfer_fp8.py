"""FlashInfer's fused NVFP4 experts with FP8 activations on ``sm_90``, as a layer of the benchmark.

From FlashInfer 0.7.4 on: one kernel for dispatch, both products, gate and combination, made for
expert parallelism; here with one rank, for which FlashInfer needs no NVSHMEM (``MEGA_NO_DIST``).
What is timed is what FlashInfer's backend does for a call: its quantization of the activations
(PyTorch's operators and one kernel), then its kernel. It is compiled for each number of tokens, at
the first call with so many (a minute or so), with the tile that FlashInfer chooses by its own
rules: those are tuned on H200s for other shapes and four ranks.
"""

from __future__ import annotations

import os
from functools import partial
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.absent import AbsentError
from benchmarks.flashinfer_interleave import interleave
from vllm_nvfp4_moe.doctor.inputs import Batch, Biases, Stored
from vllm_nvfp4_moe.doctor.shape import Shape

MULTIPLE = 128
"""Of which hidden and intermediate sizes must be one."""
ORDER = 64
"""FlashInfer's ``nvfp4_kperm``, by its default: columns are permuted within so many."""


def refuse(shape: Shape) -> None:
    """Raises AbsentError for a layer that its kernel cannot run."""
    if shape.gate.form != "silu":
        raise AbsentError(f"its gate is SwiGLU alone, with no alpha and beta: not {shape.gate}")
    if shape.biased:
        raise AbsentError("its kernel adds no biases")
    for name, size in (("hidden", shape.hidden), ("intermediate", shape.intermediate)):
        if size % MULTIPLE:
            raise AbsentError(f"the {name} size {size} is no multiple of {MULTIPLE}")


def packages() -> tuple[Any, Any, Any]:
    """Its kernel, its weights' layout, and its quantization of activations.

    Raises:
        AbsentError: if they are not installed.
    """
    os.environ.setdefault("MEGA_NO_DIST", "1")
    try:
        from flashinfer.moe_ep.backends.mega.kernel.sm90.fp8_nvfp4_bf16_pull_cutedsl import (
            staging,
            weights,
        )
        from flashinfer.moe_ep.kernel_src.sm90 import pull_style_cutedsl_megakernel as kernel
    except ImportError as error:
        raise AbsentError(f"no FlashInfer from 0.7.4 on can be imported: {error}") from error
    return kernel, weights, staging


class FusedFp8:
    """The layer.

    Args:
        w13, w2: on the GPU that runs it; what is stored is not changed, but copied.

    Raises:
        AbsentError: if it cannot run here.
    """

    def __init__(self, shape: Shape, w13: Stored, w2: Stored, biases: Biases | None = None) -> None:
        refuse(shape)
        self.package, layout, self.staging = packages()
        pack = layout.Nvfp4WeightPack(
            w13=w13.codes,
            w2=w2.codes,
            w13_scale=w13.block_scale,
            w2_scale=w2.block_scale,
            w13_global_scale=w13.global_scale,
            w2_global_scale=w2.global_scale,
        )
        name = "flashinfer.fused_moe.prepare.interleave_moe_weights_for_sm90_mixed_gemm"
        with patch(name, interleave):
            self.weights = layout.preprocess_mega_weights(
                pack,
                intermediate_size=shape.intermediate,
                hidden_size=shape.hidden,
                nvfp4_kperm=ORDER,
            )
        self.write = partial(layout.copy_nvfp4_kperm_hidden, kperm=ORDER)
        self.shape = shape
        self.buffer: Any = None
        self.kernel = f"fp8_nvfp4 of FlashInfer {version('flashinfer-python')}"

    def __call__(self, given: Batch) -> torch.Tensor:
        """bf16 ``[tokens, hidden]``: the kernel's own memory, which the next call reuses."""
        tokens = len(given.x)
        if self.buffer is None or self.buffer.num_max_tokens != tokens:
            if self.buffer is not None:
                self.buffer.destroy()
            self.buffer = self.package.get_symm_buffer_for_hopper_nvfp4_mega_moe(
                self.shape.experts,
                tokens,
                self.shape.top_k,
                self.shape.hidden,
                self.shape.intermediate,
                0,
                1,
                nvfp4_kperm=ORDER,
            )
        buffer = self.buffer
        self.staging.stage_mega_moe_inputs(
            given.x,
            given.weights,
            given.ids,
            buffer.x,
            buffer.x_sf,
            buffer.topk_idx,
            buffer.topk_weights,
            quantize_input=True,
            safe_quantization=True,
            write_payload=self.write,
        )
        out: torch.Tensor = self.package.hopper_nvfp4_mega_moe(
            None, *self.weights, buffer, num_tokens=tokens
        )
        return out
