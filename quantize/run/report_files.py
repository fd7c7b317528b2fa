"""The report's files in a target, and how a run knows its own again."""

from __future__ import annotations

import hashlib
import html
from pathlib import Path
from typing import Any

from quantize.checkpoint.json_files import read_json
from quantize.errors import QuantizeError

REPORT = "nvfp4_moe_report.html"
REPORT_DATA = "nvfp4_moe_report.json"
"""What ``REPORT`` shows; its ``fingerprint`` is the run's."""


def mark(fingerprint: str, data: bytes) -> str:
    """What the page of a run ends with.

    Args:
        data: ``REPORT_DATA``'s contents.
    """
    digest = hashlib.sha256(data).hexdigest()
    return f"<!-- run {html.escape(fingerprint)} data {digest} -->\n"


def are_of(target: Path, fingerprint: str) -> bool:
    """Whether ``target`` holds both files, and they are of the run with this fingerprint."""
    return _said(target).get("fingerprint") == fingerprint


def of_commit(target: Path) -> str:
    """``Plan.fingerprint_of_commit`` of the run that both files are of; empty if it had none, or
    they are not there."""
    return str(_said(target).get("of_commit") or "")


def _said(target: Path) -> dict[str, Any]:
    """The report's data; nothing if both files are not there, or not of one run."""
    try:
        page = (target / REPORT).read_text(encoding="utf-8")
        data = (target / REPORT_DATA).read_bytes()
        said = read_json(target / REPORT_DATA)
    except (OSError, ValueError, QuantizeError):
        return {}
    return said if page.endswith(mark(str(said.get("fingerprint")), data)) else {}
