"""Doctor on a GPU: right kernels are right in less than a minute, and a fault that is put into all
of them is found in each, and named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.doctor_runs import FAULTS, Ran, check_found, doctor, small_checkpoint

HOPPER = {"hopper bf16", "hopper fp8", "humming", "marlin", "emulation"}
"""All that can run there, if FlashInfer's and others' stay away from 9.0."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this package's kernels, all of them compiled before anything is timed, and of tables that
    nobody else reads."""
    folder = tmp_path_factory.mktemp("cache")
    subprocess.run(
        [sys.executable, "-m", "vllm_nvfp4_moe.build", "--cuda"],
        env={**os.environ, "NVFP4_MOE_CACHE": str(folder)}, check=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small")


@pytest.fixture(scope="module")
def right(small: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Small experts, nothing put in."""
    return doctor(tmp_path_factory.mktemp("right"), str(small), "--tp", "1", cache=cache)


def told(ran: Ran) -> None:
    """Print what is worth keeping of a run."""
    print(f"\n{ran.seconds:.1f} s, exit code {ran.code}")
    for layer in ran.found["layers"]:
        for kernel in layer["kernels"]:
            if kernel["reason"] is None:
                place = f"{layer['place']}, {layer['variant']}: {kernel['name']}"
                same = f" (same as {kernel['same_as']})" if kernel["same_as"] else ""
                left = f", {len(kernel['left_out'])} left out" if kernel["left_out"] else ""
                print(f"  {place} {kernel['status']}{same}{left}", *kernel["faults"], sep="; ")


def test_right_kernels(right: Ran) -> None:
    told(right)
    assert right.code == 0 and right.found["verdict"]["problems"] == [], right.said
    assert right.kernels() == right.kernels("right"), right.said
    if torch.cuda.get_device_capability() == (9, 0):
        assert set(right.kernels()) == HOPPER


def test_quick_takes_less_than_a_minute(right: Ran, cache: Path, tmp_path: Path) -> None:
    """With MiniMax-M3's sizes, once kernels are compiled, also vLLM's; nothing is left out, also
    where they are compiled meanwhile."""
    for name in ("first", "compiled"):
        ran = doctor(tmp_path / name, cache=cache)
        left_out = [(name, k["left_out"]) for name, ks in ran.kernels().items() for k in ks]
        assert not any(left for _, left in left_out), left_out
    told(ran)
    print(ran.said)
    assert ran.code == 0, ran.said
    assert ran.kernels() == ran.kernels("right"), ran.said
    assert set(ran.kernels()) == set(right.kernels())
    assert ran.seconds < 60, ran.said


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_small_experts(
    right: Ran, small: Path, cache: Path, tmp_path: Path, fault: str
) -> None:
    ran = doctor(tmp_path, str(small), "--tp", "1", fault=fault, cache=cache)
    told(ran)
    check_found(ran, FAULTS[fault], right.kernels())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_minimax_m3s(right: Ran, cache: Path, tmp_path: Path, fault: str) -> None:
    """Where a single scale matters least. In an expert whose outputs are small beside others', it
    may be less than what activations of 8 and 4 bits round, also for a reference that rounds."""
    ran = doctor(tmp_path, fault=fault, cache=cache)
    told(ran)
    hidden = {"hopper fp8", "emulation"} if fault == "one zeroed scale" else set()
    check_found(ran, FAULTS[fault], right.kernels(), hidden)
