"""Scale rules side by side: squared error, seconds and KL; those that papers propose as well.

    python -m benchmarks.scale_rules [SOURCE ...] [--rows 48] [--device cuda] [--repeats 10]

Without SOURCE: each rule's error and rate on a random weight of MiniMax-M3's sizes, all in one
process, in turn, the best of ``--repeats`` rounds. Of each SOURCE, an unquantized checkpoint: the
mean of its experts' relative squared errors and, by ``benchmarks.accuracy``, the KL to bf16 of
weights alone and with rounded activations. Nothing is calibrated.

Beside the package's rules there are

* ``sweep-17``: what ``mse`` did before its bounds were known, 8 scales on either side of ``max``'s;
* ``sweep-126``: all of E4M3;
* ``four-six-256``: four-over-six with the global scale of its authors' code, amax / (6 * 256). It
  leaves room for 4 in a weight's largest block too (arXiv 2512.02010). ``max-256`` and ``mse-256``
  have the same one;
* ``joint-N``: ``mse`` with the best of N global scales within a factor of two;
* ``least-squares``: ``mse``, and then in turn the global scale that is best for codes and block
  scales, in closed form, and ``mse`` again, four times. This is SOAR's joint optimization (arXiv
  2605.12245). Its other half, codes that are rounded by another scale than the one they are
  multiplied by, cannot lower the squared error: with a scale given, rounding to nearest is best.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import accuracy
from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.nvfp4.format import global_scale_of
from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.kernels.kernel import quantize_weights
from quantize.nvfp4.scales import RULES
from quantize.nvfp4.scales.four_six import FOUR_SIX
from quantize.nvfp4.scales.max import MAX
from quantize.nvfp4.scales.mse import MSE
from quantize.nvfp4.scales.rule import Reach
from quantize.report.data import loads
from quantize.run.options import Options
from quantize.run.plan import plan
from quantize.run.report_files import REPORT_DATA

ROWS, COLUMNS = 3072, 6144
"""One projection of an expert of MiniMax-M3."""
ALTERNATIONS = 4
PROPOSED = {
    "sweep-17": "SWEEP_17",
    "sweep-126": "SWEEP_126",
    "max-256": "MAX_256",
    "four-six-256": "FOUR_SIX_256",
    "mse-256": "MSE_256",
    "joint-4": "JOINT_4",
    "joint-16": "JOINT_16",
    "least-squares": "LEAST_SQUARES",
}


def _roomy(amax: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return global_scale_of(amax * 1.75)  # 448 / 256


def _noise(weights: Sequence[torch.Tensor], scale: torch.Tensor) -> float:
    kernel = for_device(weights[0].device)
    return sum(kernel.encode(weight, scale, MSE).noise for weight in weights)


def _joint(amax: torch.Tensor, weights: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    tried = [global_scale_of(amax) * 2 ** (k / count) for k in range(count)]
    return min(tried, key=lambda scale: _noise(weights, scale)) if amax > 0 else tried[0]


def _least_squares(amax: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    scale = global_scale_of(amax)
    kernel = for_device(weights[0].device)
    for _ in range(ALTERNATIONS if amax > 0 else 0):
        products = squares = 0.0
        for weight in weights:
            restored = kernel.encode(weight, scale, MSE).weight.dequantize().double()
            products += float((restored * weight.double()).sum())
            squares += float(restored.square().sum())
        scale = scale * (products / squares)
    return scale


SWEEP_17 = replace(MSE, reach=Reach(8, 8))
SWEEP_126 = replace(MSE, reach=Reach(126, 126))
MAX_256, FOUR_SIX_256, MSE_256 = (
    replace(rule, global_scale=_roomy) for rule in (MAX, FOUR_SIX, MSE)
)
JOINT_4, JOINT_16 = (replace(MSE, global_scale=partial(_joint, count=count)) for count in (4, 16))
LEAST_SQUARES = replace(MSE, global_scale=_least_squares)


class Row(NamedTuple):
    """Squared error as a share of the weights' squares, and how long one weight took."""

    error: float
    seconds: float


def of_a_weight(weight: torch.Tensor, repeats: int) -> dict[str, Row]:
    """Each rule's row for one weight, on its device."""
    kernel = for_device(weight.device)
    seconds = dict.fromkeys(RULES, float("inf"))
    errors = {}
    for _ in range(repeats + 1):  # the first round compiles
        for name in RULES:
            if weight.is_cuda:
                torch.cuda.synchronize(weight.device)
            start = time.perf_counter()
            [result] = quantize_weights([weight], name, kernel)
            if weight.is_cuda:
                torch.cuda.synchronize(weight.device)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
            errors[name] = result.noise / result.signal
    return {name: Row(errors[name], seconds[name]) for name in RULES}


def of_a_checkpoint(source: Path, rules: Sequence[str], rows: int, device: str) -> None:
    """Print a line a rule, as soon as it is known."""
    bench = accuracy.Bench(source, rows, device)
    print(f"| {source.name} | squared error | KL, weights | KL, with activations | top-1 |")
    print("| --- | --- | --- | --- | --- |")
    for name in rules:
        with tempfile.TemporaryDirectory(prefix="nvfp4-moe-scales-") as folder:
            with Checkpoint(source) as checkpoint:
                options = Options(scales=name, activations=True)
                execute(checkpoint, plan(checkpoint, options), Path(folder))
            row = bench.folder(name, Path(folder))
            layers = loads((Path(folder) / REPORT_DATA).read_bytes()).layers
        errors = torch.tensor([errors for layer in layers for errors in layer.errors])
        assert row.weights and row.activations, row.why
        print(
            f"| `{name}` | {errors.square().mean():.6f} "
            f"| {row.weights.kl:.5f} ± {row.weights.error:.5f} "
            f"| {row.activations.kl:.5f} ± {row.activations.error:.5f} | {row.weights.top1:.1%} |",
            flush=True,
        )


def main() -> None:
    """Parse the arguments, measure, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    RULES._places.update({k: f"benchmarks.scale_rules:{v}" for k, v in PROPOSED.items()})
    parser.add_argument("sources", type=Path, nargs="*", metavar="SOURCE")
    parser.add_argument("--rules", nargs="*", default=[*RULES], choices=[*RULES])
    parser.add_argument("--rows", type=int, default=48, help="of held-out text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    for source in args.sources:
        of_a_checkpoint(source, args.rules, args.rows, args.device)
    if not args.sources:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(ROWS, COLUMNS, generator=generator).mul(0.02).bfloat16()
        print("| one weight | squared error | ms | GB/s of bf16 |\n| --- | --- | --- | --- |")
        for name, row in of_a_weight(weight.to(args.device), args.repeats).items():
            rate = weight.nbytes / row.seconds / 1e9
            print(f"| `{name}` | {row.error:.6f} | {row.seconds * 1e3:.2f} | {rate:.2f} |")
    name = torch.cuda.get_device_name(args.device) if "cuda" in args.device else args.device
    print(f"\n{name}, torch {torch.__version__}, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
