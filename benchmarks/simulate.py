"""Routed experts computed as NVFP4 kernels do, in a Transformers model: weights and inputs rounded.

What goes into each of an expert's two GEMMs is rounded to NVFP4 with its static input scale and a
scale for each 16 values, as vLLM's emulation backend does it
(``quantization/utils/nvfp4_emulation_utils.py``: ``ref_nvfp4_quant_dequant``); the rest is the
model's own arithmetic, with the gate that a contract states.

**Whose input scale.** A checkpoint has one for each expert and projection, ``amax / (6 * 448)`` by
ModelOpt's rule; kernels get its reciprocal. vLLM 0.32 makes of them (``fused_moe/oracle/nvfp4.py``,
``convert_to_nvfp4_moe_kernel_format``; gate and up always count as one, with the larger):

* ``shared``: the largest of all experts of the layer, one for each GEMM: emulation and every
  FlashInfer kernel (TRT-LLM, CUTLASS, CuteDSL, B12x), across ranks too;
* ``expert``: each its own: vLLM's CUTLASS kernel and b12x.

* ``token``: each token its own, ``amax / (6 * 448)``, whatever the checkpoint says: FlashInfer's
  TRT-LLM kernel, if it is asked for ``nvfp4_per_token``;
* ``four-six`` and ``token-four-six``: as ``shared`` and ``token``, with FlashInfer's
  ``FLASHINFER_NVFP4_4OVER6=1``: a block's largest value becomes 6 or 4, whichever is nearer
  (:func:`round_four_six`).

**Eight bits** (``fp8``): E4M3 with a scale for each token, its largest magnitude over 448, as FP8
matrix products take them; the checkpoint's input scales are not used. Such products want weights in
E4M3 too: an E2M1 value times its block scale, which may have a bit more (:func:`weights_in_e4m3`).

Marlin, Humming and this package's CPU kernel leave activations as they are: weights alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.stored import Experts
from quantize.experts.gates import Gate, Gates
from quantize.nvfp4.activations import round_nvfp4, round_rows_e4m3, row_scales
from quantize.nvfp4.format import BLOCK, E2M1_MAX, E4M3_MAX, NvFp4, decode

EIGHT_BITS = "fp8"
BY_TOKEN = ("token", "token-four-six")
SCALES = ("shared", "expert", "four-six", *BY_TOKEN, EIGHT_BITS)
"""How an expert's GEMMs' inputs are rounded, see the module's docstring."""

_LAYER = re.compile(r"\blayers\.([0-9]{1,9})\.")


def weights_in_e4m3(weight: NvFp4) -> torch.Tensor:
    """Float32 ``[out, in]``: each value times its block scale rounded to E4M3.

    A power of two brings the largest block's values below 448; what then is subnormal in E4M3 has
    fewer digits. The global scale multiplies the product, in float32.
    """
    blocks = weight.block_scale.float().unsqueeze(-1)
    largest = E2M1_MAX * blocks.max() / E4M3_MAX
    unit = torch.where(largest == 0, 1.0, largest).log2().ceil().exp2()
    values = decode(weight.codes).float().unflatten(-1, (-1, BLOCK)) * (blocks / unit)
    return (values.to(torch.float8_e4m3fn).float() * unit).flatten(-2) * weight.global_scale


