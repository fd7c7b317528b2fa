"""``--calibrate``: closer than without, the same after an interruption, sane for every expert."""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
)

from benchmarks.m3_checkpoint import Model
from quantize.calibration.budget import needed
from quantize.calibration.samples import digest_of, load_samples
from quantize.calibration.store import Store
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.execute import execute
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.rounding.method import Job
from quantize.report import loads
from quantize.run.files import write_json
from quantize.run.options import MIN_TOKENS, Calibration, Options
from quantize.run.plan import plan
from quantize.run.report_files import REPORT_DATA
from quantize.run.shards import header
from quantize.verify import verify
from tests.quantize import reference
from tests.trained import Sizes

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, LENGTH = 24, 256

SOME = Options(include=("*.layers.[13].*",))
"""Two layers of all, and the faster method: it takes a while."""
GPTQ = {"method": "gptq"}
TWO_SIDED = {"method": "two-sided"}


@pytest.fixture(scope="module")
def rows(trained: Path, text: Path) -> torch.Tensor:
    return load_samples(text, trained, ROWS, LENGTH)


def calibrated(
    source: Path, target: Path, rows: torch.Tensor, options: Options = SOME, **more: Any
) -> Path:
    settings = Calibration("text", *rows.shape, digest_of(rows), **more.pop("settings", GPTQ))
    with Checkpoint(source) as checkpoint:
        steps = plan(checkpoint, replace(options, calibration=settings, activations=True))
        execute(checkpoint, steps, target, samples=rows, **more)
    return target


