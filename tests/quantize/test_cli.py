"""The command as a user types it: what it prints, where, and its exit code."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantize.cli import app
from tests.quantize import checkpoints, reference

Folders = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def run(*args: object, columns: int = 200) -> Result:
    """The command in this process; any exception but an exit is a crash."""
    runner = CliRunner(env={"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"})
    result = runner.invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(*args: object) -> str:
    """What a command that must fail says, last of all and in one line."""
    result = run(*args)
    assert result.exit_code == 1
    *before, last = [line for line in result.stderr.splitlines() if line.strip()]
    assert last.startswith("error: "), result.stderr
    assert not [line for line in before if "error" in line]
    assert "Traceback" not in result.output
    return last


# -- quantize --------------------------------------------------------------------------------------


def test_python_m_quantize(saved: Folders, tmp_path: Path) -> None:
    """As a process of its own; the same files as the console script's ``quantize``."""
    source = saved("qwen3_moe")
    result = subprocess.run(
        [sys.executable, "-m", "quantize", source, tmp_path / "one", "--max-shard-size", "20KB"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "GB/s" in result.stdout
    again = run("quantize", source, tmp_path / "two", "--max-shard-size", "20KB")
    assert again.exit_code == 0
    one, two = (
        {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert one == two
    assert len(one) > 5


def test_the_console_script_is_installed_with_its_three_commands() -> None:
    script = Path(sys.executable).with_name("nvfp4-moe")
    result = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    for command in ("quantize", "inspect", "verify"):
        assert command in result.stdout


def test_options_reach_the_pipeline(saved: Folders, tmp_path: Path) -> None:
    source = saved("qwen3_moe")
    options = ("--layout", "compressed-tensors", "--scales", "mse")
    result = run("quantize", source, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "2 MoE layers, 8 experts, gate silu" in result.stderr
    out = reference.read_folder(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "nvfp4-pack-quantized"
    run("quantize", source, tmp_path / "max", "--layout", "compressed-tensors")
    weights = reference.read_folder(source)
    module = "model.layers.0.mlp.experts.1.up_proj"
    exact = weights[f"{module}.weight"].array()
    mse, largest = (
        ((reference.weight(tensors, module) - exact) ** 2).sum()
        for tensors in (out, reference.read_folder(tmp_path / "max"))
    )
    assert mse < largest


def test_sizes_that_are_printed_are_those_on_disk(saved: Folders, tmp_path: Path) -> None:
    result = run("quantize", saved("qwen3_moe"), tmp_path / "out", "--max-shard-size", "15KB")
    files = list((tmp_path / "out").glob("*.safetensors"))
    size = sum(len(raw.data) for raw in reference.read_folder(tmp_path / "out").values())
    assert f"in {len(files)} files" in result.stdout
    assert f"{size / 1000:.1f} kB" in result.stdout


def test_a_nonempty_target_needs_overwrite(saved: Folders, tmp_path: Path) -> None:
    source, out = saved("qwen3_moe"), tmp_path / "out"
    assert run("quantize", source, out).exit_code == 0
    before = (out / "config.json").read_bytes()
    message = refusal("quantize", source, out, "--layout", "compressed-tensors")
    assert "--overwrite" in message
    assert (out / "config.json").read_bytes() == before
    overwritten = run("quantize", source, out, "--layout", "compressed-tensors", "--overwrite")
    assert overwritten.exit_code == 0
    assert (out / "config.json").read_bytes() != before


def test_refusals_are_one_line_without_a_traceback(saved: Folders, tmp_path: Path) -> None:
    source, out = saved("qwen3_moe"), tmp_path / "out"
    assert "is the source" in refusal("quantize", source, source, "--overwrite")
    assert "not a size" in refusal("quantize", source, out, "--max-shard-size", "big")
    assert "neither a folder nor a hub id" in refusal("quantize", tmp_path / "nowhere", out)
    assert "biases" in refusal("quantize", saved("gpt_oss"), out)
    assert not out.exists()


def test_a_hub_id_that_cannot_be_had(tmp_path: Path) -> None:
    """Without a network, or with one: the organisation does not exist."""
    name = "vllm-nvfp4-moe-no-such-org/no-such-model"
    assert name in refusal("quantize", name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--layout", "gguf"), ("--scales", "best")])
def test_unknown_choices(option: str, value: str, saved: Folders, tmp_path: Path) -> None:
    result = run("quantize", saved("qwen3_moe"), tmp_path / "out", option, value)
    assert result.exit_code == 2
    assert value in result.stderr


# -- --gate ----------------------------------------------------------------------------------------


@pytest.fixture
def unknown(saved: Folders, tmp_path: Path) -> Path:
    """A checkpoint whose model Transformers does not know."""
    shutil.copytree(saved("qwen3_moe"), tmp_path / "unknown")
    config = json.loads((tmp_path / "unknown" / "config.json").read_text())
    config |= {"model_type": "brand_new", "architectures": ["BrandNew"]}
    (tmp_path / "unknown" / "config.json").write_text(json.dumps(config))
    return tmp_path / "unknown"


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("silu", {"form": "silu", "alpha": 1.0, "beta": 0.0, "limit": None}),
        ("gelu_tanh", {"form": "gelu_tanh", "alpha": 1.0, "beta": 0.0, "limit": None}),
        (
            '{"form": "swiglu_oai", "alpha": 1.3, "beta": 1, "limit": 5.5}',
            {"form": "swiglu_oai", "alpha": 1.3, "beta": 1, "limit": 5.5},
        ),
    ],
)
def test_a_stated_gate(text: str, gate: dict[str, Any], unknown: Path, tmp_path: Path) -> None:
    assert "--gate" in refusal("quantize", unknown, tmp_path / "out")
    assert run("quantize", unknown, tmp_path / "out", "--gate", text).exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["nvfp4_moe"] == {"version": 1, "gate": gate | {"interleaved": False}}
    assert run("verify", unknown, tmp_path / "out", "--gate", text).exit_code == 0
    assert run("inspect", unknown, "--gate", text).exit_code == 0


@pytest.mark.parametrize(
    "text",
    [
        "swish9",
        "",
        "{",
        "{}",
        "[1]",
        '{"form": "silu", "gamma": 2}',
        '{"form": ["silu"]}',
        '{"form": "swiglu_oai", "alpha": "big"}',
        '{"form": "swiglu_oai", "alpha": 1e999}',
        '{"form": "swiglu_oai", "limit": 0}',
        '{"form": "swiglu_oai", "alpha": 1' + 400 * "0" + "}",
    ],
    ids=lambda text: text[:40] or "empty",
)
def test_a_bad_gate(text: str, saved: Folders, tmp_path: Path) -> None:
    assert "gate" in refusal("quantize", saved("qwen3_moe"), tmp_path / "out", "--gate", text)
    assert not (tmp_path / "out").exists()


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect_m3_nano(m3_nano: Path) -> None:
    result = run("inspect", m3_nano)
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if "N.mlp.experts" in line)
    cells = [cell.strip() for cell in row.strip("│┃| ").replace("┃", "│").split("│")]
    # 5 layers x 32 experts x 3 matrices of 128 x 384: bf16, or 4.5 bits and two scalars each.
    now = 5 * 32 * 3 * 128 * 384 * 2
    after = 5 * 32 * 3 * (128 * 384 // 2 + 128 * 384 // 16 + 8)
    assert cells == [
        "model.layers.N.mlp.experts",
        "5",
        "32",
        "384",
        "128",
        f"{now / 1e6:.1f} MB",
        f"{after / 1e6:.1f} MB",
    ]
    assert "gate: swiglu_oai(alpha=1.702, beta=1, limit=7)" in result.stdout
    for stays in ("lm_head.weight", "model.embed_tokens.weight", "mlp.shared_experts.down_proj"):
        assert stays in result.stdout
    before = sum(len(raw.data) for raw in reference.read_folder(m3_nano).values())
    assert f"{before / 1e6:.1f} MB -> {(before - now + after) / 1e6:.1f} MB" in result.stdout


def test_inspect_says_what_quantize_then_writes(saved: Folders, tmp_path: Path) -> None:
    shown = run("inspect", saved("deepseek_v3"), "--layout", "compressed-tensors").stdout
    run("quantize", saved("deepseek_v3"), tmp_path / "out", "--layout", "compressed-tensors")
    size = sum(len(raw.data) for raw in reference.read_folder(tmp_path / "out").values())
    assert f"-> {size / 1000:.1f} kB" in shown
    assert "gate: silu" in shown
    assert "mlp.shared_experts.gate_proj.weight" in shown


def test_inspect_cuts_nothing_off_on_a_narrow_terminal(m3_nano: Path) -> None:
    shown = run("inspect", m3_nano, columns=80).stdout
    assert "Stays as it is" in shown
    assert "…" not in shown


def test_inspect_a_dense_model(saved: Folders) -> None:
    result = run("inspect", saved("llama"))
    assert result.exit_code == 1
    assert "no routed experts" in result.stderr
    assert "model.layers.N.mlp.down_proj.weight" in result.stderr


# -- verify ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(saved: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for layout in ("modelopt", "compressed-tensors"):
        folders[layout] = tmp_path_factory.mktemp("good") / layout
        assert (
            run("quantize", saved("qwen3_moe"), folders[layout], "--layout", layout).exit_code == 0
        )
    return folders


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_verify_a_good_checkpoint(layout: str, saved: Folders, good: dict[str, Path]) -> None:
    source = saved("qwen3_moe")
    result = run("verify", source, good[layout])
    assert result.exit_code == 0, result.output
    assert "No problems found" in result.stdout
    out, original = reference.read_folder(good[layout]), reference.read_folder(source)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        noise = signal = 0.0
        for name, raw in original.items():
            if name.startswith(f"{prefix}."):
                restored = reference.weight(out, name.removesuffix(".weight"))
                noise += ((restored - raw.array()) ** 2).sum()
                signal += (raw.array().astype(float) ** 2).sum()
        relative = (noise / signal) ** 0.5
        row = next(line for line in result.stdout.splitlines() if prefix in line)
        assert f"{relative:.4f}" in row
        assert f"{-20 * torch.tensor(relative).log10().item():.2f}" in row


def test_verify_m3_nano(m3_nano: Path, quantized: dict[str, Path]) -> None:
    result = run("verify", m3_nano, quantized["modelopt"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count(".mlp.experts") == 5


def test_verify_a_stacked_source(stacked: Folders, tmp_path: Path) -> None:
    assert run("quantize", stacked("minimax_m3"), tmp_path / "out").exit_code == 0
    assert run("verify", stacked("minimax_m3"), tmp_path / "out").exit_code == 0


EXPERT = "model.layers.1.mlp.experts.2.down_proj"
CT = {
    "weight": "weight_packed",
    "weight_scale_2": "weight_global_scale",
    "input_scale": "input_global_scale",
}


def set_scale(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return tensor


def swap_experts(tensors: Tensors) -> None:
    for name in [n for n in tensors if "layers.1.mlp.experts.2." in n]:
        other = name.replace(".experts.2.", ".experts.3.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def shuffle(tensor: torch.Tensor) -> torch.Tensor:
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))
    return tensor.flatten()[order].reshape(tensor.shape)


NAN, INF = float("nan"), float("inf")
# What is done to the tensor called EXPERT.<suffix> (ModelOpt's name), and what verify says.
DAMAGES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "missing codes": ("weight", lambda t: None, "missing"),
    "missing block scale": ("weight_scale", lambda t: None, "missing"),
    "missing global scale": ("weight_scale_2", lambda t: None, "missing"),
    "missing input scale": ("input_scale", lambda t: None, "missing"),
    "zero block scale": ("weight_scale", lambda t: set_scale(t, 0.0), "zero"),
    "negative block scale": ("weight_scale", lambda t: set_scale(t, -1.0), "negative"),
    "NaN block scale": ("weight_scale", lambda t: set_scale(t, NAN), "NaN"),
    "zero global scale": ("weight_scale_2", lambda t: set_scale(t, 0.0), "zero"),
    "NaN global scale": ("weight_scale_2", lambda t: set_scale(t, NAN), "NaN"),
    "infinite global scale": ("weight_scale_2", lambda t: set_scale(t, INF), "infinite"),
    "negative global scale": ("weight_scale_2", lambda t: -t, "negative"),
    "zero input scale": ("input_scale", lambda t: set_scale(t, 0.0), "zero"),
    "infinite input scale": ("input_scale", lambda t: set_scale(t, INF), "infinite"),
    "wrong shape of codes": ("weight", lambda t: t[:-1].clone(), "expected"),
    "wrong shape of block scale": ("weight_scale", lambda t: t.T.contiguous(), "expected"),
    "wrong shape of global scale": ("weight_scale_2", lambda t: t.reshape(1, 1), "expected"),
    "wrong dtype of global scale": ("weight_scale_2", lambda t: t.bfloat16(), "expected"),
    "wrong dtype of codes": ("weight", lambda t: t.view(torch.int8), "expected"),
    "shuffled codes": ("weight", shuffle, "error"),
    "flipped nibbles": ("weight", lambda t: (t >> 4) | (t << 4), "error"),
    "another global scale": ("weight_scale_2", lambda t: t * 4, "error"),
}


def damaged(good: Path, target: Path, change: Callable[[Tensors], Any]) -> Path:
    shutil.copytree(good, target)
    tensors = load_file(good / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds_damage_to_an_expert(
    damage: str, layout: str, saved: Folders, good: dict[str, Path], tmp_path: Path
) -> None:
    suffix, change, message = DAMAGES[damage]
    name = f"{EXPERT}.{suffix if layout == 'modelopt' else CT.get(suffix, suffix)}"

    def apply(tensors: Tensors) -> None:
        tensor = change(tensors.pop(name))
        if tensor is not None:
            tensors[name] = tensor

    folder = damaged(good[layout], tmp_path / "damaged", apply)
    result = run("verify", saved("qwen3_moe"), folder)
    assert result.exit_code == 1, result.output
    problems = [line for line in result.stderr.splitlines() if line.startswith("problem:")]
    assert len(problems) == 1
    assert message in problems[0]
    assert (name if message != "error" else "model.layers.1.mlp.experts") in problems[0]
    assert "No problems found" not in result.stdout


ELSEWHERE: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "two experts swapped": (swap_experts, "model.layers.1.mlp.experts"),
    "a missing tensor": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "an extra tensor": (lambda t: t.update(x=torch.zeros(3)), "x is not in the source"),
    "the source's weight beside": (
        lambda t: t.update({f"{EXPERT}.bias": torch.zeros(3)}),
        f"{EXPERT}.bias is not in the source",
    ),
    "one changed byte": (
        lambda t: t["lm_head.weight"].view(torch.uint8)[3, 7].bitwise_xor_(1),
        "lm_head.weight differs",
    ),
    "another dtype": (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}),
        "model.norm.weight",
    ),
    "another shape": (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"][None]}),
        "model.norm.weight",
    ),
}


@pytest.mark.parametrize("damage", ELSEWHERE)
def test_verify_finds_damage_elsewhere(
    damage: str, saved: Folders, good: dict[str, Path], tmp_path: Path
) -> None:
    change, message = ELSEWHERE[damage]
    folder = damaged(good["modelopt"], tmp_path / "damaged", change)
    result = run("verify", saved("qwen3_moe"), folder)
    assert result.exit_code == 1, result.output
    assert message in result.stderr


CONFIG_DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another gate": (lambda c: c["nvfp4_moe"]["gate"].update(form="gelu"), "gate is gelu"),
    "another number": (
        lambda c: c["nvfp4_moe"]["gate"].update(form="swiglu_oai", alpha=1.702),
        "alpha=1.702",
    ),
    "no gate": (lambda c: c.pop("nvfp4_moe"), "no gate contract"),
    "a later contract": (lambda c: c["nvfp4_moe"].update(version=2), "version is 2"),
    "no quantization_config": (lambda c: c.pop("quantization_config"), "quantization_config"),
    "another method": (
        lambda c: c.update(quantization_config={"quant_method": "fp8"}),
        "quantization_config",
    ),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGES)
def test_verify_finds_damage_to_the_config(
    damage: str, saved: Folders, good: dict[str, Path], tmp_path: Path
) -> None:
    change, message = CONFIG_DAMAGES[damage]
    shutil.copytree(good["modelopt"], tmp_path / "damaged")
    config = json.loads((good["modelopt"] / "config.json").read_text())
    change(config)
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config))
    result = run("verify", saved("qwen3_moe"), tmp_path / "damaged")
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert "config.json" in result.stderr


def test_verify_against_another_model(
    good: dict[str, Path], saved: Folders, tmp_path: Path
) -> None:
    """The same shapes, other weights."""
    source = saved("qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensors[name] = torch.randn(tensor.shape).to(tensor.dtype)
    config = json.loads((source / "config.json").read_text())
    other = checkpoints.save(tmp_path / "other", tensors, config)
    result = run("verify", other, good["modelopt"])
    assert result.exit_code == 1
    for layer in range(2):
        assert f"model.layers.{layer}.mlp.experts" in result.stderr


def test_verify_an_unfinished_target(good: dict[str, Path], saved: Folders, tmp_path: Path) -> None:
    shutil.copytree(good["modelopt"], tmp_path / "half")
    (tmp_path / "half" / "config.json").unlink()
    assert "config.json does not exist" in refusal("verify", saved("qwen3_moe"), tmp_path / "half")
