"""``nvfp4-moe doctor``: the command, which imports nothing large before it works.

The entry point group ``nvfp4_moe.commands`` has it: ``quantize`` knows nothing of this package.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from quantize.cli.errors import UsageError, reporting_errors
from quantize.cli.large_imports import large_imports
from quantize.cli.output import err, plain
from quantize.errors import QuantizeError
from vllm_nvfp4_moe import settings, versions

_BUSY = 0.25
"""Of the cores: a load from which on times are not to be trusted."""
_READING = 300.0
"""Seconds that a checkpoint's headers may take, which come from the hub if it is a hub id."""


def doctor(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Folder or hub id, of which only config and headers are read: layers like its "
            "own are tried. MiniMax-M3's if it is left out.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer numbers of tokens; less than a minute.")
    ] = False,
    tp: Annotated[
        int | None,
        typer.Option(
            help="Ranks that a layer is sliced for, besides the whole one (by default 8, 4 or 2).",
            min=1,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write everything there, for a report."),
    ] = None,
) -> None:
    """Run each kernel for NVFP4 experts that this machine has beside plain arithmetic, and time it;
    exit 1 if one that would be chosen is wrong, 2 if that could not be found out."""
    with reporting_errors(failed=2), settings.quiet():
        problem = versions.unsupported_version()
        if problem and not settings.any_vllm():
            raise QuantizeError(problem)
        if json_file is not None:
            _check_writable(json_file)
        busy = _busy()
        say("importing vLLM")
        with large_imports(timed=True):
            from vllm_nvfp4_moe.doctor.run import run
            from vllm_nvfp4_moe.doctor.saved import save
            from vllm_nvfp4_moe.doctor.table import text

        shape, notes = _shape(checkpoint, tp)
        notes += busy
        result = run(shape, tp, quick, say) | {"notes": notes}
        result["notes"] += save(result)
        print(text(result))
        if json_file is not None:  # which may be a link, or no file, such as /dev/stdout
            json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if not result["verdict"]["right"]:
            raise typer.Exit(1)


def _busy() -> list[str]:
    """What to know if other programs run here: kernels would be timed, and then chosen by
    ``NVFP4_MOE_SELECT=measured``, by what those leave. Asked before this one has begun to work."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load < _BUSY * cores:
        return []
    return [
        f"other programs ran here (a load of {load:.1f} in the minute before, on {cores} cores): "
        "times are not to be trusted; run doctor again when they have ended"
    ]


def _check_writable(file: Path) -> None:
    """Raise UsageError if the result could not be written: that is known before the minutes."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"--json {file}: there is no such folder")
    if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise UsageError(f"--json {file}: cannot be written; give a file that you can write to")


def _shape(checkpoint: str | None, tp: int | None) -> tuple[Any, list[str]]:
    """The layer to try, and what to know of it."""
    from dataclasses import replace

    from vllm_nvfp4_moe.doctor import children
    from vllm_nvfp4_moe.doctor.checkpoint import find
    from vllm_nvfp4_moe.doctor.shape import MINIMAX_M3, restored

    shape, notes = replace(MINIMAX_M3, router="sigmoid"), []
    if checkpoint is not None:
        say(f"reading the config and the headers of {checkpoint}")
        # In another process, since finding a gate computes (see `children`).
        records, problem = children.run(find, checkpoint, seconds=_READING)
        if problem or "error" in records[0]:
            why = problem or records[0]["error"]
            raise QuantizeError(f"no layer like those of {checkpoint} can be made: {why}")
        shape = restored(records[0]["shape"])
        if gates := records[0]["gates"]:
            notes.append(f"layers differ in their gates ({gates}); {shape.gate} was tried")
    if tp is not None and not shape.divides(tp):
        raise UsageError(
            f"--tp {tp}: an intermediate size of {shape.intermediate} has no slices of whole "
            "blocks of 16 for so many ranks"
        )
    return shape, notes


def say(text: str) -> None:
    """A line of progress."""
    err.print("doctor:", plain(text), soft_wrap=True, highlight=False)


def main() -> None:
    """``python -m vllm_nvfp4_moe.doctor``."""
    typer.run(doctor)