@pytest.fixture(scope="module")
def whole_of(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """``whole_of(folder)``: two of a model's layers, calibrated; treat as read-only."""

    @functools.cache
    def whole_of(folder: Path) -> Path:
        torch.set_num_threads(1)
        rows = load_samples(text, folder, ROWS, LENGTH)
        return calibrated(folder, tmp_path_factory.mktemp("calibrated") / "out", rows)

    return whole_of


@pytest.fixture(scope="module")
def whole(trained: Path, whole_of: Callable[[Path], Path]) -> Path:
    return whole_of(trained)


def fill(experts: Any, written: dict[str, Any], prefix: str) -> None:
    """Give Transformers' ``experts`` what was written of them, dequantized by the tests' reader."""

    def weight(expert: int, name: str) -> torch.Tensor:
        base = f"{prefix}.{expert}.{name}.weight"
        parts = (written[f"{base}{end}"].array() for end in ("", "_scale", "_scale_2"))
        packed, bits, scale = parts
        return torch.from_numpy(reference.dequantize(packed, bits, float(scale.item()))).float()

    for e in range(len(experts.down_proj)):
        experts.gate_up_proj.data[e] = torch.cat((weight(e, "gate_proj"), weight(e, "up_proj")))
        experts.down_proj.data[e] = weight(e, "down_proj")


def experts_output(
    source: Path, folder: Path | None, rows: torch.Tensor, layers: tuple[int, ...] = (1, 3)
) -> list[torch.Tensor]:
    """What some layers' routed experts make of the original model's states, by Transformers.

    ``folder``: the quantized checkpoint whose experts, dequantized by the tests' own reader, are in
    their place.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    written = reference.read_folder(folder) if folder else None
    outputs: list[torch.Tensor] = []
    for number, layer in enumerate(model.model.layers):
        if number not in layers:
            continue
        experts = layer.mlp.experts
        originals = experts.gate_up_proj.data.clone(), experts.down_proj.data.clone()

        def hook(
            module: Any, inputs: Any, output: torch.Tensor, originals: Any = originals,
            prefix: str = f"model.layers.{number}.mlp.experts",
        ) -> None:  # fmt: skip
            if written is None:
                outputs.append(output)
                return
            fill(module, written, prefix)
            outputs.append(type(module).forward(module, *inputs))
            module.gate_up_proj.data, module.down_proj.data = originals

        experts.register_forward_hook(hook)
    with torch.no_grad():
        model(input_ids=rows, use_cache=False)
    return outputs


def test_experts_are_closer_than_without(
    each_trained: Path, text: Path, whole_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    """On text that it was not calibrated with, beside the best rule without calibration."""
    with Checkpoint(each_trained) as checkpoint:
        execute(checkpoint, plan(checkpoint, replace(SOME, scales="mse")), tmp_path / "mse")
    others = load_samples(text, each_trained, 2 * ROWS + 1, LENGTH)[1::8]
    folders = None, tmp_path / "mse", whole_of(each_trained)
    truth, plain, ours = (experts_output(each_trained, folder, others) for folder in folders)
    for exact, without, with_ in zip(truth, plain, ours, strict=True):
        assert (with_ - exact).norm() < 0.95 * (without - exact).norm()


def test_the_default_method_is_closer_still(
    trained: Path, whole: Path, rows: torch.Tensor, tmp_path: Path
) -> None:
    """On the text of the calibration; on other text, with so little of it, the two are alike."""
    target = calibrated(
        trained, tmp_path / "out", rows, Options(include=("*.layers.1.*",)), settings={}
    )
    truth, first, second = (
        experts_output(trained, folder, rows, (1,))[0] for folder in (None, whole, target)
    )
    assert (second - truth).norm() < 0.99 * (first - truth).norm()


def test_nothing_else_changes(trained: Path, whole: Path) -> None:
    before, after = load_file(trained / "model.safetensors"), load_file(whole / "model.safetensors")
    for name, tensor in before.items():
        if ".experts." not in name:
            assert torch.equal(tensor, after[name]), name
    assert not (whole / ".nvfp4_moe").exists()
    with Checkpoint(trained) as original, Checkpoint(whole, decode=False) as quantized:
        assert verify(original, quantized).problems == []


def twice_the_largest(x: torch.Tensor) -> float:
    """ModelOpt's formula, so that as much again is not clipped."""
    return 2 * float(x.detach().abs().max()) / (6 * 448)


def headroom(x: torch.Tensor) -> float:
    """ModelOpt's ``nvfp4_act_headroom``, with percentiles of the numbers themselves."""
    blocks = x.detach().unflatten(-1, (-1, 16)).abs().amax(-1).flatten().double().sort().values
    upper = blocks[math.ceil(0.9999 * len(blocks)) - 1]
    blocks = blocks[blocks > upper / 1e6]
    anchor = blocks[math.ceil(0.01 * len(blocks)) - 1]
    return float(max(16384 * anchor, upper)) / (6 * 448)


@pytest.mark.parametrize(
    ("method", "rule", "of", "within"),
    [
        ("gptq", "max", twice_the_largest, 1e-4),
        (None, "max", twice_the_largest, 1e-4),
        (None, "headroom", headroom, 0.07),
    ],
)
def test_input_scales_are_those_of_what_experts_are_given(
    trained: Path,
    whole: Path,
    rows: torch.Tensor,
    tmp_path: Path,
    method: str | None,
    rule: str,
    of: Callable[[torch.Tensor], float],
    within: float,
) -> None:
    """Calibrated, and gathered alone: then down's are those of the original gate and up."""
    if method is None:
        settings = {"method": None, "input_scale_rule": rule}
        whole = calibrated(trained, tmp_path / "out", rows, settings=settings)
        report = loads((whole / REPORT_DATA).read_text())
        assert report.input_scales is not None
        assert report.input_scales.input_scale_rule == rule
    model: Any = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for number, layer in enumerate(model.model.layers[1:], 1):
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, inputs, n=number: seen.__setitem__(n, inputs[:2])
        )
    with torch.no_grad():
        model(input_ids=rows, use_cache=False)
    with safe_open(whole / "model.safetensors", "pt") as file:
        for number, (x, ids) in seen.items():
            for expert in range(Sizes.of(trained).experts):
                chosen = (ids == expert).any(1)
                if number not in (1, 3) or int(chosen.sum()) < MIN_TOKENS:
                    continue
                want = of(x[chosen])
                base = f"model.layers.{number}.mlp.experts.{expert}"
                for name in ("gate_proj", "up_proj"):
                    got = float(file.get_tensor(f"{base}.{name}.input_scale"))
                    assert got == pytest.approx(want, rel=within)
                if method is None:
                    experts = model.model.layers[number].mlp.experts
                    gate, up = (x[chosen] @ experts.gate_up_proj[expert].T).chunk(2, -1)
                    gate, up = gate.clamp(max=7), up.clamp(-7, 7)  # SwiGLU-OAI, as published
                    given = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                    want = of(given)
                    got = float(file.get_tensor(f"{base}.down_proj.input_scale"))
                    assert got == pytest.approx(want, rel=within)


def test_experts_with_few_tokens_get_the_layers_ranges(
    trained: Path, rows: torch.Tensor, tmp_path: Path
) -> None:
    """Of twelve tokens no expert gets many."""
    target = calibrated(trained, tmp_path / "out", rows[:1, :12])
    with Checkpoint(trained) as checkpoint:
        execute(checkpoint, plan(checkpoint, replace(SOME, scales="mse")), tmp_path / "mse")
    got, plain = (load_file(folder / "model.safetensors") for folder in (target, tmp_path / "mse"))
    experts = range(Sizes.of(trained).experts)
    for layer in (1, 3):
        base = f"model.layers.{layer}.mlp.experts"
        for name in ("gate_proj", "up_proj", "down_proj"):
            scales = {float(got[f"{base}.{e}.{name}.input_scale"]) for e in experts}
            assert len(scales) == 1
            assert 0 < scales.pop() < 1
            for end in ("weight", "weight_scale"):
                assert torch.equal(
                    got[f"{base}.7.{name}.{end}"].view(torch.uint8),
                    plain[f"{base}.7.{name}.{end}"].view(torch.uint8),
                )


