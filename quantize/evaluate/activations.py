"""What goes into the products of quantized experts, rounded as kernels round it.

* ``nvfp4``: as kernels with 4-bit activations do. A checkpoint has an input scale for each expert
  and projection. Kernels get one for each of a layer's two products: the largest of all its
  experts, gate and up counting as one. So vLLM's emulation and FlashInfer's kernels have it (vLLM
  0.32, ``fused_moe/oracle/nvfp4.py``: ``convert_to_nvfp4_moe_kernel_format``). vLLM's CUTLASS
  kernel and b12x take each expert's own. Experts of other layers that are FP8 or MXFP8 get their
  inputs rounded as kernels for these do, with a scale for each token and 128 or 32 inputs;
* ``fp8``: E4M3, with a scale for each token: its largest magnitude over 448;
* ``bf16``: not at all. So do weight-only kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.routing import Routing
from quantize.calibration.visitor import NullVisitor
from quantize.checkpoint.descriptions import descriptions
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.layouts import detect
from quantize.layouts.base import BASES
from quantize.layouts.stated import stays_float
from quantize.nvfp4.activations import round_nvfp4, round_rows_e4m3

NVFP4, FP8, BF16 = "nvfp4", "fp8", "bf16"

Round = Callable[[torch.Tensor], torch.Tensor]
"""Rounds ``[tokens, n]``, in its dtype."""


def stated(checkpoint: Checkpoint, groups: list[ExpertGroup]) -> str:
    """What a checkpoint says of activations at its experts: ``nvfp4`` or ``bf16``.

    It is ``bf16`` where the config says that weights alone are quantized, or no expert in NVFP4 has
    an input scale.
    """
    for _, value in descriptions(checkpoint.config):
        layout = detect(value) if isinstance(value, dict) else None
        if layout is not None and layout is layout.weights_only:
            return BF16
    scaled = any(map(checkpoint.has_input_scale, _weights(groups)))
    return NVFP4 if scaled else BF16


def check_has_scales(checkpoint: Checkpoint, groups: list[ExpertGroup]) -> None:
    """See that ``nvfp4`` is possible.

    Raises:
        QuantizeError: naming a weight without an input scale; or if no expert is in NVFP4.
    """
    nvfp4 = [name for name in _weights(groups) if checkpoint.is_nvfp4(name)]
    if not nvfp4:
        raise QuantizeError(
            f"{checkpoint.folder}: no expert is in NVFP4, so there is nothing that --activations "
            "nvfp4 rounds; leave it out"
        )
    scaled = set(filter(checkpoint.has_input_scale, nvfp4))
    for name in nvfp4:
        module = name.removesuffix(".weight")
        # Some layers' inputs may be left as they are, but then not those of all.
        if name not in scaled and not (scaled and stays_float(checkpoint.config, module)):
            file = min(checkpoint.files_of([name]))
            raise QuantizeError(
                f"{checkpoint.folder / file}: {name} has no input scale, and --activations nvfp4 "
                "rounds by it; take --activations bf16, or quantize with --input-scales"
            )


class RoundedInputs(ExpertWeights):
    """An expert the inputs of whose two products are rounded.

    Args:
        of_input: rounds the inputs of gate and up.
        of_intermediate: rounds the inputs of down.
    """

    def __init__(self, weights: ExpertWeights, of_input: Round, of_intermediate: Round) -> None:
        self.__dict__.update(weights.__dict__)
        self._of_input = of_input
        self._of_intermediate = of_intermediate

    def intermediate(self, x: torch.Tensor, gate_up: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
        return super().intermediate(self._of_input(x), gate_up)

    def output(self, intermediate: torch.Tensor) -> torch.Tensor:
        return super().output(self._of_intermediate(intermediate))


class Nvfp4Inputs(NullVisitor):
    """A visitor that rounds the inputs of experts in NVFP4 with input scales, and in 8 bits."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        """Read the layer's input scales.

        Raises:
            QuantizeError: if one is not finite and positive.
        """
        self._group = group
        pairs = [self._scales(expert) for expert in range(group.num_experts)]
        self._rounded = [pair is not None for pair in pairs]
        known = [torch.stack(pair) for pair in pairs if pair is not None]
        self._rounds = [
            partial(_round_nvfp4, scale) for scale in (torch.stack(known).amax(0) if known else ())
        ]

    def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
        """Return the expert with its inputs rounded."""
        if self._rounded[number]:
            return RoundedInputs(weights, *self._rounds)
        base = BASES.get(str(self._checkpoint.format_of(self._group.weights_of(number)[0])))
        if base is None or not all(base.fits(*shape) for shape in self._group.shapes):
            return weights
        return RoundedInputs(weights, base.round_inputs, base.round_inputs)

    def _scales(self, expert: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The input scales of gate and up together, and of down; None if one is missing."""
        *first, down = self._group.weights_of(expert)
        which = expert if self._group.fused else None
        found = []
        for name in (*first, down):
            scale = self._checkpoint.input_scale(name, which)
            if scale is None:
                return None
            if not (torch.isfinite(scale) and scale > 0):
                file = min(self._checkpoint.files_of([name]))
                raise QuantizeError(
                    f"{self._checkpoint.folder / file}: the input scale of {name} is "
                    f"{float(scale):g}; kernels with 4-bit activations make zeros or NaN of that; "
                    "quantize again, or take --activations bf16"
                )
            found.append(scale)
        return torch.stack(found[:-1]).amax(), found[-1]


class Fp8Inputs(NullVisitor):
    """A visitor that rounds the inputs of quantized experts to E4M3, with a scale a token."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        """Remember which experts come."""
        self._group = group

    def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
        """Return the expert with its inputs rounded."""
        if all(len(self._checkpoint.parts(n)) == 1 for n in self._group.weights_of(number)):
            return weights
        return RoundedInputs(weights, round_rows_e4m3, round_rows_e4m3)


def visitor_of(activations: str, checkpoint: Checkpoint) -> NullVisitor:
    """The visitor that rounds as ``activations`` say."""
    if activations == NVFP4:
        return Nvfp4Inputs(checkpoint)
    return Fp8Inputs(checkpoint) if activations == FP8 else NullVisitor()


def _round_nvfp4(input_scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return round_nvfp4(x, input_scale.to(x.device))


def _weights(groups: list[ExpertGroup]) -> list[str]:
    """Names of all weights of experts, without biases."""
    every = (g.weights_of(expert) for g in groups for expert in range(g.num_experts))
    return list(dict.fromkeys(name for names in every for name in names))
