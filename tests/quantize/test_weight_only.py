"""``--weight-only``: experts of some layers keep their inputs in bf16, beside others in NVFP4."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.calibration.routing import Routing
from quantize.checkpoint.reader import Checkpoint
from quantize.evaluate.activations import Nvfp4Inputs, RoundedInputs, check_has_scales, stated
from quantize.experts.find import find
from quantize.layouts import LAYOUTS
from quantize.report import loads
from quantize.run.options import Options
from quantize.verify import verify
from tests.quantize import checkpoints
from tests.quantize.damages import with_config, with_tensors
from tests.quantize.test_bits import SIZES, chosen, experts_by_name, named_by, tokens
from tests.quantize.test_cli import refusal, run

pytestmark = pytest.mark.usefixtures("one_thread")

KEPT, OTHER = "model.layers.1.mlp.experts", "model.layers.0.mlp.experts"
PATTERN = "*.layers.1.*"
INPUT = {"modelopt": "input_scale", "compressed-tensors": "input_global_scale"}
each = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weight_only") / "source"
    checkpoints.build("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bits_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four layers, whose blocks every format has."""
    folder = tmp_path_factory.mktemp("measured") / "source"
    checkpoints.build("qwen3_moe", **SIZES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {layout: tmp_path_factory.mktemp(layout) / "out" for layout in LAYOUTS}
    for layout, folder in folders.items():
        checkpoints.convert(source, folder, layout, activations=True, weight_only=(PATTERN,))
    return folders


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def problems(source: Path | None, target: Path) -> list[str]:
    with Checkpoint(target, decode=False) as quantized:
        if source is None:
            return verify(None, quantized).problems
        with Checkpoint(source) as original:
            return verify(original, quantized).problems


@each
def test_only_input_scales_are_left_out(
    source: Path, made: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    checkpoints.convert(source, tmp_path / "all", layout, activations=True)
    whole, found = tensors(tmp_path / "all"), tensors(made[layout])
    lacking = whole.keys() - found.keys()
    assert lacking == {
        f"{KEPT}.{expert}.{name}.{INPUT[layout]}"
        for expert in range(4)
        for name in checkpoints.PROJECTIONS
    }
    assert found.keys() < whole.keys()
    assert all(torch.equal(whole[name], value) for name, value in found.items())


def test_modelopt_says_it_module_by_module(made: dict[str, Path]) -> None:
    """As ModelOpt's own mixed checkpoints do, in both files."""
    for name in ("config.json", "hf_quant_config.json"):
        whole = json.loads((made["modelopt"] / name).read_text())
        config = whole.get("quantization_config") or whole["quantization"]
        assert config["quant_algo"] == "MIXED_PRECISION"
        algorithms = {m: entry["quant_algo"] for m, entry in config["quantized_layers"].items()}
        assert len(algorithms) == 2 * 4 * 3
        for module, algorithm in algorithms.items():
            assert algorithm == ("W4A16_NVFP4" if module.startswith(KEPT) else "NVFP4")


def test_compressed_tensors_own_reader(made: dict[str, Path]) -> None:
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    config = json.loads((made["compressed-tensors"] / "config.json").read_text())
    value = config["quantization_config"]
    value.pop("quant_method")
    found = QuantizationConfig(**value)
    one, other = found.config_groups.values()
    assert found.format == one.format == other.format == "nvfp4-pack-quantized"
    assert one.input_activations is not None and one.targets == ["Linear"]
    assert other.input_activations is None
    modules = [f"{prefix}.{e}.up_proj" for prefix in (KEPT, OTHER) for e in range(4)]
    (target,) = other.targets
    assert [match_name(name, target) for name in modules] == [True] * 4 + [False] * 4
    assert one.weights == other.weights


@each
def test_verify_finds_nothing(source: Path, made: dict[str, Path], layout: str) -> None:
    assert problems(source, made[layout]) == []
    assert problems(None, made[layout]) == []
    report = loads((made[layout] / "nvfp4_moe_report.json").read_bytes())
    assert (report.activations, report.weight_only) == ("nvfp4", [PATTERN])
    assert PATTERN in (made[layout] / "nvfp4_moe_report.html").read_text()


@each
def test_verify_finds_a_scale_too_many_or_too_few(
    source: Path, made: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    more, less = (f"{prefix}.2.down_proj.{INPUT[layout]}" for prefix in (KEPT, OTHER))
    example = tensors(made[layout])[less]
    added = with_tensors(
        made[layout], tmp_path / "more", lambda found: found.update({more: example.clone()})
    )
    taken = with_tensors(made[layout], tmp_path / "less", lambda found: found.pop(less))
    for of in (source, None):
        assert [each for each in problems(of, added) if more in each]
        assert [each for each in problems(of, taken) if less in each and "missing" in each]


@each
def test_verify_finds_another_config(
    source: Path, made: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    def changed(name: str, change: Callable[[dict[str, Any]], None]) -> list[str]:
        return problems(source, with_config(made[layout], tmp_path / name, change))

    def one_module(config: dict[str, Any]) -> None:
        if layout == "modelopt":
            layers = config["quantization_config"]["quantized_layers"]
            layers[f"{KEPT}.0.up_proj"]["quant_algo"] = "NVFP4"
        else:
            groups = config["quantization_config"]["config_groups"]
            groups["group_1"]["targets"][0] = f"{KEPT}.0.up_proj"

    found = changed("config", one_module)
    assert [each for each in found if "quantization_config" in each and "expected" in each], found
    found = changed("made", lambda config: config["nvfp4_moe"]["made"].update(weight_only=[]))
    assert [each for each in found if "made.weight_only" in each], found


@each
def test_others_checkpoints_are_read_by_their_configs(
    source: Path, made: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    """As another tool would have written it, which does not say how it was made."""
    folder = Path(shutil.copytree(made[layout], tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    del config["nvfp4_moe"]["made"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("json", "html"):
        (folder / f"nvfp4_moe_report.{name}").unlink()
    assert problems(source, folder) == []
    found = tensors(folder)
    del found[f"{OTHER}.0.up_proj.{INPUT[layout]}"]
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    for of in (source, None):
        assert [each for each in problems(of, folder) if "is missing" in each]


@each
def test_it_is_carried_over(made: dict[str, Path], layout: str, tmp_path: Path) -> None:
    """From a source that says so, to the other layout and back; and with more layers."""
    (other,) = (name for name in LAYOUTS if name != layout)
    checkpoints.convert(made[layout], tmp_path / "there", other)
    assert problems(made[layout], tmp_path / "there") == []
    there, wanted = tensors(tmp_path / "there"), tensors(made[other])
    assert there.keys() == wanted.keys()
    checkpoints.convert(tmp_path / "there", tmp_path / "back", layout)
    back, first = tensors(tmp_path / "back"), tensors(made[layout])
    assert back.keys() == first.keys()
    for name, value in back.items():
        # Scales of weights go through their reciprocals, which not every float32 has.
        assert torch.allclose(first[name].double(), value.double(), rtol=1e-6, atol=0), name
    checkpoints.convert(made[layout], tmp_path / "none", layout, activations=False)
    assert not [name for name in tensors(tmp_path / "none") if name.endswith(INPUT[layout])]


def test_a_config_that_names_each_expert(
    source: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    """As this package wrote them before; it is verified and converted like one of today's."""
    folder, there = tmp_path / "old", tmp_path / "there"
    with experts_by_name():
        checkpoints.convert(
            source, folder, "compressed-tensors", activations=True, weight_only=(PATTERN,)
        )
    assert len(named_by(folder)) == 12 and f"{KEPT}.3.up_proj" in named_by(folder)
    assert problems(source, folder) == problems(None, folder) == []
    checkpoints.convert(folder, there, "modelopt")
    assert problems(folder, there) == []
    assert tensors(there).keys() == tensors(made["modelopt"]).keys()


@each
def test_evaluate_rounds_no_inputs_there(made: dict[str, Path], layout: str) -> None:
    with Checkpoint(made[layout]) as checkpoint:
        groups = find(checkpoint)
        assert stated(checkpoint, groups) == "nvfp4"
        check_has_scales(checkpoint, groups)
        visitor = Nvfp4Inputs(checkpoint)
        weights: Any = type("Weights", (), {})()
        routing: Routing = None  # type: ignore[assignment]
        for group in groups:
            visitor.begin(0, group, routing)
            rounds = isinstance(visitor.expert(2, weights, routing), RoundedInputs)
            assert rounds is (group.prefix == OTHER)


@pytest.mark.parametrize("how", ["--calibrate", "--input-scales"])
def test_the_command(how: str, trained: Path, tmp_path: Path) -> None:
    """With input scales of a text: those of other layers are what they are without."""
    text = tmp_path / "a.txt"
    text.write_text("".join(f"x{n} = {n}\n" for n in range(999)))
    size = ("--calibration-rows", "4", "--calibration-length", "64", "--include", "*.layers.[13].*")
    rounding = ("--rounding", "gptq") if how == "--calibrate" else ()
    command = ("quantize", trained, tmp_path / "out", how, text, *size, *rounding)
    assert run(*command, "--weight-only", "*.layers.3.*").exit_code == 0
    assert run(*command[:2], tmp_path / "all", *command[3:]).exit_code == 0
    found, whole = tensors(tmp_path / "out"), tensors(tmp_path / "all")
    kept = {name for name in whole if ".layers.3." in name and name.endswith(".input_scale")}
    assert kept and whole.keys() - found.keys() == kept
    assert all(torch.equal(whole[name], value) for name, value in found.items())
    assert problems(trained, tmp_path / "out") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no activations are quantized here"),
        (("--activations", "bf16"), "no activations are quantized here"),
        (("--activations", "nvfp4", "--exclude", KEPT), "matches no experts in NVFP4"),
        (("--activations", "nvfp4", "--weight-only", "*"), "say --activations bf16"),
    ],
)
def test_what_is_refused(
    words: tuple[str, ...], message: str, source: Path, tmp_path: Path
) -> None:
    command = ("quantize", source, tmp_path / "out", "--weight-only", PATTERN)
    assert message in refusal(*command, *words)
    assert not (tmp_path / "out").exists()


# -- so many layers, by measured loss --------------------------------------------------------------


def losses(source: Path, target: Path, activations: bool, **more: Any) -> Any:
    """What ``--bits 4.5`` measures, which takes all in NVFP4."""
    options = Options(bits=4.5 if not more else None, activations=activations)
    return chosen(source, target, options, tokens(), **more)


def test_the_layers_that_lose_most_by_their_inputs(bits_source: Path, tmp_path: Path) -> None:
    """The difference between two runs of ``--bits``, with inputs rounded and without."""
    on, off = (losses(bits_source, tmp_path / str(on), on).choice.losses for on in (True, False))
    gains = {prefix: on[prefix]["nvfp4"] - off[prefix]["nvfp4"] for prefix in on}
    order = sorted(gains, key=lambda prefix: -gains[prefix])
    said: list[str] = []
    for count in (1, 2):
        steps = losses(bits_source, tmp_path / "out", True, weight_only=count, say=said.append)
        assert set(steps.options.weight_only) == set(order[:count])
        assert steps.choice is None
        kept = sum(gains[prefix] for prefix in order[:count])
        assert f"about {kept:.3g} nats a token there, {sum(gains.values()):.3g} in all" in said[-1]


def test_with_a_budget_too(bits_source: Path, tmp_path: Path) -> None:
    """Formats are chosen first: inputs are kept of a layer that stays NVFP4."""
    options = Options(bits=6.5, activations=True)
    steps = chosen(bits_source, tmp_path / "out", options, tokens(), weight_only=1)
    alone = chosen(bits_source, tmp_path / "alone", options, tokens())
    assert steps.options.formats == alone.options.formats
    assert "nvfp4-weights" not in {n for of in steps.choice.losses.values() for n in of}
    (kept,) = steps.options.weight_only
    nvfp4 = [group.prefix for group in steps.groups]
    assert kept in nvfp4 and len(nvfp4) > 1
    one = Options(bits=9.5, activations=True)
    fewer = chosen(bits_source, tmp_path / "fewer", one, tokens(), weight_only=3)
    assert len(fewer.groups) <= 3
    # Then no inputs are rounded at all, and the checkpoint says so.
    assert not fewer.options.activations and fewer.options.weight_only == ()


def test_a_number_on_the_command_line(trained: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(f"x{n} = {n}\n" for n in range(999)))
    size = (
        "--calibration-rows",
        "4",
        "--calibration-length",
        "64",
        "--include",
        "*.layers.[123].*",
    )
    command = ("quantize", trained, tmp_path / "out", "--input-scales", text, *size)
    result = run(*command, "--weight-only", "1")
    assert result.exit_code == 0, result.output
    number = re.search(r"--weight-only 1: inputs stay bf16 in layers (\d)\.", result.stderr)
    assert number
    lacking = {
        name.split(".")[2]
        for name in tensors(tmp_path / "out")
        if "experts" in name and name.endswith("weight_scale_2")
        and name.replace("weight_scale_2", "input_scale") not in tensors(tmp_path / "out")
    }  # fmt: skip
    assert lacking == {number[1]}
    assert problems(trained, tmp_path / "out") == []
    again = run(*command, "--weight-only", "1", "--resume")
    assert again.exit_code == 0 and "Measuring" not in again.stderr
    assert "there are 3 layers" in refusal(*command, "--weight-only", "3", "--overwrite")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("2",), "needs --calibrate or --input-scales"),
        (("2", "--weight-only", PATTERN, "--input-scales", "t"), "and not both"),
        (("0", "--input-scales", "t"), "says nothing"),
    ],
)
def test_wrong_usage(words: tuple[str, ...], message: str, source: Path, tmp_path: Path) -> None:
    command = ("quantize", source, tmp_path / "out", "--weight-only", *words)
    assert message in refusal(*command, code=2)
