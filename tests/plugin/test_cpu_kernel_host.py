"""What the CPU's kernel takes of its host: threads, pages, and what Linux says in /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_nvfp4_moe.backends.cpu import huge_pages, kernels
from vllm_nvfp4_moe.doctor import run as doctor


def test_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (kernels, doctor):
        monkeypatch.setattr(module, "Path", lambda _: tmp_path / "missing")
    assert kernels._cores() == os.sched_getaffinity(0)
    assert doctor._available() == 4 << 30


def test_pytorchs_threads_are_used() -> None:
    """No second OpenMP comes into the process, and PyTorch's has as many threads as it is told."""
    code = """
import os, torch
from quantize.experts.gates import Gate
from vllm_nvfp4_moe.kernels.cpu.kernel import kernel_for
from tests.plugin.cpu_kernels import Case
from tests.plugin.test_layer import routing
def tasks(): return len(os.listdir("/proc/self/task"))
def runtimes(): return {l.split()[-1] for l in open("/proc/self/maps") if "omp" in l.split()[-1]}
torch.set_num_threads(3)
torch.randn(1000, 1000) @ torch.randn(1000, 1000); torch.randn(10**6).exp()
before = tasks(), runtimes()
case, (weights, ids) = Case(256, 256), routing(9, 5, 2)
case.run(kernel_for(torch.bfloat16), torch.randn(9, 256).bfloat16(), weights, ids, Gate("silu"))
print(before == (tasks(), runtimes()), before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True"), done.stdout


def test_huge_pages() -> None:
    """Where the kernel of Linux has them, weights lie in them."""
    has = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    tensor = torch.empty(64 << 20, dtype=torch.uint8)  # not from what was freed before
    asked = huge_pages.advise(tensor)
    assert asked == (has.exists() and "[never]" not in has.read_text())
    tensor.fill_(1)
    sizes, inside = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin <= tensor.data_ptr() + (32 << 20) < end
        elif inside:
            sizes[name] = int(rest[0]) if rest[0].isdigit() else 0
    assert (sizes["AnonHugePages:"] > 0) == asked
    assert not huge_pages.advise(torch.empty(1 << 20, dtype=torch.uint8))
