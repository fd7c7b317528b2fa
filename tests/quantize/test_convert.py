"""From NVFP4 to NVFP4: codes and block scales bit for bit, factors as float32 has them.

The sources are made of random bits by numpy (``published.py``), and so is what must come of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantize.checkpoint.reader import Checkpoint
from quantize.cli.app import app
from quantize.errors import QuantizeError
from quantize.run.options import Options
from quantize.run.plan import plan
from quantize.verify import verify
from tests.quantize.checkpoints import EXPERTS, HIDDEN, build, convert, save
from tests.quantize.nvfp4_sources import (
    INTER,
    QUANTIZATION,
    SHAPES,
    SUFFIXES,
    Source,
    Tensors,
    stored,
)
from tests.quantize.published_nvfp4 import Nvfp4, nvfp4
from tests.quantize.stored_formats import E4M3, e2m1_pairs, tensor


def read(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def problems(source: Path | None, target: Path) -> list[str]:
    with Checkpoint(target, decode=False) as theirs:
        if source is None:
            return verify(None, theirs).problems
        with Checkpoint(source) as ours:
            return verify(ours, theirs).problems


LINEARS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "lm_head")


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("to", SUFFIXES)
@pytest.mark.parametrize("way", [*SUFFIXES, "stacked", "turned", "flat"])
def test_bits_are_kept(way: str, to: str, activations: bool, tmp_path: Path) -> None:
    """From each way to store NVFP4 to each layout, with input scales and without."""
    made = Source(LINEARS if way in SUFFIXES else ())
    layout = way if way in SUFFIXES else "compressed-tensors" if way == "flat" else "modelopt"
    tensors = made.tensors(way) if way in SUFFIXES else made.stacked(way)
    source = made.save(tmp_path / "source", layout, tensors)
    with Checkpoint(source) as checkpoint:
        assert checkpoint.formats == {"nvfp4"}
    convert(source, tmp_path / "target", layout=to, activations=None if activations else False)
    made.check(read(tmp_path / "target"), to, activations)
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    said = config["nvfp4_moe"]["made"]
    assert (said["converted"], said["activations"], said["layout"]) == (True, activations, to)
    report = json.loads((tmp_path / "target" / "nvfp4_moe_report.json").read_text())
    assert report["converted"] is True
    assert {e for layer in report["layers"] for errors in layer["errors"] for e in errors} == {0.0}
    page = (tmp_path / "target" / "nvfp4_moe_report.html").read_text()
    assert "what was NVFP4 in SRC keeps its bits" in page
    assert ("input scales SRC" in page) == activations
    ignored = set(config["quantization_config"]["ignore"])
    assert ignored.isdisjoint(made.made)
    assert ("lm_head" in ignored) == (way not in SUFFIXES)
    assert problems(source, tmp_path / "target") == []
    assert problems(None, tmp_path / "target") == []


@pytest.mark.parametrize("layout", SUFFIXES)
def test_weights_alone(layout: str, tmp_path: Path) -> None:
    """A source without input scales stays one, and nobody can ask for what nobody knows."""
    made = Source()
    source = made.save(tmp_path / "source", layout, made.tensors(layout, activations=False))
    for to in SUFFIXES:
        convert(source, tmp_path / to, layout=to)
        made.check(read(tmp_path / to), to, inputs=False)
        assert problems(source, tmp_path / to) == []
    message = "24 of 24 weights in NVFP4 have no input scale"
    with Checkpoint(source) as checkpoint, pytest.raises(QuantizeError, match=message):
        plan(checkpoint, Options(activations=True))


def test_some_input_scales_are_missing(tmp_path: Path) -> None:
    """As ModelOpt leaves out those of experts that it never saw at work."""
    made = Source()
    tensors = made.tensors("modelopt")
    missing = "model.layers.1.mlp.experts.2.up_proj"
    del tensors[f"{missing}.input_scale"]
    source = made.save(tmp_path / "source", "modelopt", tensors)
    with Checkpoint(source) as checkpoint:
        assert plan(checkpoint).notes == (
            f"Weights only: 1 of 24 NVFP4 weights have no input scale ({missing}.weight).",
        )
        with pytest.raises(QuantizeError, match=rf"1 of 24 .* \(first: {missing}.weight\)"):
            plan(checkpoint, Options(activations=True))
    convert(source, tmp_path / "target")
    made.check(read(tmp_path / "target"), "modelopt", inputs=False)
    assert problems(source, tmp_path / "target") == []


def test_what_is_excluded_is_dequantized(tmp_path: Path) -> None:
    """To bfloat16, as other formats are; so is an embedding, which no engine reads in NVFP4."""
    made = Source((*LINEARS, "model.embed_tokens"))
    source = made.save(tmp_path / "source", "modelopt", made.tensors("modelopt"))
    out = ("model.layers.0.mlp.experts", "model.embed_tokens", LINEARS[0])
    convert(source, tmp_path / "target", exclude=(f"*{out[0]}*", out[2]))
    left = [m for m in made.made if m.startswith(out)]
    assert len(left) == 3 * EXPERTS + 2
    for module in left:
        weight = torch.from_numpy(made.made.pop(module).weight)
        made.plain[f"{module}.weight"] = weight.bfloat16()
    made.check(read(tmp_path / "target"), "modelopt", inputs=True)
    assert problems(source, tmp_path / "target") == []
    ignored = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    assert {*left, out[0]} <= set(ignored["ignore"])


@pytest.mark.parametrize("to", SUFFIXES)
def test_drafting_layers(to: str, tmp_path: Path) -> None:
    """Experts that are left as they are, which is NVFP4: no list then says that they are not."""
    made = Source()
    drafting = "model.layers.2.mlp.experts"
    for module in [m for m in made.made if m.startswith("model.layers.1.mlp.experts.")]:
        shape = SHAPES[module.rpartition(".")[2]]
        made.made[module.replace("layers.1", "layers.2")] = nvfp4(shape, divisor=True, seed=7)
    source = made.save(tmp_path / "source", "modelopt", made.tensors("modelopt"))
    convert(source, tmp_path / "target", layout=to)
    made.check(read(tmp_path / "target"), to, inputs=True)
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert not any(name.startswith(drafting) for name in config["quantization_config"]["ignore"])
    assert problems(source, tmp_path / "target") == []
    assert problems(None, tmp_path / "target") == []


def test_beside_weights_that_are_quantized(tmp_path: Path) -> None:
    """Attention in NVFP4, experts in bfloat16: these are quantized as without it."""
    made = Source(LINEARS)
    floats = {
        f"{module}.weight": torch.from_numpy(made.made.pop(module).weight).bfloat16()
        for module in [m for m in made.made if ".experts." in m]
    }
    tensors = made.tensors("modelopt") | floats
    source = made.save(tmp_path / "source", "modelopt", tensors)
    twin = save(tmp_path / "twin", made.plain | floats, made.config)
    for folder in (source, twin):
        convert(folder, tmp_path / f"{folder.name}-nvfp4", scales="mse")
    experts = {n: t for n, t in read(tmp_path / "twin-nvfp4").items() if ".experts." in n}
    made.plain |= experts
    made.check(read(tmp_path / "source-nvfp4"), "modelopt", inputs=False)
    assert problems(source, tmp_path / "source-nvfp4") == []


@pytest.mark.parametrize("to", SUFFIXES)
def test_gpt_oss(to: str, tmp_path: Path) -> None:
    """ModelOpt's export: stacks turned, rows of gate and up alternating, biases beside."""
    model = build("gpt_oss")
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    tensors = dict(model.state_dict())
    expected: Tensors = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        for name, shape in (("gate_up_proj", (96, 32)), ("down_proj", (32, 48))):
            stack = nvfp4((EXPERTS, *shape), divisor=True, seed=layer)
            del tensors[f"{prefix}.{name}"]
            bias = tensors.pop(f"{prefix}.{name}_bias")
            for expert in range(EXPERTS):
                cuts = {"down_proj": slice(None)}
                if name == "gate_up_proj":
                    cuts = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
                for part, rows in cuts.items():
                    one = Nvfp4(
                        stack.codes[expert][rows], stack.blocks[expert][rows], stack.factor,
                        stack.weight[expert][rows],
                    )  # fmt: skip
                    module = f"{prefix}.{expert}.{part}"
                    expected |= stored(to, module, one, 0.25)
                    expected[f"{module}.bias"] = bias[expert][rows]
            tensors |= {
                f"{prefix}.{name}": tensor(stack.codes.swapaxes(1, 2)),
                f"{prefix}.{name}_weight_scale": tensor(stack.blocks.swapaxes(1, 2)).view(E4M3),
                f"{prefix}.{name}_weight_scale_2": torch.tensor(stack.factor),
                f"{prefix}.{name}_input_scale": torch.tensor(0.25),
                f"{prefix}.{name}_bias": bias,
            }
    source = save(
        tmp_path / "source", tensors, config | {"quantization_config": QUANTIZATION["modelopt"]}
    )
    convert(source, tmp_path / "target", layout=to)
    written = read(tmp_path / "target")
    assert expected.keys() == {n for n in written if ".experts." in n}
    for name, wanted in expected.items():
        same = (t.contiguous().reshape(-1).view(torch.uint8) for t in (written[name], wanted))
        assert torch.equal(*same), name
    assert problems(source, tmp_path / "target") == []