def test_every_expert_gets_every_token(trained: Path, rows: torch.Tensor, tmp_path: Path) -> None:
    target = calibrated(
        trained, tmp_path / "out", rows[:1, :64], settings=GPTQ | {"every_expert": True}
    )  # fmt: skip
    with safe_open(target / "model.safetensors", "pt") as file:
        base = "model.layers.1.mlp.experts"
        experts = range(Sizes.of(trained).experts)
        scales = {float(file.get_tensor(f"{base}.{e}.up_proj.input_scale")) for e in experts}
        assert len(scales) == 1


def divergence(source: Path, folder: Path, rows: torch.Tensor, layer: int) -> float:
    """Mean KL, in nats, of Transformers' model from itself with a layer's experts from ``folder``,
    dequantized by the tests' own reader."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        truth = model(input_ids=rows, use_cache=False).logits.log_softmax(-1)
        experts, prefix = model.model.layers[layer].mlp.experts, f"model.layers.{layer}.mlp.experts"
        fill(experts, reference.read_folder(folder), prefix)
        found = model(input_ids=rows, use_cache=False).logits.log_softmax(-1)
    return float((truth.exp() * (truth - found)).sum(-1).mean())


def test_two_sided_is_closer_in_what_the_model_says(
    each_trained: Path, text: Path, tmp_path: Path
) -> None:
    """On the text of the calibration; on other text, with so little of it, the two are alike. By
    how much hangs on the rows: more than a tenth with earlier ones, a twentieth with these."""
    rows, last = load_samples(text, each_trained, ROWS, LENGTH), Sizes.of(each_trained).sparse[-1]
    found = []
    for method in ("descent", "two-sided"):
        target = tmp_path / method
        only = Options(include=(f"*.layers.{last}.*",))
        calibrated(each_trained, target, rows, only, settings={"method": method})
        found.append(divergence(each_trained, target, rows[::3], last))
    assert found[1] < 0.97 * found[0]


class Stopped(BaseException):
    """As a kill would."""


def interrupted(moment: float, *args: Any, **more: Any) -> list[int]:
    """:func:`calibrated`, stopped at ``moment``; of how many layers it spoke."""
    spoken: list[int] = []

    def stop(done: float, layers: int, _: str) -> None:
        spoken.append(layers)
        if done >= moment:
            raise Stopped

    with pytest.raises(Stopped):
        calibrated(*args, calibrating=stop, **more)
    return spoken


def resumed(*args: Any, **more: Any) -> list[float]:
    """:func:`calibrated`, going on with what is there; how much was done, each time it said so."""
    done: list[float] = []
    calibrated(*args, resume=True, calibrating=lambda now, *_: done.append(now), **more)
    return done


@pytest.fixture(scope="module")
def few(rows: torch.Tensor) -> torch.Tensor:
    """Less text, for what does not depend on it."""
    return rows[:3]


@pytest.fixture(scope="module")
def with_few(trained: Path, few: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``whole``, with less text; treat as read-only."""
    torch.set_num_threads(1)
    return calibrated(trained, tmp_path_factory.mktemp("with_few") / "out", few)


@pytest.mark.parametrize("moment", [1.0, 1.6, 3.9])
def test_an_interrupted_run_goes_on(
    trained: Path, with_few: Path, few: torch.Tensor, tmp_path: Path, moment: float
) -> None:
    target = tmp_path / "out"

    interrupted(moment, trained, target, few)
    assert not (target / "config.json").exists()
    again = resumed(trained, target, few)
    assert min(again) == int(moment)  # nothing is done twice but the layer that was being done
    for name in ("model.safetensors", "config.json"):
        assert (target / name).read_bytes() == (with_few / name).read_bytes()


