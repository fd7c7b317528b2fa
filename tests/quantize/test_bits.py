"""``--bits``: the best choice of formats by losses that are the model's, written and verified."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from quantize.calibration import bits as measuring
from quantize.calibration.bits import within_bits
from quantize.calibration.samples import digest_of
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.evaluate.activations import Nvfp4Inputs
from quantize.execute import execute
from quantize.layouts import LAYOUTS, compressed_tensors
from quantize.report import loads
from quantize.run.bits import Choice, bits_of, choose, formats_of
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan
from quantize.verify import verify
from tests.quantize import checkpoints, reference
from tests.quantize.damages import with_config, with_tensors
from tests.quantize.test_cli import refusal, run

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS = [f"model.layers.{n}.mlp.experts" for n in range(4)]
FORMATS = dict(zip(EXPERTS, ("nvfp4", "fp8", "mxfp8", "bf16"), strict=True))
SIZES = {
    "hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
TEXTS, LENGTH = 8, 32


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE, whose blocks every format has."""
    folder = tmp_path_factory.mktemp("bits") / "source"
    checkpoints.build("qwen3_moe", **SIZES).save_pretrained(folder)
    return folder


def mixed(source: Path, target: Path, **options: Any) -> Path:
    """What ``--bits`` would write, had it chosen ``FORMATS``."""
    others = tuple((p, f) for p, f in FORMATS.items() if f != "nvfp4")
    with Checkpoint(source) as checkpoint:
        steps = plan(checkpoint, Options(bits=9.5, formats=others, **options))
        taken = sum(map(bits_of, FORMATS.values())) / 4
        losses = {prefix: {"nvfp4": 1.0, "bf16": 0.0, FORMATS[prefix]: 0.1} for prefix in FORMATS}
        execute(checkpoint, replace(steps, choice=Choice(9.5, taken, FORMATS, losses)), target)
    return target


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        layout: mixed(source, tmp_path_factory.mktemp(layout) / "out", layout=layout)
        for layout in LAYOUTS
    }


def problems(source: Path | None, target: Path) -> list[str]:
    with Checkpoint(target, decode=False) as quantized:
        if source is None:
            return verify(None, quantized).problems
        with Checkpoint(source) as original:
            return verify(original, quantized).problems


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_is_better(seed: int) -> None:
    """Beside all that there are."""
    dice = random.Random(seed)
    names = ["nvfp4", "fp8", "mxfp8", "bf16"]
    weights = {f"layers.{n}.experts": dice.choice([1024, 1024, 3072]) for n in range(5)}
    losses = {
        p: {f: dice.random() / bits_of(f) for f in names if f in ("nvfp4", "bf16") or n % 3}
        for n, p in enumerate(weights)
    }
    budget = dice.uniform(4.5, 15.5)
    total = sum(weights.values())
    best = min(
        sum(losses[p][f] for p, f in zip(weights, formats, strict=True))
        for formats in itertools.product(names, repeat=len(weights))
        if "nvfp4" in formats
        and all(f in losses[p] for p, f in zip(weights, formats, strict=True))
        and sum(bits_of(f) * n for n, f in zip(weights.values(), formats, strict=True))
        <= budget * total
    )
    found = choose(weights, losses, budget)
    assert found.loss == pytest.approx(best, rel=1e-12)
    assert found.taken <= budget
    assert found.taken == sum(bits_of(found.formats[p]) * n for p, n in weights.items()) / total
    assert "nvfp4" in found.formats.values()


def test_the_smallest_budget_is_all_nvfp4() -> None:
    losses = {p: {"nvfp4": 1.0, "fp8": 0.1, "bf16": 0.0} for p in EXPERTS}
    assert set(choose(dict.fromkeys(EXPERTS, 48), losses, 4.5).formats.values()) == {"nvfp4"}


