"""FlashInfer's experts in cuTile, NVFP4 weights and bf16 activations, as a layer of the benchmark.

On ``sm_90`` since FlashInfer 0.7.2. It is called as FlashInfer's ``MoELayer`` calls it, outside
vLLM's layer: vLLM 0.33 has no backend for it. FlashInfer's own tuner chooses among its tiles, once
for each number of tokens, at the first call with so many; each tile is then compiled, so a first
call takes many seconds (``benchmarks.flashinfer_cutile_compile`` compiles many at once before).

What it needs beside FlashInfer: ``pip install 'cuda-tile[tileiras]'``, whose compiler makes the
machine code and needs no GPU. Where that compiler (``tileiras``) is found by ``PATH`` and not as a
package, ``CUDA_HOME`` and ``CUDA_PATH`` must be unset for it: it takes ptxas and libnvvm from
there, and with those of an older CUDA every tile ends in "Return code 5".
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from benchmarks.absent import AbsentError
from quantize.experts.gates import Gate
from vllm_nvfp4_moe.doctor.inputs import Batch, Biases, Stored
from vllm_nvfp4_moe.doctor.shape import Shape

MOST_TOKENS = 16384
"""Of a call, for its tuner."""
MULTIPLE = 64
"""Of which hidden and intermediate sizes must be one."""


def activation(gate: Gate) -> tuple[str, dict[str, float]]:
    """The class of ``flashinfer.fused_moe`` that applies ``gate``, and its numbers.

    Raises:
        AbsentError: if it has none.
    """
    if gate.form == "silu":
        return "SwiGLU", {}
    if gate.form == "swiglu_oai":
        numbers = {"alpha": gate.alpha, "beta": gate.beta}
        return "SwiGLU", numbers | ({} if gate.limit is None else {"limit": gate.limit})
    if gate.form == "relu2":
        return "ReLU2", {}
    raise AbsentError(f"no class of FlashInfer's is known here for the gate {gate}")


def up_above_gate(stored: Stored) -> Stored:
    """Rows in the order of ``flashinfer.fused_moe.MoEWeightPack``; ours have gate above up."""

    def swapped(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat(rows.chunk(2, dim=1)[::-1], dim=1)

    scales = swapped(stored.block_scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    return Stored(swapped(stored.codes), scales, stored.global_scale)


def refuse(shape: Shape) -> None:
    """Raises AbsentError for a layer that its kernels cannot run."""
    activation(shape.gate)
    if shape.biased:
        raise AbsentError("its kernels add no biases")
    for name, size in (("hidden", shape.hidden), ("intermediate", shape.intermediate)):
        if size % MULTIPLE:
            raise AbsentError(f"the {name} size {size} is no multiple of {MULTIPLE}")


def package() -> Any:
    """``flashinfer.fused_moe``, which can compile for this GPU.

    Raises:
        AbsentError: if it is not installed, or its compiler is not.
    """
    try:
        from flashinfer import fused_moe
        from flashinfer.cutile import is_cuda_tile_available
    except ImportError as error:
        raise AbsentError(f"no FlashInfer from 0.7.2 on can be imported: {error}") from error
    if not hasattr(fused_moe, "CuTileNvfp4Bf16Config"):
        raise AbsentError(f"FlashInfer {version('flashinfer-python')}: 0.7.2 or newer is needed")
    if not is_cuda_tile_available():
        raise AbsentError("no compiler for its kernels: pip install 'cuda-tile[tileiras]'")
    return fused_moe


class CuTile:
    """The layer.

    Args:
        w13, w2: on the GPU that runs it; what is stored is not changed, but copied.

    Raises:
        AbsentError: if it cannot run here.
    """

    def __init__(self, shape: Shape, w13: Stored, w2: Stored, biases: Biases | None = None) -> None:
        refuse(shape)
        flashinfer = package()
        name, numbers = activation(shape.gate)
        config = flashinfer.CuTileNvfp4Bf16Config()
        gate = getattr(flashinfer, name)(**numbers)
        first = up_above_gate(w13) if shape.gate.gated else w13
        view = config.prepare_weights(
            *first,
            *w2,
            num_local_experts=shape.experts,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            activation=gate,
        )
        self.weights = flashinfer.MoEWeightPack()
        self.weights.prepare_for("cutile_nvfp4", view)
        self.flashinfer = flashinfer
        layer = flashinfer.MoELayer(
            flashinfer.MoEConfig(
                routing=flashinfer.RoutingConfig(num_experts=shape.experts, top_k=shape.top_k),
                quant=flashinfer.QuantConfig(weight=flashinfer.QuantFormat.NVFP4),
                experts=flashinfer.ExpertConfig(intermediate_size=shape.intermediate),
                activation=gate,
                backend=flashinfer.BackendOptions(candidates=(config,)),
                execution=flashinfer.ExecutionConfig(tune_max_num_tokens=MOST_TOKENS),
            ),
            device=w13.codes.device,
        )
        (self.runner,) = layer.runners
        self.tactics: dict[int, Any] = {}
        self.kernel = f"cuTile NVFP4 x bf16 of FlashInfer {version('flashinfer-python')}"

    def packed(self, given: Batch) -> Any:
        """What its runner takes."""
        pack = self.flashinfer.MoEActivationPack(given.x, None, given.ids, given.weights)
        return self.runner.pack_inputs(pack, self.weights)

    def __call__(self, given: Batch) -> torch.Tensor:
        """bf16 ``[tokens, hidden]``."""
        tokens = len(given.x)
        if tokens not in self.tactics:
            # The tuner writes routings of its own into what it is given.
            copy = Batch(given.x.clone(), given.weights.clone(), given.ids.clone())
            self.tactics[tokens] = self.tune(self.packed(copy))
        out: torch.Tensor = self.runner.forward(self.packed(given), tactic=self.tactics[tokens])
        return out

    def tune(self, inputs: Any) -> Any:
        """The tiles that FlashInfer's tuner chooses for so many tokens.

        ``MoELayer`` itself would then compile what serving needs for every number of tokens below,
        which takes minutes and is not timed here.
        """
        from flashinfer.autotuner import AutoTuner, autotune

        with autotune(True):
            _, tactic = AutoTuner.get().choose_one(
                custom_op=f"moe_{self.runner.backend_key}",
                runners=[self.runner],
                tuning_config=self.runner.tuning_config_for(inputs),
                inputs=inputs,
            )
        return tactic
