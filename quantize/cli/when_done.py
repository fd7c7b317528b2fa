"""What ``quantize`` says when it is done."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from quantize.cli.output import out, plain
from quantize.duration import speed

if TYPE_CHECKING:
    from quantize.execute import Summary


def say_done(done: Summary, target: Path, trust_remote_code: bool) -> None:
    """Say what was made, where its report is, and how to serve it."""
    from quantize.run.report_files import REPORT, REPORT_DATA

    files = f"{done.shards} file{'s' * (done.shards > 1)}"
    # A calibration takes hours before: they say nothing of how fast files are read and written.
    pace = f", shards at {speed(done.bytes_read / done.reading)}" if done.bytes_read else ""
    for line in (
        f"{target}: {decimal(done.bytes_before)} -> {decimal(done.bytes_after)} in {files}, "
        f"{done.seconds:.1f} s{pace}",
        f"Report: {target / REPORT} (as data: {REPORT_DATA})",
        f"Serve:  {serve_command(target, trust_remote_code)}",
    ):
        out.print(plain(line), soft_wrap=True, highlight=False)


def serve_command(target: Path, trust_remote_code: bool = False) -> str:
    """The command that serves a checkpoint.

    The method is named though its config says it: without this plugin, vLLM then refuses what it
    would serve with another gate.
    """
    words = ["vllm", "serve", str(target), "--quantization", "nvfp4_moe"]
    return shlex.join([*words, *(["--trust-remote-code"] if trust_remote_code else [])])
