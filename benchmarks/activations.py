"""What rounded activations cost, and what could take it off without another kernel.

    python -m benchmarks.activations SOURCE [--rows 64] [--length 512]

FP4 kernels round the inputs of an expert's two products to NVFP4, weights being what they may. To
first order that costs the mean of ``(g . n)^2`` over tokens, ``n`` being what an input loses and
``g`` the loss's gradient by it. By layer, relative to that, what remains of it

* **scaled**: if the first product's inputs are scaled a channel each, and gate and up the other way
  round, which could be folded into the norm before them, the router and the shared experts. The
  scales are the best for errors that are as large for a block's every channel: the square root of
  an input's standard deviation over its gradient's.
* **rotated**: if they are rotated, by a random orthogonal matrix.
* **weights, first / second**: if the product's weights are those, of all floating-point numbers,
  that are best for rounded inputs: least squares over one half of the tokens, drawn towards the
  weights themselves by as much as is best for the other half, which is measured. What calibration
  could do for rounded inputs is less.

The text is Python's standard library without the held-out third. Everything is in float32.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer

from examples.perplexity import cut, standard_library, token_stream
from quantize.calibration.backward import LayerwiseBackward
from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.layerwise import LayerwiseModel
from quantize.calibration.routing import Routing
from quantize.calibration.store import Store
from quantize.calibration.visitor import NullVisitor, Visitor
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.find import find
from quantize.experts.group import ExpertGroup
from quantize.experts.identify import identify
from quantize.nvfp4.activations import round_nvfp4
from quantize.nvfp4.format import E2M1_MAX, E4M3_MAX

PRIORS = (1e-4, 1e-2, 1e-1, 1.0)
"""Of the inputs' mean square: how firmly the best weights are drawn towards those there are."""


class Remains(NamedTuple):
    """See the module's docstring; ``noise`` is what is lost, relative to the inputs' squares."""

    noise: float
    scaled: float
    rotated: float
    first: float
    second: float


def rounded(x: torch.Tensor) -> torch.Tensor:
    """``[tokens, n]`` as kernels see it, with an input scale from its largest magnitude."""
    scale = x.abs().amax() / (E2M1_MAX * E4M3_MAX)
    return round_nvfp4(x.contiguous(), scale.clamp_min(torch.finfo(torch.float32).tiny))


def cost(noise: torch.Tensor, gradient: torch.Tensor) -> float:
    """Mean of ``(g . n)^2`` over tokens, both ``[tokens, n]``."""
    return float((noise * gradient).sum(1).double().square().mean())


def scaled(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """What ``x`` loses if its channels are scaled for the gradients."""
    tiny = torch.finfo(torch.float32).tiny
    spread, slope = (each.square().mean(0).sqrt().clamp_min(tiny) for each in (x, gradient))
    scale = (spread / slope).sqrt()
    return rounded(x / scale) * scale - x


def rotated(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """What ``x`` loses if it is rotated."""
    generator = torch.Generator().manual_seed(seed)
    size = x.shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    return rounded(x @ rotation) @ rotation.T - x


def best_weights(
    x: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor
) -> tuple[float, float]:
    """What rounding ``x`` costs in the second half of the tokens: with ``weight`` ``[out, in]``,
    and with the least-squares weights of the first half. ``gradient``: by outputs."""
    given, half = rounded(x), len(x) // 2
    before, after = (slice(half), slice(half, None))
    hessian = (given[before].T @ given[before]).double()
    lost = (weight @ ((x - given)[before].T @ given[before])).double()
    truth = x[after] @ weight.T
    costs = [cost(given[after] @ weight.T - truth, gradient[after])]
    for share in PRIORS:
        drawn = hessian + share * hessian.diagonal().mean() * torch.eye(len(hessian))
        better = weight + torch.linalg.solve(drawn, lost.T).T.float()
        costs.append(cost(given[after] @ better.T - truth, gradient[after]))
    return costs[0], min(costs[1:])


class Remainder(NullVisitor):
    """A visitor in the backward pass; :attr:`found` is by layer."""

    def __init__(self) -> None:
        self.found: dict[int, Remains] = {}

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        self._layer, self._x = layer, routing.x.float()
        self._by_x = torch.zeros_like(self._x)
        self._products: list[tuple[tuple[float, float], tuple[float, float]]] = []

    def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
        chunks = list(routing.of(number))
        if not chunks:
            return weights
        x = torch.cat([chunk.x for chunk in chunks]).float()
        outputs = [c.gradient * c.weights.unsqueeze(1) for c in chunks if c.gradient is not None]
        by_output = torch.cat(outputs).float()
        gate_up = torch.cat([each.float() for each in weights.gate_up])
        slopes = torch.cat(weights.gate_up_gradients(x, by_output), 1)
        self._by_x.index_add_(0, torch.cat([chunk.tokens for chunk in chunks]), slopes @ gate_up)
        if len(x) >= 4 * x.shape[1]:  # fewer say nothing about the best weights
            first = best_weights(x, slopes, gate_up)
            second = best_weights(weights.intermediate(x), by_output, weights.down.float())
            self._products.append((first, second))
        return weights

    def end(self) -> None:
        x, by_x = self._x, self._by_x
        lost = rounded(x) - x
        plain = cost(lost, by_x)
        parts = []
        for which in range(2):
            costs = [product[which] for product in self._products]
            parts.append(sum(best for _, best in costs) / max(sum(p for p, _ in costs), 1e-300))
        self.found[self._layer] = Remains(
            float(lost.square().sum() / x.square().sum()),
            cost(scaled(x, by_x), by_x) / plain,
            cost(rotated(x), by_x) / plain,
            parts[0] if self._products else float("nan"),
            parts[1] if self._products else float("nan"),
        )


def measure(source: Path, rows: torch.Tensor) -> dict[int, Remains]:
    """By layer, on tokens ``[num_samples, sequence_length]``."""
    visitor = Remainder()
    with tempfile.TemporaryDirectory(prefix="nvfp4-moe-") as folder:
        forward_backward(source, Store(Path(folder)), rows, visitor)
    return visitor.found


def forward_backward(
    source: Path,
    store: Store,
    rows: torch.Tensor,
    visitor: Visitor,
    dtype: torch.dtype = torch.float32,
) -> LayerwiseModel:
    """Show ``visitor`` all experts in the backward pass of a run that is not interrupted."""
    with Checkpoint(source) as checkpoint:
        groups = find(checkpoint)
        model = LayerwiseModel(checkpoint, groups, torch.device("cpu"), dtype)
        run = LayerwiseBackward(checkpoint, identify(source), model, rows, store)
        run.check()
        for layer in range(run.last + 1):
            run.layer_forward(layer, NullVisitor())
        run.end_backward()
        first = min(map(model.layer_of, groups))
        for layer in reversed(range(first, run.last + 1)):
            run.layer_backward(layer, visitor, layer > first)
            run.remove_states(layer + 1)
            run.remove_gradients(layer + 1)
    return model


def table(found: dict[int, Remains]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| layer | noise | scaled | rotated | weights, first | weights, second |"
    yield "|" + " --- |" * 6
    for layer, remains in sorted(found.items()):
        noise, *rest = remains
        yield f"| {layer} | {noise:.5f} | " + " | ".join(f"{each:.3f}" for each in rest) + " |"


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    training, _ = standard_library()
    stream = token_stream(AutoTokenizer.from_pretrained(args.source), training)
    rows = torch.tensor(list(islice(cut(stream, args.length), args.rows)))
    print("\n".join(table(measure(args.source, rows))))


if __name__ == "__main__":
    main()
