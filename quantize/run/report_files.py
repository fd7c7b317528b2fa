"""The report's files in a target, and how a run knows its own again."""

from __future__ import annotations

import html
from pathlib import Path

from quantize.checkpoint.json_files import read_json
from quantize.errors import QuantizeError

REPORT = "nvfp4_moe_report.html"
REPORT_DATA = "nvfp4_moe_report.json"
"""What ``REPORT`` shows; its ``fingerprint`` is the run's."""


def mark(fingerprint: str) -> str:
    """What the page of a run ends with."""
    return f"<!-- run {html.escape(fingerprint)} -->\n"


def are_of(target: Path, fingerprint: str) -> bool:
    """Whether ``target`` holds both files, and they are of the run with this fingerprint."""
    try:
        page = (target / REPORT).read_text(encoding="utf-8")
        data = read_json(target / REPORT_DATA)
    except (OSError, ValueError, QuantizeError):
        return False
    return page.endswith(mark(fingerprint)) and data.get("fingerprint") == fingerprint
