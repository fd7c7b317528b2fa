"""What is compared when a Hopper kernel's library is loaded, and what CUDA's errors say.

The library is the CUDA source on a CPU (``emulation.py``), with a launch that cannot be right.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import pytest

from quantize.native.jit import KernelError
from tests.gpu.layer import Shape
from tests.gpu.packed import GATES, Packed
from tests.plugin.emulation import CPU, Emulated, body, compiled
from vllm_nvfp4_moe.kernels.hopper import launch
from vllm_nvfp4_moe.kernels.hopper.launch import (
    CGate,
    CTileShape,
    LaunchSpec,
    TileShape,
    check_library,
)
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

KERNEL = KERNELS["bf16"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    right, wrong = "launch(route, 1, MAX_EXPERTS", "launch(route, 0, MAX_EXPERTS"
    source = body(KERNEL)
    assert source.count(right) == 1
    return compiled(tmp_path_factory.mktemp("library"), source.replace(right, wrong), KERNEL)


class LongerSpec(ctypes.Structure):
    _fields_ = [*LaunchSpec._fields_, ("more", ctypes.c_int64)]


class ShorterGate(ctypes.Structure):
    _fields_ = CGate._fields_[:-1]


class ShorterTileShape(ctypes.Structure):
    _fields_ = CTileShape._fields_[:-1]


WRONG = {
    "LaunchSpec": ("LaunchSpec", LongerSpec, ctypes.sizeof(LaunchSpec), ctypes.sizeof(LongerSpec)),
    "Gate": ("CGate", ShorterGate, 16, 12),
    "Tile": ("TILE_BYTES", 20, 16, 20),
    "Place": ("PLACE_BYTES", 12, 16, 12),
    "TileShapeNumbers": ("CTileShape", ShorterTileShape, 16, 12),
}
"""By the struct's name in CUDA: what stands for it in Python, and a wrong one; its size there and
here."""


@pytest.mark.parametrize("struct", WRONG)
def test_a_struct_of_another_size_is_refused(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, struct: str
) -> None:
    check_library(library, KERNEL.tile_shapes)
    name, wrong, cuda, python = WRONG[struct]
    monkeypatch.setattr(launch, name, wrong)
    message = f"struct {struct} has {cuda} bytes in the CUDA source and {python} in launch.py"
    with pytest.raises(KernelError, match=message):
        check_library(library, KERNEL.tile_shapes)


def other_shapes() -> Iterator[tuple[TileShape, ...]]:
    first, *rest = KERNEL.tile_shapes
    yield (*rest, first)
    yield tuple(rest)
    for field in ("max_tokens", "row_groups", "k_groups", "token_step"):
        yield (replace(first, **{field: 2 * getattr(first, field)}), *rest)


@pytest.mark.parametrize("shapes", other_shapes(), ids=lambda shapes: " ".join(map(str, shapes)))
def test_other_tile_shapes_are_refused(library: ctypes.CDLL, shapes: tuple[TileShape, ...]) -> None:
    with pytest.raises(KernelError, match=r"tile shapes \[\(8, 1, 4, 8\), .*its Python side"):
        check_library(library, shapes)


def test_cudas_errors_come_with_their_text(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_library(library, KERNEL.tile_shapes)
    packed = Packed.random(Shape("small", 8, 256, 64, 2), CPU)
    x, ids, weights = packed.batch(40)  # which `route` routes
    emulated = Emulated(library, KERNEL, monkeypatch)
    with pytest.raises(KernelError, match=r"^CUDA error 9: invalid configuration argument$"):
        emulated.run(x, packed.experts, ids, weights, GATES["silu"])


def test_a_misspelt_field_is_refused() -> None:
    """ctypes itself would take it for an attribute."""
    with pytest.raises(AssertionError, match=r"LaunchSpec has no \['token'\]"):
        LaunchSpec(token=1)
    assert LaunchSpec(tokens=1).tokens == 1