def decoded(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """A weight in 8 bits, by the formats' definitions."""
    codes = tensors[f"{module}.weight"].double()
    scale = tensors.get(f"{module}.weight_scale_inv", tensors.get(f"{module}.weight_scale"))
    assert scale is not None
    if scale.dtype == torch.uint8:
        return codes * (scale.double() - 127).exp2().repeat_interleave(32, 1)
    grid = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert grid.shape == codes.shape
    return codes * grid


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layer_has_its_format(
    source: Path, made: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    """8 bits are the source's weights; NVFP4 is what it is without ``--bits``; bf16 is copied."""
    checkpoints.convert(source, tmp_path / "all", layout=layout)
    original = load_file(source / "model.safetensors")
    whole = load_file(tmp_path / "all/model.safetensors")
    found = load_file(made[layout] / "model.safetensors")
    for prefix, name in FORMATS.items():
        own = {key: value for key, value in found.items() if key.startswith(f"{prefix}.")}
        if name in ("nvfp4", "bf16"):
            same = whole if name == "nvfp4" else original
            assert own.keys() == {key for key in same if key.startswith(f"{prefix}.")}
            assert all(torch.equal(same[key], value) for key, value in own.items())
            continue
        # In ModelOpt's layout vLLM reads experts in FP8 by DeepSeek's names.
        inverse = layout == "modelopt" and name == "fp8"
        scale = "weight_scale_inv" if inverse else "weight_scale"
        assert {key.rpartition(".")[2] for key in own} == {"weight", scale}
        for expert in range(4):
            for kind in checkpoints.PROJECTIONS:
                module = f"{prefix}.{expert}.{kind}"
                weight = original[f"{module}.weight"].double()
                error = (decoded(found, module) - weight).norm() / weight.norm()
                assert 0.02 < error < 0.03


@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_own_reader(source: Path, made: dict[str, Path], layout: str) -> None:
    found = load_file(made[layout] / "model.safetensors")
    with Checkpoint(made[layout]) as checkpoint:
        for prefix in EXPERTS[1:3]:
            module = f"{prefix}.2.up_proj"
            weight = decoded(found, module).float()
            assert torch.equal(checkpoint.load(f"{module}.weight"), weight)
            assert checkpoint.format_of(f"{module}.weight") == FORMATS[prefix]


def test_stacked_experts_too(tmp_path: Path) -> None:
    """Gate and up are one tensor there, of which each is cut into blocks alone."""
    model = checkpoints.build("qwen3_moe", **SIZES)
    fused = dict(model.state_dict())
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    apart = checkpoints.save(tmp_path / "apart", checkpoints.per_expert(fused), config)
    stacked = checkpoints.save(tmp_path / "stacked", fused, config)
    one, other = (
        load_file(mixed(folder, folder.with_suffix(".out")) / "model.safetensors")
        for folder in (apart, stacked)
    )
    for name in one:
        if not name.startswith(EXPERTS[3]):
            assert torch.equal(one[name], other[name]), name
    assert torch.equal(other[f"{EXPERTS[3]}.down_proj"], fused[f"{EXPERTS[3]}.down_proj"])
    assert problems(stacked, tmp_path / "stacked.out") == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base", [None, "fp8", "mxfp8"])
def test_verify_finds_nothing(source: Path, layout: str, base: str | None, tmp_path: Path) -> None:
    """Also beside linears in the same formats."""
    target = mixed(source, tmp_path / "out", layout=layout, base=base)
    assert problems(source, target) == []
    assert problems(None, target) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("number", [1, 2])
def test_verify_finds_damage(
    source: Path, made: dict[str, Path], layout: str, number: int, tmp_path: Path
) -> None:
    module = f"{EXPERTS[number]}.3.down_proj"
    scale = next(
        name for name in load_file(made[layout] / "model.safetensors")
        if name.startswith(f"{module}.weight_scale")
    )  # fmt: skip

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{module}.weight"].view(torch.uint8)[5, 7] ^= 1

    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors[scale] = tensors[scale] + (1 if number == 2 else tensors[scale])

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{module}.weight"], tensors[scale]

    for name, change in (("codes", flip), ("scale", double)):
        found = problems(source, with_tensors(made[layout], tmp_path / name, change))
        assert any(module in each and "is not what" in each for each in found), found
    lost = with_tensors(made[layout], tmp_path / "lost", lose)
    for of in (source, None):
        assert any(EXPERTS[number] in each for each in problems(of, lost))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_finds_another_config(
    source: Path, made: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    def changed(name: str, change: Callable[[dict[str, Any]], None]) -> list[str]:
        return problems(source, with_config(made[layout], tmp_path / name, change))

    def swap(config: dict[str, Any]) -> None:
        quantization = config["quantization_config"]
        if layout == "modelopt":
            layers = quantization["quantized_layers"]
            key = f"{EXPERTS[1]}.0.up_proj"
            layers[key] = layers[f"{EXPERTS[2]}.0.up_proj"]
        else:
            groups = quantization["config_groups"]
            groups["group_1"]["targets"][0] = f"{EXPERTS[1]}.0.up_proj"

    found = changed("swapped", swap)
    assert any("quantization_config" in each and "expected" in each for each in found), found
    found = changed("formats", lambda c: c["nvfp4_moe"]["made"]["formats"].pop(EXPERTS[1]))
    assert any("made.formats" in each for each in found), found
    found = changed("bits", lambda c: c["nvfp4_moe"]["made"].update(bits=5.0))
    assert any("made.bits" in each for each in found), found


@contextmanager
def experts_by_name() -> Iterator[None]:
    """Configs name each expert, as this package wrote them before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressed_tensors, "targets", lambda modules, *_: sorted(modules))
        yield


def named_by(folder: Path) -> list[str]:
    """The targets of all groups but the first."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    _, *groups = config["config_groups"].values()
    return [target for group in groups for target in group["targets"]]


def test_a_config_that_names_each_expert(source: Path, tmp_path: Path) -> None:
    with experts_by_name():
        folder = mixed(source, tmp_path / "old", layout="compressed-tensors")
    assert len(named_by(folder)) == 24 and f"{EXPERTS[1]}.3.up_proj" in named_by(folder)
    assert problems(source, folder) == problems(None, folder) == []
    checkpoints.convert(folder, tmp_path / "there", "modelopt", scales="mse")
    assert problems(folder, tmp_path / "there") == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_formats_that_vllms_class_cannot_read(
    source: Path, made: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    """A model that is served by MiniMax-M3's class. In the other layout it reads FP8."""

    def change(config: dict[str, Any]) -> None:
        config["architectures"] = ["MiniMaxM3SparseForCausalLM"]

    other = with_config(source, tmp_path / "source", change)
    target = with_config(made[layout], tmp_path / "out", change)  # with FP8, and complete
    said: list[str] = []
    options = Options(bits=9.5, layout=layout)
    there = chosen(other, target, options, tokens(), resume=True, say=said.append)
    assert "fp8" in dict(there.options.formats).values(), "what is complete stays so"
    told = [line for line in said if line.startswith("--bits: there are experts in fp8 already")]
    assert len(told) == (layout == "modelopt")
    said.clear()
    steps = chosen(other, tmp_path / "new", options, tokens(), say=said.append)
    lines = [line for line in said if line.startswith("--bits: no experts in fp8: vLLM's class ")]
    if layout == "modelopt":
        assert len(lines) == 1 and "models/minimax_m3/nvidia/model.py" in lines[0]
        formats = {name for losses in steps.choice.losses.values() for name in losses}
        assert formats == {"nvfp4", "mxfp8", "bf16"}
    else:
        assert lines == [] and "fp8" in dict(steps.options.formats).values()


def calibration(tokens: torch.Tensor) -> Calibration:
    return Calibration("text", *tokens.shape, digest_of(tokens), "gptq")


def tokens(vocabulary: int = 32, texts: int = TEXTS) -> torch.Tensor:
    return torch.randint(vocabulary, (texts, LENGTH), generator=torch.Generator().manual_seed(0))


def chosen(source: Path, target: Path, options: Options, text: torch.Tensor, **more: Any) -> Any:
    with Checkpoint(source) as checkpoint:
        steps = plan(checkpoint, replace(options, bits=None))
        steps = replace(steps, options=replace(steps.options, calibration=calibration(text)))
        cpu = torch.device("cpu")
        return within_bits(checkpoint, steps, options, text, target, cpu, **more)


def test_losses_are_the_models(source: Path, tmp_path: Path) -> None:
    """Beside the divergence of Transformers' own model, in float64, with a layer's experts decoded
    from what is written in the format."""
    text = tokens(texts=48)
    steps = chosen(source, tmp_path / "out", Options(bits=4.5, activations=False), text)

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float64, experts_implementation="eager"
        ).eval()

    original = model()
    with torch.no_grad():
        truth = original(text).logits.log_softmax(-1)
    folder = checkpoints.convert(source, tmp_path / "nvfp4") and tmp_path / "nvfp4"
    packed = reference.read_folder(folder)
    for prefix in EXPERTS:
        changed = model()
        experts = changed.get_submodule(prefix)
        for e in range(4):
            weights = [
                torch.from_numpy(reference.weight(packed, f"{prefix}.{e}.{name}"))
                for name in checkpoints.PROJECTIONS
            ]
            experts.gate_up_proj.data[e] = torch.cat(weights[:2])
            experts.down_proj.data[e] = weights[2]
        with torch.no_grad():
            found = changed(text).logits.log_softmax(-1)
        divergence = float((truth.exp() * (truth - found)).sum(-1).mean())
        # One token is drawn for a prediction, so the estimate has an error of its own.
        assert steps.choice.losses[prefix]["nvfp4"] == pytest.approx(divergence, rel=0.2), prefix
        assert steps.choice.losses[prefix]["bf16"] == 0


def test_inputs_are_rounded_as_kernels_do(source: Path, tmp_path: Path) -> None:
    """By what checkpoints say: NVFP4's where there are input scales, those of 8 bits always."""
    text = tokens()
    found = [
        chosen(source, tmp_path / str(on), Options(bits=4.5, activations=on), text).choice.losses
        for on in (False, True)
    ]
    for prefix in EXPERTS:
        assert found[1][prefix]["nvfp4"] > 1.3 * found[0][prefix]["nvfp4"]
        assert found[1][prefix]["fp8"] == found[0][prefix]["fp8"]
        # Weights and inputs each have a relative error of 0.026, NVFP4's weights of about 0.09.
        assert 0.05 < found[0][prefix]["fp8"] / found[0][prefix]["nvfp4"] < 0.3


@pytest.mark.parametrize("name", ["fp8", "mxfp8"])
def test_evaluate_rounds_inputs_of_8_bits(made: dict[str, Path], name: str) -> None:
    from quantize.calibration.expert_weights import ExpertWeights
    from quantize.experts.find import find
    from quantize.experts.gates import Gate

    torch.manual_seed(0)
    x = torch.randn(3, 128)
    with Checkpoint(made["modelopt"]) as checkpoint:
        group = next(g for g in find(checkpoint) if FORMATS[g.prefix] == name)
        own = ExpertWeights(
            group.gate_up(checkpoint, 0), group.down(checkpoint, 0), (), Gate("silu")
        )
        visitor = Nvfp4Inputs(checkpoint)
        visitor.begin(0, group, None)  # type: ignore[arg-type]
        found = visitor.expert(0, own, None).intermediate(x)  # type: ignore[arg-type]
    size = {"fp8": 128, "mxfp8": 32}[name]
    blocks = x.double().unflatten(1, (-1, size))
    scale = blocks.abs().amax(-1, keepdim=True) / 448
    scale = scale if name == "fp8" else scale.log2().ceil().exp2()
    codes = (blocks / scale).float().to(torch.float8_e4m3fn)
    rounded = (codes.double() * scale).flatten(1).float()
    assert torch.allclose(found, own.intermediate(rounded), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, own.intermediate(x), rtol=1e-4, atol=1e-6)


@pytest.fixture
def qwen(tmp_path: Path, trained: Path) -> Path:
    """A random Qwen3-MoE of three layers, with the trained model's tokenizer."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=128, max_position_embeddings=512,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "qwen")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(trained / name, tmp_path / "qwen" / name)
    return tmp_path / "qwen"


def test_the_command(
    qwen: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It chooses, writes what it says, goes on with what it has measured, and knows when it is
    done."""
    size = ("--calibration-rows", "8", "--calibration-length", "64", "--rounding", "gptq")
    command = ("quantize", qwen, tmp_path / "out", "--calibrate", text, *size, "--bits", "5.7")

    def interrupt(*_: Any, **__: Any) -> None:
        raise QuantizeError("interrupted here")

    with monkeypatch.context() as patch:
        patch.setattr("quantize.execute.calibrate", interrupt)
        assert run(*command).exit_code == 1
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "_Measuring", interrupt)
        result = run(*command, "--resume")
        assert result.exit_code == 0, result.output
        assert "--bits 5.7: 2 layers nvfp4; fp8 " in result.stderr
        assert run(*command, "--resume").exit_code == 0  # it is complete
    assert sorted(f.name for f in (tmp_path / "out").iterdir() if f.name.startswith(".")) == []
    report = loads((tmp_path / "out/nvfp4_moe_report.json").read_bytes()).bits
    assert report is not None
    assert (report.asked, report.taken) == (5.7, pytest.approx((2 * 4.5 + 8 + 1 / 512) / 3))
    gains = {p: losses["nvfp4"] - losses["fp8"] for p, losses in report.losses.items()}
    assert report.formats[max(gains, key=lambda p: gains[p])] == "fp8"
    assert problems(qwen, tmp_path / "out") == []
    page = (tmp_path / "out/nvfp4_moe_report.html").read_text()
    assert "experts in FP8" in page
    # Layers that stay NVFP4 are calibrated as if all did: benchmarks.bits rests on that.
    assert run(*command[:2], tmp_path / "all", *command[3:-1], "4.5").exit_code == 0
    found, whole = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "all"))
    for prefix, name in report.formats.items():
        names = [key for key in whole if key.startswith(f"{prefix}.")]
        same = all(key in found and torch.equal(found[key], whole[key]) for key in names)
        assert same is (name == "nvfp4")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (("--bits", "4.4", "--calibrate", "some.txt"), "give a number from 4.5 to less than 16"),
        (("--bits", "16", "--calibrate", "some.txt"), "give a number from 4.5 to less than 16"),
        (("--bits", "nan", "--calibrate", "some.txt"), "give a number from 4.5 to less than 16"),
        (("--bits", "5"), "--bits needs --calibrate"),
    ],
)
def test_what_the_command_refuses(
    source: Path, tmp_path: Path, what: tuple[str, ...], message: str, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.txt").write_text("x = 1\n")
    assert message in refusal("quantize", source, tmp_path / "out", *what, code=2)
    assert not (tmp_path / "out").exists()


def test_formats_that_fit(source: Path, saved: Callable[[str], Path]) -> None:
    """In blocks, and without biases."""
    for folder, formats in (
        (source, ["nvfp4", "fp8", "mxfp8", "bf16"]),
        (saved("qwen3_moe"), ["nvfp4", "bf16"]),  # 32 x 48
        (saved("gpt_oss"), ["nvfp4", "bf16"]),
    ):
        with Checkpoint(folder) as checkpoint:
            assert formats_of(plan(checkpoint, Options()).groups) == formats


def test_the_source_stays_as_it_is(source: Path, tmp_path: Path) -> None:
    """Also where losses would be measured first, into the target."""
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    (tmp_path / "some.txt").write_text("x = 1\n" * 500)
    said = refusal(
        "quantize", folder, folder, "--overwrite", "--bits", "5", "--calibrate",
        tmp_path / "some.txt", "--calibration-rows", "2", "--calibration-length", "16",
    )  # fmt: skip
    assert "is the source" in said
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert not (folder / ".nvfp4_moe").exists()
