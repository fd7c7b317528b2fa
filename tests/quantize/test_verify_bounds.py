"""What ``verify`` compares weights with: bits that stay the same, and bounds that damage breaks."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.calibration.samples import digest_of
from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.nvfp4.format import NvFp4, encode, global_scale, round_to_e4m3
from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.kernels.kernel import quantize_weights
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.scales import RULES
from quantize.run.made import ARITHMETIC
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan
from quantize.verify import Report, verify
from quantize.verify.blocks import COLUMNS, ROWS, compare_blocks
from tests.quantize import reference
from tests.quantize.checkpoints import convert
from tests.quantize.test_cli import run
from tests.trained import Sizes

Folders = Callable[[str], Path]

DIGESTS = {
    2: {
        "max": "95efa7d76777b641",
        "four-six": "b4d02ac2ad3ce197",
        "mse": "de07f33b069b2867",
        "unbiased": "893aee4865945b1c",
        "power-of-two": "c75bfaa857776b09",
    },
}
"""By ``ARITHMETIC``: of what each rule makes of the weight below."""


def weight() -> torch.Tensor:
    """Numbers of many sizes, bfloat16 ``[32, 64]``, from integers alone."""
    n = torch.arange(32 * 64, dtype=torch.int64)
    mixed = (n * 2654435761) % 2**20
    values = (mixed - 2**19).double() * 2.0 ** -(18 + n % 7)
    return values.reshape(32, 64).bfloat16()


@pytest.mark.parametrize("rule", DIGESTS[ARITHMETIC])
def test_a_rule_gives_the_bits_that_it_gave(rule: str) -> None:
    """If this fails, ``verify`` would call good checkpoints bad: count ``ARITHMETIC`` up."""
    (found,) = quantize_weights([weight()], rule, for_device(torch.device("cpu")))
    digest = hashlib.sha256()
    for part in found.weight:
        digest.update(part.reshape(-1).view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[ARITHMETIC][rule]


def test_every_rule_has_a_digest() -> None:
    assert set(DIGESTS[ARITHMETIC]) == set(RULES)


# -- bounds ----------------------------------------------------------------------------------------


def rounded(original: torch.Tensor) -> NvFp4:
    scale = global_scale(original)
    blocks = round_to_e4m3(original.unflatten(-1, (-1, 16)).abs().amax(-1) / (6 * scale))
    return NvFp4(encode(original, blocks, scale), blocks, scale)


def normal(rows: int = 64, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_blocks_are_those_of_plain_arithmetic() -> None:
    original = normal()
    stored = rounded(original)
    found = compare_blocks(original, stored)
    restored = reference.dequantize(
        stored.codes.numpy(), stored.block_scale.view(torch.uint8).numpy(), float(stored[2])
    )
    lost = ((restored - original.numpy()) / float(stored[2])).reshape(64, 8, 16)
    np.testing.assert_allclose(found.noise, (lost**2).sum(-1), rtol=1e-4)
    whole = (original.numpy() / float(stored[2])).reshape(64, 8, 16)
    np.testing.assert_allclose(found.signal, (whole**2).sum(-1), rtol=1e-4)
    assert found.problem() is None
    row, block, share = found.worst()
    own = (lost**2).sum(-1) / np.maximum((whole**2).sum(-1), (whole**2).sum(-1).mean(1)[:, None])
    assert (row, block) == np.unravel_index(own.argmax(), own.shape)
    assert share == pytest.approx(own.max() ** 0.5, rel=1e-4)


BREAKS: dict[str, Callable[[NvFp4], NvFp4]] = {
    "a zeroed row": lambda w: w._replace(codes=w.codes.clone().index_fill_(0, torch.tensor(5), 0)),
    "a row with flipped signs": lambda w: w._replace(
        codes=torch.where(torch.arange(64)[:, None] == 5, w.codes ^ 0x88, w.codes)
    ),
    "a block scale of twice the size": lambda w: w._replace(block_scale=scaled(w.block_scale, 2.0)),
    "a block scale of a tenth": lambda w: w._replace(block_scale=scaled(w.block_scale, 0.1)),
    "a global scale of twice the size": lambda w: w._replace(global_scale=w.global_scale * 2),
    "two rows exchanged": lambda w: w._replace(
        codes=w.codes[torch.tensor([5, *range(1, 5), 0, *range(6, 64)])]
    ),
}


def scaled(block_scale: torch.Tensor, factor: float) -> torch.Tensor:
    values = block_scale.float()
    values[5, 3] *= factor
    return values.clamp(2.0**-9, 448).to(torch.float8_e4m3fn)


WIDE = {"a zeroed row", "a row with flipped signs", "a global scale of twice the size"}
"""What breaks even the bounds of roundings that let rows make up for each other."""


@pytest.mark.parametrize("what", BREAKS)
def test_damage_breaks_the_bound(what: str) -> None:
    original = normal()
    original[5, 48:64] *= 2  # larger than the row's average block
    original[7, 0] = 30  # so that no block's scale is the largest there is
    problem = compare_blocks(original, BREAKS[what](rounded(original))).problem()
    assert problem is not None
    assert "row 5" in problem or "row 0" in problem
    original[5] *= 2
    if what in WIDE:
        assert compare_blocks(original, BREAKS[what](rounded(original))).problem(ROWS) is not None


def test_tiny_blocks_and_rows_break_nothing() -> None:
    original = normal()
    original[3] *= 1e-6
    original[4, 16:32] *= 1e-6
    original[6] = 0
    assert compare_blocks(original, rounded(original)).problem() is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("correlated", [0.0, 0.9])
def test_roundings_stay_within_the_bound(method: str, correlated: float) -> None:
    """Inputs and gradients from a few directions, so that rounding moves values far."""
    generator = torch.Generator().manual_seed(1)
    original = normal(48, 64) * (0.2 + torch.rand(48, 1, generator=generator))

    def moments(size: int) -> torch.Tensor:
        common = torch.randn(512, 4, generator=generator) @ torch.randn(
            4, size, generator=generator
        )
        x = correlated * common + torch.randn(512, size, generator=generator) * (1 - correlated)
        return x.T @ x

    scale = global_scale(original)
    hessian, output = moments(64), moments(48)
    codes, blocks = METHODS[method].round(original, hessian, scale, output)
    bounds = ROWS if METHODS[method].needs_output_hessian else COLUMNS
    assert compare_blocks(original, NvFp4(codes, blocks, scale)).problem(bounds) is None


# -- whole checkpoints -----------------------------------------------------------------------------


def report(source: Path | None, target: Path) -> Report:
    with Checkpoint(target, decode=False) as quantized:
        if source is None:
            return verify(None, quantized)
        with Checkpoint(source) as original:
            return verify(original, quantized)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def forget(folder: Path) -> None:
    """As an earlier version of this package, or another tool with a gate contract, leaves it."""
    edit_json(folder / "config.json", lambda c: c["nvfp4_moe"].pop("made"))
    for file in folder.glob("nvfp4_moe_report.*"):
        file.unlink()


@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_that_does_not_say_how_it_was_made(
    rule: str, saved: Folders, tmp_path: Path
) -> None:
    convert(saved("qwen3_moe"), tmp_path / "out", scales=rule)
    forget(tmp_path / "out")
    found = report(saved("qwen3_moe"), tmp_path / "out")
    assert found.problems == []
    assert "not compared bit by bit" in " ".join(found.notes)

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("experts.1.up_proj.weight"):
                tensor[::5] = 0  # a fifth of the rows

    edit(tmp_path / "out", zero)
    problems = report(saved("qwen3_moe"), tmp_path / "out").problems
    assert len(problems) == 2
    for problem in problems:
        assert re.search(r"\d+ of 48 rows are not the source's: of row \d*[05], ", problem)
    assert "model.layers.0.mlp.experts.1.up_proj.weight" in problems[0]


def test_another_arithmetic_or_an_unknown_rule_is_said(saved: Folders, tmp_path: Path) -> None:
    source, out = saved("qwen3_moe"), tmp_path / "out"
    convert(source, out)
    for field, value in (("scales", "newer"), ("arithmetic", 99)):
        other = shutil.copytree(out, tmp_path / field)
        edit_json(
            other / "config.json",
            lambda c, f=field, v=value: c["nvfp4_moe"]["made"].update({f: v, "version": "9.9"}),
        )
        for file in other.glob("nvfp4_moe_report.*"):
            file.unlink()
        found = report(source, other)
        assert "with what rounding can lose" in " ".join(found.notes)
        assert all("nvfp4_moe_report" in problem for problem in found.problems)


def test_the_worst_weight_and_block_are_named(saved: Folders, tmp_path: Path) -> None:
    source, out = saved("qwen3_moe"), tmp_path / "out"
    convert(source, out)
    weights, written = reference.read_folder(source), reference.read_folder(out)
    for layer in report(source, out).layers:
        errors = {}
        for name, raw in weights.items():
            if name.startswith(f"{layer.prefix}."):
                exact = raw.array().astype(float)
                module = name.removesuffix(".weight")
                lost = reference.weight(written, module) - exact
                errors[module] = (lost**2).sum() / (exact**2).sum()
        assert layer.worst is not None
        assert layer.worst.module == max(errors, key=lambda name: errors[name])
        assert layer.worst.relative == pytest.approx(errors[layer.worst.module] ** 0.5, rel=1e-4)
        assert layer.relative <= layer.worst.relative < layer.worst.block


def test_a_calibrated_trained_model_stays_within_the_bounds(
    each_trained: Path, tmp_path: Path
) -> None:
    """Without the report and without knowing the method, so that only bounds are left."""
    sizes = Sizes.of(each_trained)
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(0, sizes.vocabulary, (4, 128), generator=random)
    for method in ("gptq", "two-sided"):
        target = tmp_path / method
        settings = Calibration("text", *rows.shape, digest_of(rows), method=method)
        with Checkpoint(each_trained) as checkpoint:
            options = Options(include=(f"*.layers.{sizes.sparse[-1]}.*",), calibration=settings)
            execute(checkpoint, plan(checkpoint, options), target, samples=rows)
        assert report(each_trained, target).problems == []
        forget(target)
        assert report(each_trained, target).problems == []


# -- DST alone -------------------------------------------------------------------------------------


def take(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


EXPERT = "model.layers.1.mlp.experts.2"


def drop_expert(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1.mlp.experts.3." in name]:
        del tensors[name]


ALONE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no codes": (take(f"{EXPERT}.up_proj.weight"), f"{EXPERT}.up_proj.weight is missing"),
    "no block scales": (take(f"{EXPERT}.up_proj.weight_scale"), "up_proj.weight_scale is missing"),
    "no input scale": (take(f"{EXPERT}.up_proj.input_scale"), "up_proj.input_scale is missing"),
    "a NaN block scale": (
        lambda t: t[f"{EXPERT}.up_proj.weight_scale"].view(torch.uint8)[3].fill_(0x7F), "NaN",
    ),
    "another global scale": (
        lambda t: t[f"{EXPERT}.up_proj.weight_scale_2"].mul_(1.01), "have different global scales",
    ),
    "an implausible input scale": (
        lambda t: t[f"{EXPERT}.down_proj.input_scale"].fill_(1e30), "input scale of 1e+30",
    ),
    "an expert less": (drop_expert, "has 3 experts, but there should be 4"),
    "a projection less": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{EXPERT}.gate_proj.")],
        f"{EXPERT}.gate_proj is missing",
    ),
    "codes of another shape": (
        lambda t: t.update({f"{EXPERT}.up_proj.weight": t[f"{EXPERT}.up_proj.weight"][:-1]}),
        "expected",
    ),
    "a linear that nobody ignores": (
        lambda t: t.update({"model.layers.0.new.weight": torch.zeros(4, 4)}),
        "the ignore list lacks model.layers.0.new",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ALONE)
def test_a_checkpoint_alone(what: str, saved: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(saved("qwen3_moe"), out, activations=True)
    assert report(None, out).problems == []
    change, message = ALONE[what]
    edit(out, change)
    result = run("verify", out)
    assert result.exit_code == 1
    assert message in result.stderr


def test_the_command_with_one_folder(saved: Folders, tmp_path: Path) -> None:
    convert(saved("qwen3_moe"), tmp_path / "out")
    result = run("verify", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "No problems found" in result.stdout
    assert "only the checkpoint's own parts were compared" in result.stderr
    edit_json(
        tmp_path / "out" / "config.json", lambda c: c["quantization_config"].update(ignore=[])
    )
    result = run("verify", tmp_path / "out")
    assert result.exit_code == 1
    assert "the ignore list lacks embed_out" in result.stderr


def test_config_and_tensors_must_agree_on_activations(saved: Folders, tmp_path: Path) -> None:
    source = saved("qwen3_moe")
    for name, activations in (("weights", False), ("both", True)):
        convert(source, tmp_path / name, activations=activations)
        assert report(source, tmp_path / name).problems == []
    for name, other in (("weights", "both"), ("both", "weights")):
        mixed = shutil.copytree(tmp_path / name, tmp_path / f"mixed-{name}")
        shutil.copy(tmp_path / other / "model.safetensors", mixed)
        for original in (source, None):
            problems = " ".join(report(original, mixed).problems)
            assert "input_scale" in problems
            word = "is missing" if name == "both" else "config.json says"
            assert word in problems
