"""The run's report as it is uploaded: without the names of folders on the machine where it was."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from quantize.push.checkpoint import CARD, Finished
from quantize.report import CalibrationReport, dumps, render
from quantize.run.report_files import REPORT, REPORT_DATA


def published(made: Finished) -> dict[str, bytes]:
    """The report's files by name. ``verify`` takes them for the uploaded checkpoint's own: they do
    not say that its card is SRC's."""
    report, base = made.report, made.base
    report = replace(
        report,
        source="@".join(base) if base else "SRC",
        command=command(made),
        files=[name for name in report.files if name != CARD],
        digests={name: digest for name, digest in report.digests.items() if name != CARD},
        calibration=_without_folders(report.calibration),
        input_scales=_without_folders(report.input_scales),
    )
    return {REPORT_DATA: dumps(report).encode(), REPORT: render(report).encode()}


def command(made: Finished) -> str:
    """How it was made, without the names of folders on the machine where it was."""
    words = shlex.split(made.report.command)
    if len(words) < 4:
        return made.report.command
    base = made.base
    first = [*words[:2], base[0] if base else "SRC", "DST"]
    rest = [_plain(word) for word in words[4:]]
    if base:  # a branch may move
        if "--revision" not in rest:
            rest += ["--revision", ""]
        rest[rest.index("--revision") + 1] = base[1]
    return shlex.join(first + rest)


def _without_folders(used: CalibrationReport | None) -> CalibrationReport | None:
    if used is None:
        return None
    return replace(used, text=", ".join(_plain(one) for one in used.text.split(", ")))


def _plain(word: str) -> str:
    """A path's last part; anything else as it is."""
    return Path(word).name if word.startswith(("/", "~", ".")) or Path(word).exists() else word
