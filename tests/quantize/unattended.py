"""What tests of runs that people leave alone share: a source, and the lines that commands say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

Folders = Callable[[str], Path]

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
AMOUNT = r"[\d.]+ (bytes|kB|MB)"
PACE = r"\d+%, [\d.]+ (GB|MB|kB|bytes)/s(, [\d.]+ \w+ left)?"


@pytest.fixture
def source(saved: Folders) -> Path:
    """A tiny model where it was saved: to be read alone."""
    return saved("qwen3_moe")


def logged(file: Path) -> list[str]:
    """The lines without their times, which all have."""
    found = [re.fullmatch(rf"{TIME} (.*\S)", line) for line in file.read_text().splitlines()]
    assert all(found)
    return [line[1] for line in found if line]
