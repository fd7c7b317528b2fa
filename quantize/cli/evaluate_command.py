"""``nvfp4-moe evaluate``: what a quantized checkpoint lost on a text, in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.checkpoint.hub import resolve
from quantize.cli.errors import UsageError, reporting_errors
from quantize.cli.large_imports import large_imports
from quantize.cli.options import (
    GateOption,
    JsonOption,
    LogOption,
    QuietOption,
    Rounded,
    TrustOption,
    check_device,
    device_of,
    stated_gate,
)
from quantize.cli.output import out, print_json, table
from quantize.cli.progress import downloading, progress_bar
from quantize.cli.signals import ending_at_once
from quantize.cli.source_options import RevisionOption, revision_for

if TYPE_CHECKING:
    from quantize.evaluate import Result


def evaluate(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="Folder or hub id of what DST is compared with."),
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="Folder or hub id of the quantized checkpoint.")
    ],
    text: Annotated[
        Path,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="What both read: a text file, JSON lines or a folder, e.g. --text wiki.txt; not "
            "what DST was calibrated with.",
            show_default=False,
        ),
    ],
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Rows of text, e.g. --samples 128.")
    ] = 32,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            min=2,
            help="Tokens of each, e.g. --length 512; by default 2048, or as many as the model "
            "takes.",
        ),
    ] = None,
    activations: Annotated[
        Rounded | None,
        typer.Option(
            "--activations",
            help="How DST's kernels round what goes into its quantized experts: nvfp4 by its input "
            "scales, fp8 a token at a time, bf16 not at all, e.g. --activations bf16. By default "
            "what DST says.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="What computes, e.g. --device cpu or --device cuda:1; by default the first GPU, "
            "the CPU where there is none.",
        ),
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            "--work-dir",
            metavar="DIR",
            help="Keep hidden states in a folder of the run's own in DIR, so that --resume can go "
            "on with them, e.g. --work-dir /scratch; by default they are beside DST, and go with "
            "the run.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with an interrupted run of the same command, e.g. --work-dir /scratch "
            "--resume; start if there is none.",
        ),
    ] = False,
    revision: RevisionOption = None,
    gate: GateOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    log_file: LogOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run SRC and DST side by side over TEXT, a layer at a time: perplexity of both, KL divergence,
    top-1 agreement, and the loss by depth."""
    advice = "run the same command with --resume to go on" if work_dir else "nothing was changed"
    apart = [Path(source), Path(target)]
    with reporting_errors(advice, quiet, log_file, apart):
        if resume and work_dir is None:
            raise UsageError("--resume needs --work-dir: only there does a run leave its states")
        stated = stated_gate(gate)
        if device is not None:
            check_device(device)
        here = Path(target).expanduser()
        from quantize.calibration.sources import check_there

        check_there(text)  # before anything is downloaded
        with ending_at_once():
            second_folder = resolve(target, shown=downloading)
            of = revision_for(source, second_folder, revision)
            first_folder = resolve(source, of, downloading)
        with large_imports():
            from quantize.checkpoint.reader import Checkpoint
            from quantize.evaluate import evaluate as run
            from quantize.evaluate import tokens_of
            from quantize.run.workers import all_devices

        with (
            Checkpoint(first_folder) as first,
            Checkpoint(second_folder) as second,
            progress_bar("Evaluating", read=lambda: first.nbytes_read + second.nbytes_read) as bar,
        ):
            tokens = tokens_of(text, first, second, samples, length, trust_remote_code, bar.say)

            found = run(
                first,
                second,
                tokens,
                text=str(text),
                activations=activations.value if activations else None,
                device=device_of(device) if device else all_devices()[0],
                gate=stated,
                trust_remote_code=trust_remote_code,
                work_dir=work_dir,
                resume=resume,
                beside=here.resolve().parent if here.is_dir() else None,
                progress=bar.evaluating,
                say=bar.say,
            )
        if as_json:
            print_json(found.as_json())
        else:
            _show(found)


def _show(found: Result) -> None:
    """The figures for people: perplexity first, as it is published."""
    out.quiet = False  # they were asked for
    figures = found.figures
    for line in (
        f"perplexity {figures.before:.3f} -> {figures.after:.3f} ({figures.change:+.2f} %)",
        f"KL(SRC || DST) {figures.kl:.5f}{_error(figures.kl_error, '.5f')} nats a token",
        f"top-1 agreement {figures.top1:.2%}",
        f"{figures.tokens} tokens in {found.samples} rows of {found.length}; activations "
        f"{found.activations}; {found.seconds:.0f} s",
    ):
        out.print(line, highlight=False, soft_wrap=True)
    depth = table("loss by depth", "layer", "relative error", "of the median token", "seconds")
    for each in found.depth:
        depth.add_row(
            f"{each.layer}{'' if each.experts else ' (no experts)'}",
            f"{each.error:.4f}",
            f"{each.median_token:.4f}",
            f"{each.seconds:.1f}",
        )
    out.print(depth)


def _error(value: float | None, form: str) -> str:
    return "" if value is None else f" ± {value:{form}}"
