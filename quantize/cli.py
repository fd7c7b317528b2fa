"""The command ``nvfp4-moe``: parses, calls, prints; nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from quantize import inspection
from quantize.checkpoint import Checkpoint, resolve
from quantize.errors import QuantizeError
from quantize.gates import Gate
from quantize.layouts import LAYOUTS
from quantize.pipeline import Plan, execute, plan
from quantize.scales import RULES
from quantize.shards import parse_size
from quantize.verify import verify as verify_checkpoint

# Choices come from the registries; mypy can only follow enums that are written out.
LayoutName = StrEnum("LayoutName", dict(zip(LAYOUTS, LAYOUTS, strict=True)))  # type: ignore[misc]
RuleName = StrEnum("RuleName", dict(zip(RULES, RULES, strict=True)))  # type: ignore[misc]

MODELOPT, MAX = LayoutName("modelopt"), RuleName("max")

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="Folder or hub id of the original checkpoint.")
]
Target = Annotated[Path, typer.Argument(metavar="DST", help="Folder for the quantized checkpoint.")]
GateOption = Annotated[
    str | None,
    typer.Option(
        "--gate",
        metavar="GATE",
        help="The experts' gate, for models that Transformers does not know: silu, gelu, "
        'gelu_tanh, or JSON such as {"form": "swiglu_oai", "alpha": 1.702, "beta": 1, "limit": 7}.',
    ),
]
LayoutOption = Annotated[LayoutName, typer.Option(help="How tensors are named on disk.")]

app = typer.Typer(
    name="nvfp4-moe",
    help="Quantize the routed experts of mixture-of-experts checkpoints to NVFP4.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)


@app.command()
def quantize(
    source: Source,
    target: Target,
    layout: LayoutOption = MODELOPT,
    scales: Annotated[
        RuleName, typer.Option(help="How block scales are chosen; mse is slower and closer.")
    ] = MAX,
    max_shard_size: Annotated[str, typer.Option(help="Largest output file.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint in a non-empty DST.")
    ] = False,
    gate: GateOption = None,
) -> None:
    """Write SRC to DST with its routed experts in NVFP4, everything else byte for byte."""
    with _reporting_errors(), Checkpoint(resolve(source)) as checkpoint:
        size = parse_size(max_shard_size)
        steps = plan(checkpoint, layout.value, scales.value, size, _gate(gate))
        err.print(_summary(steps))
        with _progress("Quantizing", checkpoint.nbytes) as advance:
            done = execute(checkpoint, steps, target, overwrite, advance)
        out.print(
            f"{escape(str(target))}: {decimal(done.bytes_before)} -> {decimal(done.bytes_after)} "
            f"in {done.shards} file{'s' * (done.shards > 1)}, {done.seconds:.1f} s, "
            f"{done.bytes_before / done.seconds / 1e9:.2f} GB/s",
            soft_wrap=True,
            highlight=False,
        )


@app.command()
def inspect(source: Source, layout: LayoutOption = MODELOPT, gate: GateOption = None) -> None:
    """Show what SRC's routed experts are, their gate, and what quantizing would save."""
    with _reporting_errors(), Checkpoint(resolve(source)) as checkpoint:
        steps = plan(checkpoint, layout.value, gate=_gate(gate))
        table = _table(
            f"Routed experts of {source}",
            *("experts", "layers", "per layer", "hidden", "intermediate", "now", "NVFP4"),
        )
        table.caption = f"gate: {steps.gate}"
        for row in inspection.expert_rows(checkpoint, steps):
            table.add_row(
                escape(row.pattern),
                *map(str, (row.layers, row.experts, row.hidden, row.intermediate)),
                decimal(row.bytes_now),
                decimal(row.bytes_after),
            )
        out.print(table)
        stays = _table("Stays as it is", "tensors", "count", "dtype", "bytes")
        for other in inspection.other_rows(checkpoint, steps):
            stays.add_row(
                escape(other.pattern), str(other.count), other.dtype, decimal(other.nbytes)
            )
        out.print(stays)
        out.print(f"Whole checkpoint: {decimal(checkpoint.nbytes)} -> {decimal(steps.nbytes)}")


@app.command()
def verify(source: Source, target: Target, gate: GateOption = None) -> None:
    """Reread SRC and DST; print each layer's error; exit 1 if anything is missing or wrong."""
    with (
        _reporting_errors(),
        Checkpoint(resolve(source)) as original,
        Checkpoint(target) as quantized,
    ):
        with _progress("Verifying", original.nbytes) as advance:
            report = verify_checkpoint(original, quantized, _gate(gate), advance)
        table = _table(f"{target} against {source}", "experts", "relative error", "SQNR (dB)")
        for layer in report.layers:
            table.add_row(escape(layer.prefix), f"{layer.relative:.4f}", f"{layer.sqnr:.2f}")
        out.print(table)
        for problem in report.problems:
            _complain("problem", problem)
        if report.problems:
            raise typer.Exit(1)
        out.print("No problems found.")


def main() -> None:
    """Entry point of the console script."""
    app()


def _gate(text: str | None) -> Gate | None:
    if text is None:
        return None
    try:
        fields = json.loads(text) if text.lstrip().startswith("{") else {"form": text}
        return Gate(**fields)
    except (ValueError, TypeError) as error:
        raise QuantizeError(
            f"--gate {text!r} is neither a form's name nor its JSON: {error}"
        ) from None


def _summary(steps: Plan) -> str:
    experts = sum(g.num_experts for g in steps.groups)
    return f"{len(steps.groups)} MoE layers, {experts} experts, gate {steps.gate}"


def _table(title: str, first: str, *others: str) -> Table:
    """Names in the first column, figures in the others; nothing is cut off."""
    table = Table(title=escape(title))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _complain(kind: str, text: str) -> None:
    err.print(f"[red]{kind}:[/]", escape(text), soft_wrap=True, highlight=False)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed or 0
        return Text(f"{speed / 1e9:.2f} GB/s")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn(what),
        BarColumn(),
        TaskProgressColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task(what, total=total)
        yield lambda nbytes: progress.advance(task, nbytes)


@contextmanager
def _reporting_errors() -> Iterator[None]:
    try:
        yield
    except QuantizeError as error:
        _complain("error", str(error))
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain("error", f"{where}{error.strerror or error}")
        sys.exit(1)
