"""KL over size: budgets of bits for the experts, ours beside ModelOpt's ``auto_quantize``.

    python -m benchmarks.bits SOURCE FOLDER [--budgets 4.5 5.2 ...] [--modelopt] [--rows 48]

FOLDER was made of SOURCE by ``nvfp4-moe quantize SOURCE FOLDER --bits 4.5 --calibrate TEXT``: all
its experts are NVFP4, and its report has each layer's loss in each format. What ``--bits`` writes
for another budget has the same tensors in the layers that stay NVFP4 (calibration gives each layer
what the unquantized model does). So for each budget those of FOLDER are taken, and experts in 8
bits are rounded here.

ModelOpt (``benchmarks.peers``) may choose among NVFP4, FP8 and bf16 for each layer's experts, and
everything else is disabled; ``effective_bits`` counts what is disabled too, so it is given the
budget that leaves the experts as much. KL and text are those of ``benchmarks.accuracy``:
**weights** alone, and **with activations** rounded as each layer's format has them. ModelOpt's FP8
has one scale for a tensor, ours for 128 x 128 weights, and here for a token.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import peers
from benchmarks.accuracy import BATCH, Bench, Figures
from benchmarks.simulate import EIGHT_BITS, SCALES, own_experts, simulated
from benchmarks.stored import Experts, read
from quantize.experts.names import layer_number
from quantize.layouts.base import BASES
from quantize.run.bits import BF16, NVFP4, choose
from quantize.run.report_files import REPORT_DATA

BUDGETS = (4.5, 5.21, 5.91, 6.61, 7.31, 8.01, 9.61, 11.21)
"""A layer of five more in 8 bits each, on m3-nano; then bf16."""


class Point(NamedTuple):
    """One budget of one tool; ``bits`` are those of the experts' weights that it took."""

    tool: str
    budget: float
    bits: float
    formats: dict[int, str]
    weights: Figures
    activations: Figures


def ours(bench: Bench, folder: Path, budgets: Sequence[float]) -> Iterator[Point]:
    """This package's points."""
    losses = json.loads((folder / REPORT_DATA).read_text())["bits"]["losses"]
    in_nvfp4, gates = read(folder)
    plain = own_experts(bench.model, bench.gates)
    counts = {
        prefix: plain[number].gate_up.numel() + plain[number].down.numel()
        for prefix in losses
        if (number := layer_number(prefix)) is not None
    }
    for budget in budgets:
        choice = choose(counts, losses, budget)
        formats = {layer_number(prefix) or 0: name for prefix, name in choice.formats.items()}
        layers = {n: in_nvfp4[n] for n, name in formats.items() if name == NVFP4}
        eight = {n: _rounded(plain[n], f) for n, f in formats.items() if f in BASES}

        def figures(inputs: bool, layers=layers, eight=eight) -> Figures:  # type: ignore[no-untyped-def]
            with ExitStack() as stack:
                for which, scales in ((layers, SCALES[0]), (eight, EIGHT_BITS)):
                    rounds = scales if inputs else None
                    stack.enter_context(simulated(bench.model, which, gates or bench.gates, rounds))
                return bench.figures(bench.model)

        yield Point("ours", budget, choice.taken, formats, figures(False), figures(True))


def _rounded(experts: Experts, name: str) -> Experts:
    """Experts in a format of 8 bits. Its blocks do not cross from gate to up."""
    base = BASES[name]

    def each(stack: torch.Tensor) -> torch.Tensor:
        return torch.stack([base.decode(*base.encode(weight)) for weight in stack])

    return Experts(each(experts.gate_up), each(experts.down), None)


def modelopt(bench: Bench, budgets: Sequence[float], rows: int, recipe: str) -> Iterator[Point]:
    """ModelOpt's points.

    Args:
        rows: of text to calibrate and to score with.
        recipe: its config for NVFP4.
    """
    peers.modelopt_version(bench.device)
    text = bench.calibration(rows)
    with tempfile.TemporaryDirectory(prefix="nvfp4-moe-bits-") as temporary:
        scores = Path(temporary, "scores.pth")
        for budget in budgets:
            model, chosen, bits = peers.auto_quantize(
                bench.load(), budget, text, recipe, scores, BATCH
            )
            formats = {layer_number(f"{name}.") or 0: kind for name, kind in chosen.items()}
            activations = bench.figures(model)
            peers.without_inputs(model)
            weights = bench.figures(model)
            yield Point(f"ModelOpt, {recipe}", budget, bits, formats, weights, activations)


def line(point: Point) -> str:
    """A row of the table, in Markdown."""
    others = [f"{n} {f}" for n, f in sorted(point.formats.items()) if f != NVFP4]
    kl = (f"{f.kl:.5f} ± {f.error:.5f}" for f in (point.weights, point.activations))
    return f"| {point.tool} | {point.bits:.2f} | {', '.join(others)} | {' | '.join(kl)} |"


def main() -> None:
    """Parse the arguments, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER")
    parser.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS))
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--modelopt", nargs="*", default=[], metavar="CFG", help="NVFP4 configs")
    parser.add_argument("--calibration-rows", type=int, default=128, help="for ModelOpt")
    args = parser.parse_args()
    bench = Bench(args.source, args.rows)
    print(f"| | bits | not {NVFP4} (else {BF16}) | KL, weights | KL, with activations |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    if args.folder:
        for point in ours(bench, args.folder, args.budgets):
            print(line(point), flush=True)
    for recipe in args.modelopt:
        try:
            for point in modelopt(bench, args.budgets, args.calibration_rows, recipe):
                print(line(point), flush=True)
        except peers.PeerError as error:
            print(f"{recipe}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