def test_compressed_tensors_reads_what_modelopt_wrote(tmp_path: Path) -> None:
    """Their own decompressor, beside the floats that numpy makes of ModelOpt's tensors."""
    made = Source()
    source = made.save(tmp_path / "source", "modelopt", made.tensors("modelopt"))
    convert(source, tmp_path / "target", layout="compressed-tensors")
    written = read(tmp_path / "target")
    scheme = preset_name_to_scheme("NVFP4", ["Linear"])
    for module, one in made.made.items():
        tensors = {
            n.removeprefix(f"{module}."): t for n, t in written.items() if n.startswith(module)
        }
        theirs = NVFP4PackedCompressor.decompress(tensors, scheme)["weight"].float()
        assert torch.allclose(torch.from_numpy(one.weight), theirs, rtol=2**-7, atol=0)
        # In bfloat16 that is; in float64 the factor is off by float32's own rounding.
        factor = 1 / tensors["weight_global_scale"].double().item()
        assert abs(factor / float(one.factor) - 1) <= 2**-24


@pytest.mark.parametrize("to", SUFFIXES)
def test_what_this_package_has_written(to: str, tmp_path: Path) -> None:
    """Converted, it is what quantizing to the other layout gives; and it is still the original's,
    though nobody knows how it was rounded."""
    first = next(layout for layout in SUFFIXES if layout != to)
    model = build("qwen3_moe", moe_intermediate_size=INTER)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    original = save(tmp_path / "original", dict(model.state_dict()), config)
    options: dict[str, Any] = {"scales": "mse", "activations": True, "linears": True}
    convert(original, tmp_path / first, layout=first, **options)
    convert(original, tmp_path / to, layout=to, **options)
    convert(tmp_path / first, tmp_path / "converted", layout=to)
    ours, direct = read(tmp_path / "converted"), read(tmp_path / to)
    assert ours.keys() == direct.keys()
    for name, wanted in direct.items():
        bits = [t.reshape(-1).view(torch.uint8) for t in (ours[name], wanted)]
        if name.endswith(".weight_scale_2"):  # read as a reciprocal, as vLLM reads it
            assert abs(int(ours[name].view(torch.int32)) - int(wanted.view(torch.int32))) <= 1
        else:
            assert torch.equal(*bits), name
    ignored = [
        json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        for folder in ("converted", to)
    ]
    assert ignored[0] == ignored[1]
    for source in (tmp_path / first, original, None):
        assert problems(source, tmp_path / "converted") == []
    ours[f"{EXPERT}.{SUFFIXES[to][0]}"].bitwise_xor_(8)  # all signs of the low nibbles
    save_file(ours, tmp_path / "converted" / "model.safetensors", {"format": "pt"})
    assert any(EXPERT in problem for problem in problems(original, tmp_path / "converted"))


