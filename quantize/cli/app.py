"""The command ``nvfp4-moe``: parses, calls, prints; nothing else.

Exit codes: 0 for success, 1 for an error (or problems that ``verify`` found), 2 for wrong usage,
130 when interrupted.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from quantize import inspection
from quantize.calibration.budget import needed
from quantize.calibration.samples import digest_of, load_samples
from quantize.checkpoint.hub import resolve
from quantize.checkpoint.reader import Checkpoint
from quantize.cli.options import parse_size
from quantize.errors import QuantizeError, first_line
from quantize.execute import execute
from quantize.experts.gates import Gate
from quantize.layouts import LAYOUTS
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.scales import RULES
from quantize.run.cluster import connected
from quantize.run.options import Calibration, Options
from quantize.run.plan import Plan, plan
from quantize.run.record import check_target
from quantize.run.workers import all_devices
from quantize.verify import verify as verify_checkpoint

# Choices come from the registries; mypy can only follow enums that are written out.
LayoutName = StrEnum("LayoutName", dict(zip(LAYOUTS, LAYOUTS, strict=True)))  # type: ignore[misc]
RuleName = StrEnum("RuleName", dict(zip(RULES, RULES, strict=True)))  # type: ignore[misc]

MethodName = StrEnum("MethodName", dict(zip(METHODS, METHODS, strict=True)))  # type: ignore[misc]

MODELOPT, MAX, DESCENT = LayoutName("modelopt"), RuleName("max"), MethodName("descent")

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="Folder or hub id of the original checkpoint.")
]
Target = Annotated[Path, typer.Argument(metavar="DST", help="Folder for the quantized checkpoint.")]
GateOption = Annotated[
    str | None,
    typer.Option(
        "--gate",
        metavar="GATE",
        help="The experts' gate, for models that Transformers does not know, by name or as JSON, "
        "e.g. --gate silu, --gate gelu_tanh or --gate "
        '\'{"form": "swiglu_oai", "alpha": 1.702, "beta": 1, "limit": 7}\'.',
    ),
]
LayoutOption = Annotated[
    LayoutName,
    typer.Option(
        "--layout", help="How tensors are named on disk, e.g. --layout compressed-tensors."
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run SRC's own Python code to identify its gate; without this flag, nothing from a "
        "checkpoint is ever run. Needed for models that Transformers does not have, e.g. "
        "inspect org/brand-new-moe --trust-remote-code.",
    ),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        help="Quantize only modules whose path matches, e.g. --include '*.layers.1?.*'; can be "
        "given several times. Linears that engines fuse are taken only together.",
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="PATTERN",
        help="Leave modules whose path matches as they are, e.g. --exclude '*.layers.3.*'.",
    ),
]
LinearsOption = Annotated[
    bool,
    typer.Option(
        "--all-linears/--experts-only",
        help="Quantize attention and dense linears of the decoder too, e.g. --all-linears "
        "--exclude '*.self_attn.*'.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON instead of tables, e.g. --json > result.json.")
]

_TRACEBACK = "NVFP4_MOE_TRACEBACK"
"""Environment variable: let unexpected errors through."""

app = typer.Typer(
    name="nvfp4-moe",
    help="Quantize the routed experts of mixture-of-experts checkpoints to NVFP4.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console()
err = Console(stderr=True)


@app.command(
    epilog="Example: nvfp4-moe quantize MiniMaxAI/MiniMax-M3 m3-nvfp4 --scales mse --resume"
)
def quantize(
    context: typer.Context,
    source: Source,
    target: Target,
    layout: LayoutOption = MODELOPT,
    scales: Annotated[
        RuleName,
        typer.Option(
            "--scales", help="How block scales are chosen, e.g. --scales mse: slower and closer."
        ),
    ] = MAX,
    max_shard_size: Annotated[
        str,
        typer.Option(
            "--max-shard-size", metavar="SIZE", help="Largest output file, e.g. 500MB or 5GiB."
        ),
    ] = "5GB",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    all_linears: LinearsOption = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the checkpoint in a non-empty DST, e.g. --scales mse --overwrite.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with an interrupted run in DST, e.g. by the same command with --resume; "
            "start if there is none, and do nothing if it is complete already.",
        ),
    ] = False,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="What computes, e.g. --device cpu or --device cuda:1; all GPUs by default, the "
            "CPU where there is none.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            help="CPU threads, e.g. --threads 16; by default as many as cores, but no more than "
            "fit in 400 MB. Each needs memory for one expert.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Spread shards over a Ray cluster, e.g. --ray auto or --ray ray://head:10001; "
            "SRC and DST must be on storage that all its machines share.",
        ),
    ] = None,
    gate: GateOption = None,
    trust_remote_code: TrustOption = False,
    text: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="TEXT",
            help="Run the model over this text, a layer at a time, and quantize each expert for "
            "what it is given: much closer, hours instead of minutes. A text file, JSON lines or a "
            "folder, e.g. --calibrate texts.jsonl.",
        ),
    ] = None,
    calibration_rows: Annotated[
        int,
        typer.Option(
            "--calibration-rows", min=1, help="Pieces of text, e.g. --calibration-rows 512."
        ),
    ] = 128,
    calibration_length: Annotated[
        int,
        typer.Option(
            "--calibration-length", min=2, help="Tokens of each, e.g. --calibration-length 1024."
        ),
    ] = 2048,
    rounding: Annotated[
        MethodName,
        typer.Option(
            "--rounding",
            help="How calibrated weights are rounded, e.g. --rounding gptq: faster, not as close; "
            "two-sided: closest, with the loss's gradients, reading experts three times.",
        ),
    ] = DESCENT,
    every_expert: Annotated[
        bool,
        typer.Option(
            "--every-expert",
            help="Calibrate each expert with all tokens, not only with those that the router sends "
            "it, e.g. --calibrate texts.jsonl --every-expert: for texts too few for some experts.",
        ),
    ] = False,
) -> None:
    """Write SRC to DST with its routed experts in NVFP4, everything else byte for byte."""
    again = "--resume instead of --overwrite" if overwrite else "--resume"
    with _reporting_errors(f"run the same command with {again} to go on"):
        if overwrite and resume:
            raise _UsageError("--overwrite and --resume exclude each other")
        if text is None and (alone := _without_calibrate(context)):
            raise _UsageError(f"{alone} needs --calibrate")
        options = Options(
            layout=layout.value,
            scales=scales.value,
            max_shard_size=_size(max_shard_size),
            gate=_gate(gate),
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            linears=all_linears,
            trust_remote_code=trust_remote_code,
        )
        devices = [_device(name) for name in device] if device else None
        if ray and devices:
            raise _UsageError("--device is for this machine, and --ray uses a cluster's devices")
        check_target(target, overwrite, resume)  # before hours of downloading
        with connected(ray) if ray else nullcontext(), Checkpoint(resolve(source)) as checkpoint:
            steps = plan(checkpoint, options)
            err.print(_summary(steps), highlight=False)
            tokens = None
            if text is not None:
                shape = calibration_rows, calibration_length
                tokens = load_samples(text, checkpoint.folder, *shape, trust_remote_code)
                calibration = Calibration(
                    str(text), *shape, digest_of(tokens), rounding.value, every_expert
                )
                steps = replace(steps, options=replace(options, calibration=calibration))
            if tokens is not None:
                needs = needed(checkpoint, steps, devices[0] if devices else all_devices()[0])
                err.print(f"Calibration: {needs}", highlight=False)
            with _progress("Quantizing", checkpoint.nbytes) as bar:
                done = execute(
                    checkpoint,
                    steps,
                    target,
                    overwrite=overwrite,
                    resume=resume,
                    devices=devices,
                    threads=threads,
                    ray=ray,
                    command=_command(context),
                    progress=bar.advance,
                    samples=tokens,
                    calibrating=bar.calibrating,
                )
        out.print(
            f"{_plain(target)}: {decimal(done.bytes_before)} -> {decimal(done.bytes_after)} "
            f"in {done.shards} file{'s' * (done.shards > 1)}, {done.seconds:.1f} s, "
            f"{done.bytes_read / done.seconds / 1e9:.2f} GB/s",
            soft_wrap=True,
            highlight=False,
        )


@app.command(epilog="Example: nvfp4-moe inspect MiniMaxAI/MiniMax-M3 --json")
def inspect(
    source: Source,
    layout: LayoutOption = MODELOPT,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    all_linears: LinearsOption = False,
    gate: GateOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what SRC's routed experts are, their gate, and what quantizing would save."""
    with _reporting_errors(), Checkpoint(resolve(source)) as checkpoint:
        options = Options(
            layout=layout.value,
            gate=_gate(gate),
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            linears=all_linears,
            trust_remote_code=trust_remote_code,
        )
        steps = plan(checkpoint, options)
        if as_json:
            _print_json(inspection.as_json(checkpoint, steps))
            return
        table = _table(
            f"Routed experts of {source}",
            *("experts", "layers", "per layer", "hidden", "intermediate", "now", "NVFP4"),
        )
        table.caption = f"gate: {_plain(steps.gates)}"
        for row in inspection.expert_rows(checkpoint, steps):
            table.add_row(
                _plain(row.pattern),
                *map(str, (row.layers, row.experts, row.hidden, row.intermediate)),
                decimal(row.bytes_now),
                decimal(row.bytes_after),
            )
        out.print(table)
        stays = _table("Stays as it is", "tensors", "count", "dtype", "bytes")
        for other in inspection.other_rows(checkpoint, steps):
            stays.add_row(
                _plain(other.pattern), str(other.count), other.dtype, decimal(other.nbytes)
            )
        out.print(stays)
        if steps.dense:
            out.print(f"Linears quantized too: {sum(map(len, steps.dense))}")
        out.print(f"Whole checkpoint: {decimal(checkpoint.nbytes)} -> {decimal(steps.nbytes)}")


