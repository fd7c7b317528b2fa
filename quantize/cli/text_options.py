"""Options of ``quantize`` that go together or exclude each other, most of them about its text."""

from __future__ import annotations

import typer

from quantize.cli.errors import UsageError
from quantize.cli.options import Activations


def check_text_options(
    context: typer.Context,
    text: list[str] | None,
    input_scales: list[str] | None,
    activations: Activations | None,
    linears: bool,
) -> None:
    """Refuse options that say how to use a text that is not there, or that contradict it.

    Raises:
        UsageError: if there are any.
    """
    if text and input_scales:
        raise UsageError("--calibrate finds input scales too; leave --input-scales out")
    if activations is Activations.BF16:
        for name in ("input_scales", "input_scale_rule"):
            if said(context, name):
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"--activations bf16 leaves no use for {option}; leave one out")
    if input_scales and linears and activations is None:
        raise UsageError(
            "--input-scales finds the input scales of experts, not of --all-linears; with "
            "--activations nvfp4, those of linears are 1.0"
        )
    needs = {
        "calibration_rows": "--calibrate or --input-scales",
        "calibration_length": "--calibrate or --input-scales",
        "every_expert": "--calibrate or --input-scales",
        "bits": "--calibrate or --input-scales",
        "input_scale_rule": "--calibrate or --input-scales",
        "check_text": "--calibrate",
        "yes": "--calibrate or --input-scales",
        "work_dir": "--calibrate or --input-scales",
        "rounding": "--calibrate",
    }
    for name, needed in needs.items():
        there = text or (needed != "--calibrate" and input_scales)
        if not there and said(context, name):
            raise UsageError(f"--{name.replace('_', '-')} needs {needed}")


def said(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
