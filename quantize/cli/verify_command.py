"""``nvfp4-moe verify``: checks a quantized checkpoint, beside what it was made of or alone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from quantize.checkpoint.hub import resolve
from quantize.cli.errors import UsageError, reporting_errors
from quantize.cli.large_imports import large_imports
from quantize.cli.options import (
    GateOption,
    JsonOption,
    LogOption,
    QuietOption,
    TrustOption,
    stated_gate,
)
from quantize.cli.output import complain, err, out, plain, print_json, table
from quantize.cli.progress import downloading, progress_bar
from quantize.cli.signals import ending_at_once
from quantize.cli.source_options import RevisionOption, revision_for


def verify(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="Folder or hub id of the original checkpoint; may be left out."
        ),
    ],
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="DST", help="Folder of the quantized checkpoint.", show_default=False
        ),
    ] = None,
    revision: RevisionOption = None,
    gate: GateOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    log_file: LogOption = None,
    quiet: QuietOption = False,
) -> None:
    """Check DST beside SRC: every tensor, every config, every file; exit 1 if anything is missing
    or wrong. With DST alone, check that its parts fit together."""
    apart = [Path(source), *([target] if target else [])]
    with reporting_errors(quiet=quiet, log_file=log_file, apart=apart):
        stated = stated_gate(gate)
        folder = None
        if target is not None:
            with ending_at_once():
                folder = resolve(source, revision_for(source, target, revision), downloading)
        elif revision is not None:
            raise UsageError("--revision is SRC's, and only DST is given; leave it out")
        with large_imports():
            from quantize.checkpoint.reader import Checkpoint
            from quantize.verify import verify as compare

        with ExitStack() as stack:
            original = stack.enter_context(Checkpoint(folder)) if folder is not None else None
            checked = Path(source).expanduser() if target is None else target
            quantized = stack.enter_context(Checkpoint(checked, decode=False))
            nbytes = (original or quantized).nbytes
            with progress_bar("Verifying", nbytes) as bar:
                bar.advance(0)
                report = compare(original, quantized, stated, bar.advance, trust_remote_code)
            if as_json:
                print_json(report.as_json())
            elif report.layers:
                layers = table(
                    f"{checked} against {source}", "experts", "relative error", "SQNR (dB)"
                )
                layers.add_column("worst weight, and its worst block", overflow="fold")
                for layer in report.layers:
                    layers.add_row(
                        plain(layer.prefix),
                        f"{layer.relative:.4f}",
                        f"{layer.sqnr:.2f}",
                        plain(str(layer.worst or "").removeprefix(f"{layer.prefix}.")),
                    )
                out.print(layers)
            for note in report.notes:
                err.print("note:", plain(note), soft_wrap=True, highlight=False)
            for problem in report.problems:
                complain("problem", problem)
            if report.problems:
                raise typer.Exit(1)
            if not as_json:
                out.print("No problems found.")