@app.command(epilog="Example: nvfp4-moe verify MiniMaxAI/MiniMax-M3 m3-nvfp4 --json")
def verify(
    source: Source,
    target: Target,
    gate: GateOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Reread SRC and DST; print each layer's error; exit 1 if anything is missing or wrong."""
    with (
        _reporting_errors(),
        Checkpoint(resolve(source)) as original,
        Checkpoint(target, decode=False) as quantized,
    ):
        with _progress("Verifying", original.nbytes) as bar:
            report = verify_checkpoint(
                original, quantized, _gate(gate), bar.advance, trust_remote_code=trust_remote_code
            )
        if as_json:
            _print_json(report.as_json())
        else:
            table = _table(f"{target} against {source}", "experts", "relative error", "SQNR (dB)")
            for layer in report.layers:
                table.add_row(_plain(layer.prefix), f"{layer.relative:.4f}", f"{layer.sqnr:.2f}")
            out.print(table)
        for problem in report.problems:
            _complain("problem", problem)
        if report.problems:
            raise typer.Exit(1)
        if not as_json:
            out.print("No problems found.")


def main() -> None:
    """Entry point of the console script."""
    app()


class _UsageError(QuantizeError):
    """Options that can never be right, whatever source and target are."""


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except QuantizeError as error:
        raise _UsageError(f"--max-shard-size {error}") from None


def _gate(text: str | None) -> Gate | None:
    if text is None:
        return None
    try:
        fields = json.loads(text) if text.lstrip().startswith("{") else {"form": text}
        return Gate(**fields)
    except (ValueError, TypeError) as error:
        raise _UsageError(
            f"--gate {text!r} is neither a form's name nor its JSON: {error}"
        ) from None
    except QuantizeError as error:
        raise _UsageError(f"--gate: {error}") from None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise _UsageError(f"--device {name!r} is neither cpu, nor cuda, nor cuda:0 or the like")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise QuantizeError(
            f"--device {name}: this machine has {torch.cuda.device_count()} usable GPUs"
        )
    return device


def _command(context: typer.Context) -> str:
    """The command line that determines the output, without what only says how it is made."""
    how = {"overwrite", "resume", "device", "threads", "ray", "source", "target"}
    words = ["nvfp4-moe", "quantize", context.params["source"], str(context.params["target"])]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name in how or not value or value == parameter.default:
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            words.append(parameter.opts[0])
            if one is not True:
                words.append(getattr(one, "value", str(one)))
    return shlex.join(words)


def _print_json(value: object) -> None:
    # Not rich's: it would wrap and colour.
    print(json.dumps(value, indent=2))


def _summary(steps: Plan) -> str:
    experts = sum(g.num_experts for g in steps.groups)
    linears = sum(map(len, steps.dense))
    also = f", {linears} dense linears" if linears else ""
    return f"{len(steps.groups)} MoE layers, {experts} experts{also}, gate {_plain(steps.gates)}"


def _table(title: str, first: str, *others: str) -> Table:
    """Names in the first column, figures in the others; nothing is cut off."""
    table = Table(title=_plain(title))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _plain(text: object) -> str:
    """``text`` as it is, for rich: no markup, and nothing that only a terminal would understand.

    Names come from checkpoints, and anyone can publish one.
    """
    return escape(
        "".join(
            c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
            for c in str(text)
        )
    )


def _complain(kind: str, text: str) -> None:
    err.print(f"[red]{kind}:[/]", _plain(text), soft_wrap=True, highlight=False)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        if task.fields.get("unit") == "layers":
            return Text(f"{task.completed:.1f} of {task.total:.0f} layers")
        speed = task.finished_speed or task.speed or 0
        return Text(f"{speed / 1e9:.2f} GB/s")


def _without_calibrate(context: typer.Context) -> str | None:
    """An option that says how to calibrate."""
    for name in ("calibration_rows", "calibration_length", "rounding", "every_expert"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            return f"--{name.replace('_', '-')}"
    return None


class _Bar:
    """Progress in bytes, after one in layers if there is calibration."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress = progress
        self._bytes = progress.add_task(what, total=total)
        self._layers: TaskID | None = None

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""
        self._progress.advance(self._bytes, nbytes)

    def calibrating(self, done: float, layers: int) -> None:
        """So many of the layers are done."""
        if self._layers is None:
            self._layers = self._progress.add_task("Calibrating", total=layers, unit="layers")
        self._progress.update(self._layers, completed=done)


@contextmanager
def _progress(what: str, total: int) -> Iterator[_Bar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        yield _Bar(progress, what, total)


@contextmanager
def _reporting_errors(advice: str = "nothing was changed") -> Iterator[None]:
    try:
        yield
    except QuantizeError as error:
        _complain("error", str(error))
        sys.exit(2 if isinstance(error, _UsageError) else 1)
    except KeyboardInterrupt:
        _complain("interrupted", advice)
        sys.exit(130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain("error", f"{where}{error.strerror or error}")
        sys.exit(1)
    except typer.Exit:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        _complain(
            "error",
            f"not enough memory ({first_line(error)}); choose another GPU with --device, or "
            "--device cpu, or fewer --threads",
        )
        sys.exit(1)
    except Exception as error:
        if os.environ.get(_TRACEBACK):
            raise
        _complain(
            "error",
            f"unexpected {type(error).__name__}: {first_line(error)}. This is a bug of nvfp4-moe; "
            f"please report it, with what {_TRACEBACK}=1 shows",
        )
        sys.exit(1)
