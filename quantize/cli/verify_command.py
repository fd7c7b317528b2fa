"""``nvfp4-moe verify``: compares a quantized checkpoint with what it was made of."""

from __future__ import annotations

import typer

from quantize.checkpoint.hub import resolve
from quantize.cli.errors import reporting_errors
from quantize.cli.large_imports import large_imports
from quantize.cli.options import GateOption, JsonOption, Source, Target, TrustOption, stated_gate
from quantize.cli.output import complain, out, plain, print_json, progress_bar, table


def verify(
    source: Source,
    target: Target,
    gate: GateOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Reread SRC and DST; print each layer's error; exit 1 if anything is missing or wrong."""
    with reporting_errors():
        stated = stated_gate(gate)
        folder = resolve(source)
        with large_imports():
            from quantize.checkpoint.reader import Checkpoint
            from quantize.verify import verify as compare

        with Checkpoint(folder) as original, Checkpoint(target, decode=False) as quantized:
            with progress_bar("Verifying", original.nbytes) as bar:
                report = compare(
                    original, quantized, stated, bar.advance, trust_remote_code=trust_remote_code
                )
            if as_json:
                print_json(report.as_json())
            else:
                layers = table(
                    f"{target} against {source}", "experts", "relative error", "SQNR (dB)"
                )
                for layer in report.layers:
                    layers.add_row(
                        plain(layer.prefix), f"{layer.relative:.4f}", f"{layer.sqnr:.2f}"
                    )
                out.print(layers)
            for problem in report.problems:
                complain("problem", problem)
            if report.problems:
                raise typer.Exit(1)
            if not as_json:
                out.print("No problems found.")