def round_four_six(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """As ``round_nvfp4``; each block's largest value becomes 4 if that gives a smaller sum of
    magnitudes of errors (flashinfer-python 0.7.2, ``quantization_utils.cuh``:
    ``cvt_warp_fp16_to_fp4``, by default)."""
    six, four = (
        round_nvfp4(x, input_scale, target).unflatten(-1, (-1, BLOCK)) for target in (6, 4)
    )
    exact = x.unflatten(-1, (-1, BLOCK))
    lost_by_six, lost_by_four = ((each - exact).abs().sum(-1, keepdim=True) for each in (six, four))
    return torch.where(lost_by_four < lost_by_six, four, six).flatten(-2)


class Simulated:
    """``forward`` of a layer's routed experts, as Transformers calls it.

    Args:
        experts: weights, cast to ``dtype``.
        gate: what is between the two GEMMs; rows are concatenated.
        scales: of ``SCALES``, or None: inputs are not rounded.
    """

    def __init__(
        self,
        experts: Experts,
        gate: Gate,
        scales: str | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.gate_up = experts.gate_up.to(device, dtype)
        self.down = experts.down.to(device, dtype)
        self.gate = gate.concatenated()
        self.inputs: torch.Tensor | None = None
        self.scales = scales
        self._nvfp4 = round_four_six if scales and scales.endswith("four-six") else round_nvfp4
        if scales is not None and scales not in (*BY_TOKEN, EIGHT_BITS):
            if experts.input_scales is None:
                raise ValueError("these experts have no input scales")
            inputs = experts.input_scales.float().to(device)
            self.inputs = inputs if scales == "expert" else inputs.amax(1, keepdim=True)

    def __call__(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The routed experts' output.

        Args:
            hidden: ``[tokens, hidden]``.
            chosen: expert numbers, ``[tokens, k]``.
            weights: the router's, ``[tokens, k]``.
        """
        tokens, k = chosen.shape
        experts, order = chosen.flatten().sort(stable=True)
        shared = self.inputs is None or self.inputs.shape[1] == 1
        if shared:  # once a token, not once for each of its experts
            rows = self._round(hidden, 0, experts)[order // k]
        else:
            rows = self._round(hidden[order // k], 0, experts)
        counts = torch.bincount(experts, minlength=len(self.gate_up)).tolist()
        middle = self.gate.apply_stacked(_by_expert(rows, self.gate_up, counts))
        out = _by_expert(self._round(middle, 1, experts), self.down, counts)
        out = out * weights.flatten()[order].unsqueeze(1)
        # Back in order and summed there: the same sum every time, which index_add_ on GPUs is not.
        restored = torch.empty_like(out)
        restored[order] = out
        return restored.view(tokens, k, -1).sum(1).to(hidden.dtype)

    def _round(self, rows: torch.Tensor, gemm: int, experts: torch.Tensor) -> torch.Tensor:
        if self.scales == EIGHT_BITS:
            return round_rows_e4m3(rows)
        if self.scales in BY_TOKEN:
            return self._nvfp4(rows, row_scales(rows))
        if self.inputs is None:
            return rows
        scales = self.inputs[gemm]
        return self._nvfp4(rows, scales if len(scales) == 1 else scales[experts])


def _by_expert(rows: torch.Tensor, weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """``rows`` ``[n, in]``, sorted by expert, times ``weights`` ``[experts, out, in]``."""
    parts = zip(rows.split(counts), weights, strict=True)
    return torch.cat([F.linear(part, weight) for part, weight in parts])


def experts_of(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """A Transformers model's modules of fused routed experts, by layer number.

    Raises:
        ValueError: if there are none, or two in one layer, or they have biases.
    """
    found: dict[int, torch.nn.Module] = {}
    for name, module in model.named_modules():
        weights = [getattr(module, part, None) for part in ("gate_up_proj", "down_proj")]
        number = _LAYER.search(name)
        if number and all(isinstance(w, torch.nn.Parameter) and w.ndim == 3 for w in weights):
            if int(number[1]) in found:
                raise ValueError(f"{name}: a second module of experts in its layer")
            if hasattr(module, "down_proj_bias"):
                raise ValueError(f"{name} has biases, which are not simulated: benchmarks.gpt_oss")
            found[int(number[1])] = module
    if not found:
        raise ValueError(f"{type(model).__name__} has no modules of fused routed experts")
    return found


def own_experts(
    model: torch.nn.Module, gates: Gates, input_scale: float = 1.0
) -> dict[int, Experts]:
    """The unquantized experts of ``model``, by layer, with one input scale for all.

    Only for weights stored ``[out, in]``, as all but GPT-OSS's and a few others' are.
    """
    layers = {}
    for number, found in experts_of(model).items():
        module: Any = found
        gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
        if getattr(module, "is_transposed", False):
            raise ValueError(f"{type(module).__name__} stores its weights [in, out]")
        if gates.of(f"layers.{number}.").interleaved:
            gate_up = torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), dim=1)
        layers[number] = Experts(gate_up, down, torch.full((2, len(down)), input_scale))
    return layers


@contextmanager
def simulated(
    model: torch.nn.Module,
    layers: Mapping[int, Experts],
    gates: Gates,
    scales: str | None,
) -> Iterator[None]:
    """Within, the layers in ``layers`` compute with these experts; the others stay as they are.

    Raises:
        ValueError: if ``model`` has no experts, or other ones, in one of the layers.
    """
    modules = experts_of(model)
    replaced: list[Any] = []
    try:
        for number, experts in layers.items():
            module: Any = modules.get(number)
            if module is None:
                raise ValueError(f"layer {number} has no experts in {type(model).__name__}")
            own = module.down_proj
            if sorted(own.shape) != sorted(experts.down.shape) or len(own) != len(experts.down):
                raise ValueError(
                    f"layer {number}: experts {list(experts.down.shape)}, the model's are "
                    f"{list(own.shape)}"
                )
            gate = gates.of(f"layers.{number}.")
            module.forward = Simulated(experts, gate, scales, own.device, own.dtype)
            replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward
