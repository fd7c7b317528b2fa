"""The rule ``power-of-two``: MXFP4 weights come out exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from quantize.checkpoint.reader import Checkpoint
from quantize.run.options import Options
from quantize.run.plan import plan
from quantize.run.report_files import REPORT_DATA
from tests.quantize import checkpoints, reference
from tests.quantize.plain import plainly
from tests.quantize.test_calibration_proof import gpt_oss_mxfp4


def mxfp4(spread: int, rows: int = 64, columns: int = 128) -> torch.Tensor:
    """Random float32 ``[rows, columns]``: a code times a power of two that 32 inputs share."""
    random = torch.Generator().manual_seed(spread)
    values = torch.from_numpy(reference.E2M1).float()
    codes = torch.randint(0, 16, (rows, columns // 32, 32), generator=random)
    powers = torch.randint(-spread - 20, -19, (rows, columns // 32, 1), generator=random)
    return (values[codes] * 2.0**powers).flatten(1)


@pytest.mark.parametrize("spread", [0, 3, 13])
def test_mxfp4_comes_out_exactly(spread: int) -> None:
    """Also blocks of 16 whose own largest value is small: that is up to 2^3 more of a spread."""
    weight = mxfp4(spread)
    weight[0], weight[1, :16] = 0, 0
    (exact,) = plainly([weight], "power-of-two")
    assert torch.equal(exact.dequantize(), weight)
    (largest,) = plainly([weight], "max")
    assert not torch.equal(largest.dequantize(), weight)


def test_scales_are_powers_of_two_and_nothing_is_cut_off() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    (got,) = plainly([weight], "power-of-two")
    for scales in (got.block_scale.float(), got.global_scale):
        assert torch.all(torch.frexp(scales).mantissa == 0.5)
    assert got.block_scale.float().max() == 256
    step = got.block_scale.float() * got.global_scale
    blocks = weight.float().unflatten(-1, (-1, 16)).abs().amax(-1)
    assert torch.all(blocks <= 6 * step) and torch.all(blocks > 3 * step)


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    """The whole way, beside Transformers' own dequantized weights."""
    source = gpt_oss_mxfp4(tmp_path / "mxfp4", 64)
    theirs = transformers.GptOssForCausalLM.from_pretrained(
        source, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype="bfloat16"
    ).state_dict()
    checkpoints.convert(source, tmp_path / "out", scales="power-of-two")
    report = json.loads((tmp_path / "out" / REPORT_DATA).read_text())
    assert {e for layer in report["layers"] for errors in layer["errors"] for e in errors} == {0.0}
    written = reference.read_folder(tmp_path / "out")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        both, down = theirs[f"{prefix}.gate_up_proj"], theirs[f"{prefix}.down_proj"]
        for expert in range(len(down)):
            for name, want in (
                ("gate", both[expert, :, 0::2]),
                ("up", both[expert, :, 1::2]),
                ("down", down[expert]),
            ):
                got = reference.weight(written, f"{prefix}.{expert}.{name}_proj")
                np.testing.assert_array_equal(got, want.T.double().numpy())


def test_a_user_of_mxfp4_hears_of_it(tmp_path: Path) -> None:
    gpt_oss_mxfp4(tmp_path / "mxfp4", 64)
    checkpoints.build("mixtral").save_pretrained(tmp_path / "bf16")

    def said(name: str, **options: Any) -> bool:
        with Checkpoint(tmp_path / name) as checkpoint:
            return "--scales power-of-two" in " ".join(plan(checkpoint, Options(**options)).notes)

    assert said("mxfp4")
    assert not said("mxfp4", scales="power-of-two")
    assert not said("bf16")
