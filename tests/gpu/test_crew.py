"""Experts rounded on two GPUs: the bits of one, in half the time, and what becomes of a failure.

    pytest tests/gpu/test_crew.py -s

``python -m benchmarks.rounding_speed --gpus 1 2 --skip modelopt parts --rows 0`` has the seconds at
true size. Without GPUs, ``tests/quantize/test_crew.py`` tests all that has nothing to do with them.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import m3_checkpoint
from quantize.nvfp4.rounding import METHODS
from quantize.report import loads
from quantize.run.options import Options
from tests.quantize.test_calibration import calibrated, interrupted, resumed

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

ONE = [torch.device("cuda", 0)]
BOTH = [*ONE, torch.device("cuda", 1)]
WEIGHTS = "model.safetensors"
EXPERTS = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crew") / "source"
    m3_checkpoint.write(folder, 1, quantized=False, experts=EXPERTS, hidden=2048, intermediate=1024)
    return folder


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(3, 4096, (16, 1024), generator=torch.Generator().manual_seed(0))


def bits(folder: Path) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def lost(folder: Path) -> float:
    """The sum of the squared errors of all experts' outputs, by the run's report."""
    report = loads((folder / "nvfp4_moe_report.json").read_bytes())
    found = [layer.calibration for layer in report.layers]
    return sum(e**2 for own in found if own for errors in own.after for e in errors)


@pytest.mark.parametrize("method", METHODS)
def test_two_gpus_make_what_one_makes(
    method: str, source: Path, rows: torch.Tensor, tmp_path: Path
) -> None:
    took = {}
    for name, devices in (("warm", BOTH), ("one", ONE), ("both", BOTH)):
        start = time.perf_counter()
        calibrated(
            source, tmp_path / name, rows, Options(), settings={"method": method}, devices=devices,
        )  # fmt: skip
        took[name] = time.perf_counter() - start
    one, both = bits(tmp_path / "one"), bits(tmp_path / "both")
    assert one.keys() == both.keys()
    different = [name for name in one if one[name] != both[name]]
    print(f"\nCREW {method}: {took} s, {len(different)} of {len(one)} tensors differ")
    if method == "two-sided":
        # Batches are smaller then, and cuBLAS may add up in another order: documented.
        assert lost(tmp_path / "both") == pytest.approx(lost(tmp_path / "one"), rel=5e-3)
    else:
        assert not different
    # And once more: what is the same must be so by right, not by luck.
    calibrated(
        source, tmp_path / "again", rows, Options(), settings={"method": method}, devices=BOTH
    )
    assert bits(tmp_path / "again") == both


def test_one_gpu_goes_on_where_two_have_stopped(
    source: Path, rows: torch.Tensor, tmp_path: Path
) -> None:
    of = {"settings": {"method": "gptq"}}
    calibrated(source, tmp_path / "whole", rows, Options(), devices=ONE, **of)
    interrupted(0.5, source, tmp_path / "out", rows, Options(), devices=BOTH, **of)
    resumed(source, tmp_path / "out", rows, Options(), devices=ONE, **of)
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")


def test_a_gpu_without_memory_leaves_its_experts_to_the_other(
    source: Path, rows: torch.Tensor, tmp_path: Path
) -> None:
    of = {"settings": {"method": "descent"}}
    calibrated(source, tmp_path / "whole", rows, Options(), devices=ONE, **of)
    said: list[str] = []
    with torch.cuda.device(1):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        full = torch.empty(free - 2**27, dtype=torch.uint8, device="cuda")
    try:
        calibrated(source, tmp_path / "out", rows, Options(), devices=BOTH, say=said.append, **of)
    finally:
        del full
        torch.cuda.empty_cache()
    assert [line for line in said if line.startswith("Warning: cuda:1 is lost (")]
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")
