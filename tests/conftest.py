"""Fixtures for all tests: the small trained model, in both of its layouts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A shell that starts a runner in the background has it ignore Ctrl-C; processes that tests start
# would inherit that, and some tests interrupt them.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that import vLLM into this process come last, and those that load models through it
    last of all: its Transformers backend changes Transformers' own classes for good, which the
    others use as references."""
    tests = ROOT / "tests"
    late = (tests / "benchmarks", tests / "test_operating.py")

    def order(item: pytest.Item) -> int:
        if item.path.is_relative_to(tests / "plugin"):
            return 2
        return int(any(item.path.is_relative_to(place) for place in late))

    items.sort(key=order)


@pytest.fixture(scope="session")
def m3_nano() -> Path:
    """m3-nano as Transformers writes it (experts fused). ``M3_NANO`` says where else it is."""
    folder = Path(os.environ.get("M3_NANO") or ROOT.parent / "shared" / "models" / "m3-nano")
    if not (folder / "config.json").exists():
        pytest.skip(f"{folder} holds no m3-nano; set M3_NANO to the folder of that checkpoint")
    return folder


@pytest.fixture(scope="session")
def m3_nano_hub(m3_nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m3-nano as the hub publishes MiniMax-M3: one tensor per expert."""
    script = ROOT.parent / "shared" / "models" / "to_hub_layout.py"
    if not script.exists():
        pytest.skip(f"{script}, which converts m3-nano, is not there")
    target = tmp_path_factory.mktemp("m3-nano-hub")
    subprocess.run([sys.executable, str(script), str(m3_nano), str(target)], check=True)
    return target


@pytest.fixture(scope="session")
def quantized(m3_nano: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """m3-nano quantized by this package, in each layout; treat as read-only."""
    from quantize.checkpoint.reader import Checkpoint
    from quantize.execute import execute
    from quantize.layouts import LAYOUTS
    from quantize.run.options import Options
    from quantize.run.plan import plan

    folders = {}
    for layout in LAYOUTS:
        folders[layout] = tmp_path_factory.mktemp("quantized") / layout
        with Checkpoint(m3_nano) as source:
            execute(source, plan(source, Options(layout=layout, activations=True)), folders[layout])
    return folders
