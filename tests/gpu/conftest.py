"""Tests of this folder need a Hopper GPU or newer; elsewhere they are skipped, and say so."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.layer import start

HERE = Path(__file__).parent


def no_gpu() -> str | None:
    """Why the tests of this folder cannot run here, None if they can."""
    needed = "needs an NVIDIA GPU of compute capability 9.0 or more"
    if not torch.cuda.is_available():
        return f"{needed}; PyTorch {torch.__version__} finds none"
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        return f"{needed}; this is {torch.cuda.get_device_name()}, {major}.{minor}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = no_gpu()
    for item in items:
        if reason and item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> torch.device:
    """The device, with this process set up as vLLM's worker sets up its own."""
    # Humming chooses other kernels where it sees that pytest runs, unless this says not to.
    os.environ["HUMMING_TEST_TUNING_SOURCE"] = ""
    torch.backends.cuda.matmul.allow_tf32 = False  # the references'
    device = torch.device("cuda", 0)
    start(device, tmp_path_factory.mktemp("rank"))
    return device


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Append what was measured, a dict each; its numbers are errors, the rest says of what.

    All goes to ``$OUT/layer-PROCESS.jsonl`` if ``$OUT`` is set; the largest of each shape, backend
    and gate are printed.
    """
    lines: list[dict[str, Any]] = []
    yield lines
    if folder := os.environ.get("OUT"):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (Path(folder) / f"layer-{os.getpid()}.jsonl").write_text(text)
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write("\n" + "".join(f"ERRORS {line}\n" for line in largest(lines)))


def largest(lines: list[dict[str, Any]]) -> list[str]:
    """One line of text for each shape, backend, gate and kind of run: its largest errors."""
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        kind = "graph" if line["batch"].startswith("graph") else "reference"
        row = found.setdefault(f"{line['shape']} {line['backend']} {line['gate']} {kind}", {})
        for name, value in line.items():
            if isinstance(value, bool):
                row[name] = min(row.get(name, 1.0), float(value))
            elif isinstance(value, float):  # NaN is larger than anything
                old = row.get(name, 0.0)
                row[name] = value if not value <= old else old
    return [
        f"{what}: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items())
        for what, row in found.items()
    ]