def test_reciprocals() -> None:
    """What is stored of a factor, and read as its reciprocal, is the factor or, where no float32
    has it as its reciprocal, the one nearest to it: never more than one unit away. Every mantissa.
    """
    one = np.float32(1)
    factors = np.arange(2**23, dtype=np.uint32) + np.float32(2.0**-10).view(np.uint32)
    factors = factors.view(np.float32)
    stored_as = one / factors
    read_as = one / stored_as
    apart = np.abs(read_as.view(np.int32) - factors.view(np.int32))
    assert apart.max() == 1
    assert 0.1 < (apart == 1).mean() < 0.2
    # No neighbour is read as anything nearer.
    for direction in (np.float32(0), np.float32(np.inf)):
        beside = one / np.nextafter(stored_as, direction)
        assert (np.abs(beside.view(np.int32) - factors.view(np.int32)) >= apart).all()
    # What compressed-tensors has stored is read the same after a way through the factor and back.
    assert np.array_equal(one / (one / read_as), read_as)


DAMAGES: dict[str, Callable[[Tensors], None]] = {
    "weight": lambda t: t[f"{EXPERT}.weight"].view(-1)[5:6].bitwise_xor_(1),
    "weight_scale": lambda t: t[f"{EXPERT}.weight_scale"].view(torch.uint8)[3, 1:2].bitwise_xor_(1),
    "weight_scale_2": lambda t: t[f"{EXPERT}.weight_scale_2"].mul_(1 + 2**-23),
    "input_scale": lambda t: t[f"{EXPERT}.input_scale"].mul_(1 + 2**-23),
    "head": lambda t: t["lm_head.weight"].view(-1)[7:8].bitwise_xor_(16),
    "lacks": lambda t: t.pop(f"{EXPERT}.input_scale"),
}
EXPERT = "model.layers.1.mlp.experts.3.up_proj"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("converted")
    made = Source(LINEARS)
    source = made.save(folder / "source", "compressed-tensors", made.tensors("compressed-tensors"))
    convert(source, folder / "target")
    return source, folder / "target"


