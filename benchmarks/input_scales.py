"""What NVFP4 activations cost under each rule for their scales.

    python -m benchmarks.input_scales SOURCE [--rows 48] [--calibration-rows 32]

SOURCE, an unquantized checkpoint, is quantized by the rule ``mse``, with input scales by each of
``--input-scale-rule`` from rows of text. Then its experts' inputs are rounded as each kind of
kernels rounds them (``benchmarks.simulate``), on the text of ``benchmarks.accuracy``. The figure is
that bench's: mean KL to the unquantized model, in nats, with its standard error over rows.

"No room" is ``max`` without its factor of two, which is no rule of the command; with "1.0" nobody
has looked at any text. Two rules that differ in nothing that matters still differ by about 0.0003
on m3-nano, since another scale has other blocks rounded up.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.accuracy import Bench
from benchmarks.simulate import EIGHT_BITS, simulated, weights_in_e4m3
from benchmarks.stored import Experts, read
from quantize.calibration.samples import digest_of
from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.nvfp4.input_scales import INPUT_RULES
from quantize.nvfp4.input_scales.max import ROOM
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan

Layers = dict[int, Experts]
KERNELS = ("shared", "expert")
"""Of ``benchmarks.simulate.SCALES``: those that depend most on the checkpoint's input scales."""


def quantized(source: Path, target: Path, rule: str, rows: torch.Tensor) -> None:
    """Write ``source`` to ``target`` with the input scales that ``rule`` finds on ``rows``."""
    settings = Calibration("rows", *rows.shape, digest_of(rows), method=None, input_scale_rule=rule)
    with Checkpoint(source) as checkpoint:
        options = Options(scales="mse", activations=True, calibration=settings)
        execute(checkpoint, plan(checkpoint, options), target, samples=rows)


def scaled(layers: Layers, factor: float) -> Layers:
    """``layers`` with all input scales times ``factor``."""
    return {
        number: each._replace(input_scales=each.input_scales * factor)
        for number, each in layers.items()
        if each.input_scales is not None
    }


def lines(bench: Bench, rows: torch.Tensor, folder: Path) -> Iterator[str]:
    """The table's lines, in Markdown."""
    found: dict[str, Layers] = {}
    for rule in INPUT_RULES:
        quantized(bench.source, folder / rule, rule, rows)
        found[rule], _ = read(folder / rule)
    found = {"no room": scaled(found["max"], 1 / ROOM), **found}
    neutral = {
        number: each._replace(input_scales=torch.ones(2, len(each.down)))
        for number, each in found["max"].items()
    }

    def line(rule: str, kernels: str, layers: Layers, scales: str | None) -> str:
        with simulated(bench.model, layers, bench.gates, scales):
            figures = bench.figures(bench.model)
        return (
            f"| {rule} | {kernels} | {figures.kl:.5f} ± {figures.error:.5f} | {figures.top1:.1%} |"
        )

    yield "| input scales | kernels | KL, nats | top-1 |"
    yield "|" + " --- |" * 4
    yield line("-", "bf16", found["max"], None)
    in_e4m3, _ = read(folder / "max", weights_in_e4m3)
    yield line("-", EIGHT_BITS, in_e4m3, EIGHT_BITS)
    yield line("1.0", "shared", neutral, "shared")
    for kernels in KERNELS:
        for rule, layers in found.items():
            yield line(rule, kernels, layers, kernels)
    for kernels in ("four-six", "token", "token-four-six"):
        rule = "max" if kernels == "four-six" else "-"
        yield line(rule, kernels, found["max"], kernels)


def main() -> None:
    """Parse the arguments, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--calibration-rows", type=int, default=32)
    args = parser.parse_args()
    bench = Bench(args.source, args.rows)
    rows = torch.tensor(bench.calibration(args.calibration_rows))
    with tempfile.TemporaryDirectory(prefix="nvfp4-moe-input-scales-") as folder:
        for line in lines(bench, rows, Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
