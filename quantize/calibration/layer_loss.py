"""What each layer's experts lose in each format that they may have, by the loss's gradients.

To second order, the divergence of the changed model's predictions from the original's is half of
the error's square in the metric of the Fisher information (``quantize.calibration.backward``). The
error is that of what a layer's experts add up to, ``d[t]`` at token ``t``. With ``g[t]``, the
gradient there of the loss of tokens that the model itself predicts, a layer costs

    mean over tokens t of (g[t] . d[t]) ** 2 / 2    nats a token.

Errors at different tokens count as independent. With the products of all pairs of a text's tokens
the estimate's error is several times as large, and its mean was the same where it was measured.

Outputs are really computed, from rounded weights and from inputs that are rounded as the format's
kernels do. NVFP4 is rounded to nearest here: calibration makes all layers' losses smaller, by about
the same factor. Losses of layers add up as far as they are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from quantize.calibration.damaged import OF_TEXT, damaged
from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.routing import Routing
from quantize.calibration.visitor import NullVisitor
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.group import ExpertGroup
from quantize.layouts.base import BASES
from quantize.nvfp4.activations import round_nvfp4
from quantize.nvfp4.input_scales import INPUT_RULES
from quantize.nvfp4.input_scales.magnitudes import Magnitudes
from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.kernels.kernel import NotFiniteError, quantize_weights
from quantize.run.bits import BF16, NVFP4, WEIGHTS
from quantize.run.group_files import GroupFiles

Round = Callable[[torch.Tensor], torch.Tensor]


class StoredLosses(GroupFiles[dict[str, float]]):
    """The losses in one folder, nats a token, by the format's name."""

    kind = "loss"
    key = "losses"

    def parse(self, group: ExpertGroup, value: Any) -> dict[str, float]:
        """See :class:`GroupFiles`."""
        losses = {str(name): float(loss) for name, loss in value.items()}
        if not losses or not all(math.isfinite(loss) and loss >= 0 for loss in losses.values()):
            raise ValueError("a loss that is not a number")
        return losses


class LossGatherer(NullVisitor):
    """A visitor (``quantize.calibration.visitor``) that finds the losses of layers' experts. The
    pass must know gradients.

    Args:
        formats: those that each layer may have, by its prefix (``quantize.run.bits.formats_of``).
        groups: the experts whose losses are wanted; it lets others pass.
        rule: the scale rule of NVFP4.
        inputs: the rule for input scales by which kernels of NVFP4 layers round inputs too, one of
            ``INPUT_RULES``; None: they do not. Those of 8 bits always do.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kept: StoredLosses,
        formats: dict[str, list[str]],
        groups: list[ExpertGroup],
        rule: str,
        inputs: str | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._kept = kept
        self._formats = formats
        self._groups = groups
        self._rule = rule
        self._inputs = inputs

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        """Prepare for the group's experts."""
        self._group = group if group in self._groups else None
        if self._group is not None:
            names = [name for name in self._formats[group.prefix] if name != BF16]
            self._products = {
                name: torch.zeros(len(routing.x), dtype=torch.float64) for name in names
            }

    def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
        """Add what one expert's errors do to the loss.

        Raises:
            DamagedWeightsError: if a weight is NaN or infinite, or an output is.
        """
        if self._group is None:
            return weights
        try:
            variants = self._variants(weights)
        except NotFiniteError:
            raise damaged(self._checkpoint, self._group, number) from None
        for chunk in routing.of(number):
            assert chunk.gradient is not None
            output = weights.output(weights.intermediate(chunk.x))
            gradient = chunk.gradient * chunk.weights.unsqueeze(1)
            for name, (changed, rounds) in variants.items():
                intermediate = changed.intermediate(rounds(chunk.x))
                error = changed.output(rounds(intermediate)).float() - output.float()
                product = (error * gradient).sum(1)
                if not torch.isfinite(product).all():
                    raise damaged(self._checkpoint, self._group, number, OF_TEXT)
                self._products[name].index_add_(0, chunk.tokens, product.double().cpu())
        return weights

    def end(self) -> None:
        """Keep the layer's losses."""
        if self._group is not None:
            losses = {n: float(p.square().mean()) / 2 for n, p in self._products.items()}
            self._kept.write(self._group, losses | {BF16: 0.0})

    def _variants(self, weights: ExpertWeights) -> dict[str, tuple[ExpertWeights, Round]]:
        found = {name: self._rounded(name, weights) for name in self._products if name != WEIGHTS}
        if WEIGHTS in self._products:
            found[WEIGHTS] = found[NVFP4][0], lambda x: x
        return found

    def _rounded(self, name: str, weights: ExpertWeights) -> tuple[ExpertWeights, Round]:
        """The expert with its weights in a format, and what the format's kernels do to inputs."""
        if name == NVFP4:
            kernel = for_device(weights.down.device)

            def in_nvfp4(which: list[torch.Tensor]) -> list[torch.Tensor]:
                found = quantize_weights(which, self._rule, kernel)
                return [one.weight.dequantize() for one in found]

            gate_up, (down,) = in_nvfp4(list(weights.gate_up)), in_nvfp4([weights.down])
            return weights.replaced(tuple(gate_up), down), self._in_nvfp4
        base = BASES[name]
        *gate_up, down = (
            base.decode(*base.encode(weight)) for weight in (*weights.gate_up, weights.down)
        )
        return weights.replaced(tuple(gate_up), down), base.round_inputs

    def _in_nvfp4(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs as kernels round them with the scale that calibration would give them."""
        if self._inputs is None:
            return x
        magnitudes = Magnitudes()
        magnitudes.add(x)
        scale = INPUT_RULES[self._inputs](magnitudes)
        return round_nvfp4(x, torch.tensor(scale, device=x.device))