@pytest.mark.parametrize("what", DAMAGES)
def test_verify_sees_each_bit(what: str, converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = converted
    for file in target.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = read(target)
    DAMAGES[what](tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    name = "lm_head.weight" if what == "head" else f"{EXPERT}.{what}"
    found = problems(source, tmp_path)
    assert found
    assert ("input_scale is missing" if what == "lacks" else name) in found[0]


def test_gate_and_up_of_other_tools(tmp_path: Path) -> None:
    """They may have different scales; that is theirs to decide."""
    made = Source()
    name = "model.layers.0.mlp.experts.1.up_proj"
    made.made[name] = made.made[name]._replace(factor=np.float32(2.0**-9))
    source = made.save(tmp_path / "source", "modelopt", made.tensors("modelopt"))
    convert(source, tmp_path / "target", layout="compressed-tensors")
    made.check(read(tmp_path / "target"), "compressed-tensors", inputs=True)
    assert problems(source, tmp_path / "target") == []
    assert problems(None, tmp_path / "target") == []


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("weight_scale_2", 0.0, "of its global scale, 1 of 1 scales are zero"),
        ("weight_scale_2", 1e-39, "of its global scale, 1 of 1 scales are infinite"),
        ("input_scale", float("nan"), "of its input scale, 1 of 1 scales are NaN"),
        ("weight_scale", 0.0, "of its block scale, 96 of 96 scales are zero"),
    ],
)
def test_bad_scales(suffix: str, value: float, message: str, tmp_path: Path) -> None:
    made = Source()
    tensors = made.tensors("modelopt")
    scale = tensors[f"{EXPERT}.{suffix}"]
    tensors[f"{EXPERT}.{suffix}"] = torch.full(scale.shape, value).to(scale.dtype)
    source = made.save(tmp_path / "source", "modelopt", tensors)
    with pytest.raises(QuantizeError, match=rf"^{EXPERT} \({EXPERT}.weight\): {message}"):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target" / "config.json").exists()


def test_a_factor_where_a_divisor_belongs(tmp_path: Path) -> None:
    made = Source()
    tensors = made.tensors("compressed-tensors")
    name = f"{EXPERT}.weight_global_scale"
    tensors[name] = tensors[name].reciprocal()
    source = made.save(tmp_path / "source", "compressed-tensors", tensors)
    with pytest.raises(QuantizeError, match=rf"model.safetensors: {name} is 0.000.* It divides"):
        convert(source, tmp_path / "target")


def test_gate_alone_in_nvfp4(tmp_path: Path) -> None:
    made = Source()
    tensors = made.tensors("modelopt")
    for suffix in SUFFIXES["modelopt"]:
        del tensors[f"{EXPERT}.{suffix}"]
    tensors[f"{EXPERT}.weight"] = torch.ones(INTER, HIDDEN).bfloat16()
    source = made.save(tmp_path / "source", "modelopt", tensors)
    message = f"gate_proj.weight and {EXPERT}.weight: only one"
    with Checkpoint(source) as checkpoint, pytest.raises(QuantizeError, match=message):
        plan(checkpoint)


def test_what_would_quantize_again_is_refused(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = converted
    text = tmp_path / "text.txt"
    text.write_text("word " * 1000)
    for options, message in (
        (["--scales", "max"], "is NVFP4 already, and its scales are kept"),
        (["--scales", "mse"], "is NVFP4 already, and its scales are kept"),
        (["--calibrate", str(text)], "already NVFP4; quantizing 4-bit values again only loses"),
        (["--input-scales", str(text)], "already NVFP4; quantizing 4-bit values again only loses"),
    ):
        result = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "out"), *options])
        assert result.exit_code == 1
        assert message in " ".join(result.stderr.split())
    result = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "NVFP4 in SRC: bits are kept" in result.stderr
    assert "Warning" not in result.stderr
    assert json.loads((tmp_path / "out/config.json").read_text())["nvfp4_moe"]["made"][
        "activations"
    ]


def test_what_numpy_means() -> None:
    """The judge itself, once by hand: codes 1 and 9 are 0.5 and -0.5; block scale 0x38 is 1."""
    made = Nvfp4(np.uint8([[0x91] * 8]), np.uint8([[0x38]]), np.float32(2), np.zeros((1, 16)))
    assert (e2m1_pairs(made.codes) == [[0.5, -0.5] * 8]).all()