@pytest.fixture(scope="module")
def forward_backward(
    trained: Path, rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same two layers, two-sided, with less text; treat as read-only."""
    torch.set_num_threads(1)
    target = tmp_path_factory.mktemp("forward_backward") / "out"
    return calibrated(trained, target, rows[:1], SOME, settings=TWO_SIDED)


@pytest.mark.parametrize("moment", [1.2, 4.5, 6.4])
def test_an_interrupted_run_goes_on_forward_and_backward(
    trained: Path, forward_backward: Path, rows: torch.Tensor, tmp_path: Path, moment: float
) -> None:
    """Four layers forward, the model's end, and three layers backward."""
    target = tmp_path / "out"

    assert set(interrupted(moment, trained, target, rows[:1], SOME, settings=TWO_SIDED)) == {8}
    again = resumed(trained, target, rows[:1], SOME, settings=TWO_SIDED)
    assert min(again) == int(moment)
    name = "model.safetensors"
    assert (target / name).read_bytes() == (forward_backward / name).read_bytes()


@pytest.mark.parametrize("damage", ["states-00001.000", "gradients-00003.000"])
def test_what_is_needed_for_the_backward_pass_is_looked_at(
    trained: Path, forward_backward: Path, rows: torch.Tensor, tmp_path: Path, damage: str
) -> None:
    target = tmp_path / "out"

    interrupted(6.1, trained, target, rows[:1], SOME, settings=TWO_SIDED)
    (target / ".nvfp4_moe" / "calibration" / "states" / damage).unlink()
    again = resumed(trained, target, rows[:1], SOME, settings=TWO_SIDED)
    assert min(again) == 0
    name = "model.safetensors"
    assert (target / name).read_bytes() == (forward_backward / name).read_bytes()


@pytest.mark.parametrize("damage", ["states", "staged", "both staged", "findings", "half"])
def test_what_an_interrupted_run_left_is_looked_at(
    trained: Path, with_few: Path, few: torch.Tensor, tmp_path: Path, damage: str
) -> None:
    """States that are missing would be zeros, and experts calibrated for them."""
    target = tmp_path / "out"

    interrupted(3, trained, target, few)
    folder = target / ".nvfp4_moe" / "calibration"
    (staged,) = folder.parent.glob("*.rounded")
    (findings,) = [file for file in folder.glob("*.json") if file.name != "next.json"]
    if damage == "states":
        next((folder / "states").glob("states-*")).unlink()
    elif damage == "findings":
        findings.write_text('{"prefix": "x"}')
    elif damage == "half":
        os.truncate(staged, staged.stat().st_size // 2)
    else:
        staged.unlink()
        if damage == "both staged":
            findings.unlink()
    calibrated(trained, target, few, resume=True)
    name = "model.safetensors"
    assert (target / name).read_bytes() == (with_few / name).read_bytes()


def test_a_full_disk_is_an_error_not_a_signal(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(QuantizeError, match=r"calibration needs 4\.0 GB here .No space left"):
        Store(tmp_path).new("x", (10**9,), torch.float32)
    assert [file.name for file in tmp_path.iterdir()] in ([], ["index.json"])


def test_other_text_is_another_run(trained: Path, few: torch.Tensor, tmp_path: Path) -> None:
    interrupted(1, trained, tmp_path / "out", few)
    with pytest.raises(QuantizeError, match="another source, options or version"):
        calibrated(trained, tmp_path / "out", few[1:], resume=True)


def test_a_428_b_model_fits_24_gb(tmp_path: Path) -> None:
    """The arithmetic, with MiniMax-M3's sizes and the default text."""
    model = Model(layers=2, heads=64, vocabulary=200064)
    write_json(tmp_path / "config.json", model.config())
    tensors = list(model.tensors())
    weights = (
        tmp_path / "model-00001-of-00002.safetensors",
        tmp_path / "model-00002-of-00002.safetensors",
    )
    for file, part in zip(weights, (tensors[::2], tensors[1::2]), strict=True):
        first = header(part)
        with file.open("wb") as hollow:
            hollow.write(first)
            hollow.truncate(len(first) + sum(out.nbytes for out in part))
    with Checkpoint(tmp_path) as checkpoint:
        steps = plan(checkpoint, Options(calibration=Calibration("text", 128, 2048, "")))
        for device in ("cpu", "cuda"):
            budget = needed(checkpoint, steps, torch.device(device))
            assert 2e9 < budget.memory < 16e9
            assert 1e10 < budget.states < 3e10


def test_a_source_that_changed_is_calibrated_again(
    trained: Path, few: torch.Tensor, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained, source)

    interrupted(2, source, tmp_path / "out", few)
    os.utime(source / "model.safetensors", (1, 1))
    again = resumed(source, tmp_path / "out", few)
    assert min(again) == 0


def test_experts_rounded_together_are_those_rounded_one_by_one(
    trained: Path,
    few: torch.Tensor,
    with_few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seven at once, which is no divisor of how many there are."""
    counts = []

    def together(jobs: Iterable[Job], count: int) -> list[Any]:
        rounded = [METHODS["gptq"].round(*job) for job in jobs]
        assert len(rounded) == count
        counts.append(count)
        return rounded

    gptq = replace(METHODS["gptq"], together=together)
    monkeypatch.setattr("quantize.calibration.quantizer.METHODS", {"gptq": gptq})
    monkeypatch.setattr("quantize.calibration.quantizer.side_by_side", lambda *_: 7)
    target = calibrated(trained, tmp_path / "out", few)
    assert 7 in counts
    got, want = (load_file(folder / "model.safetensors") for folder in (target, with_few))
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, want[name]))), name
