"""Fixtures for all tests: a small trained model, in both of its layouts."""

import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer.testing
from typer.main import get_command

from tests.hub_layout import publish
from tests.trained import NANO, available, nano, own_model

ROOT = Path(__file__).resolve().parents[1]

# A shell that starts a runner in the background has it ignore Ctrl-C; processes that tests start
# would inherit that, and some tests interrupt them.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Typer's runner builds the command anew for every call, of which there are ten thousand.
assert typer.testing._get_command is get_command
typer.testing._get_command = functools.cache(get_command)


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


# What vLLM and our plugin set for the processes that they begin, when they are first imported.
FOR_WORKERS = {
    "NVFP4_MOE_RUN",
    "VLLM_MLA_DISABLE",
    "VLLM_USE_BREAKABLE_CUDAGRAPH",
    "VLLM_USE_DEEP_GEMM_E8M0",
    "VLLM_DISABLE_SHARED_EXPERTS_STREAM",
    "VLLM_SSM_CONV_STATE_LAYOUT",
    "VLLM_WORKER_MULTIPROC_METHOD",
}


@pytest.fixture(autouse=True)
def same_settings() -> Iterator[None]:
    """No test, and nothing that one calls, leaves settings of vLLM's or ours changed: what a later
    test sees would depend on the order (a level of the log once hid eight warnings)."""
    before = _settings()
    yield
    changed = dict(_settings().items() ^ before.items())
    assert not changed


def _settings() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("VLLM_", "NVFP4_MOE_")) and name not in FOR_WORKERS
    }


@pytest.fixture(scope="session")
def trained() -> Path:
    """A small trained MiniMax-M3, as Transformers writes it (experts fused); treat as read-only."""
    return own_model()


@pytest.fixture(scope="session")
def trained_hub(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as the hub publishes MiniMax-M3: one tensor per expert."""
    return publish(trained, tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture(scope="session", params=available())
def each_trained(request: pytest.FixtureRequest) -> Path:
    """The same, and m3-nano where it is: for what another model might well show."""
    folder: Path = nano() if request.param == NANO else request.getfixturevalue("trained")
    return folder


@pytest.fixture(scope="session")
def quantized_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, Path]]:
    """``quantized_of(folder)``: quantized by this package, in each layout, with input scales; treat
    as read-only."""
    from quantize.layouts import LAYOUTS
    from tests.quantize.checkpoints import convert

    @functools.cache
    def quantized_of(folder: Path) -> dict[str, Path]:
        parent = tmp_path_factory.mktemp("quantized")
        for layout in LAYOUTS:
            convert(folder, parent / layout, layout, "max", activations=True)
        return {layout: parent / layout for layout in LAYOUTS}

    return quantized_of


@pytest.fixture(scope="session")
def quantized(trained: Path, quantized_of: Callable[[Path], dict[str, Path]]) -> dict[str, Path]:
    """The small trained model quantized by this package, in each layout; treat as read-only."""
    return quantized_of(trained)
