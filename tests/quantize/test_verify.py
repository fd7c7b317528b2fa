"""``nvfp4-moe verify``: good checkpoints pass, each kind of damage is found and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.verify import verify
from tests.quantize import checkpoints, reference
from tests.quantize.checkpoints import convert
from tests.quantize.damages import with_tensors
from tests.quantize.test_cli import refusal, run
from tests.trained import Sizes

Folders = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def options(layout: str) -> tuple[str, ...]:
    """With input scales, so that these can be damaged too."""
    return "--layout", layout, "--activations", "nvfp4"


@pytest.fixture(scope="module")
def good(saved: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for layout in ("modelopt", "compressed-tensors"):
        folders[layout] = tmp_path_factory.mktemp("good") / layout
        assert (
            run(
                "quantize",
                saved("qwen3_moe"),
                folders[layout],
                "--layout",
                layout,
                "--activations",
                "nvfp4",
            ).exit_code
            == 0
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


def test_verify_a_trained_model(
    each_trained: Path, quantized_of: Callable[[Path], dict[str, Path]]
) -> None:
    result = run("verify", each_trained, quantized_of(each_trained)["modelopt"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count(".mlp.experts") == len(Sizes.of(each_trained).sparse)


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
    "another global scale": ("weight_scale_2", lambda t: t * 4, "but the rule 'mse' makes"),
}


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

    folder = with_tensors(good[layout], tmp_path / "damaged", apply)
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
    folder = with_tensors(good["modelopt"], tmp_path / "damaged", change)
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
    "a later contract": (lambda c: c["nvfp4_moe"].update(version=99), "version is 99"),
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


@pytest.mark.parametrize("how", ["bits", "bounds", "8 bits"])
def test_verify_against_a_source_that_is_damaged(how: str, saved: Folders, tmp_path: Path) -> None:
    """Then it is the source that is named, and not what was made of it."""
    out = tmp_path / "out"
    convert(saved("qwen3_moe"), out, base="mxfp8" if how == "8 bits" else None)
    if how == "bounds":  # nobody knows how it was made
        config = json.loads((out / "config.json").read_text())
        del config["nvfp4_moe"]["made"]
        (out / "config.json").write_text(json.dumps(config))
    name = "model.layers.1.mlp.experts.2.down_proj"
    if how == "8 bits":
        name = "model.layers.1.self_attn.v_proj"
    source = Path(shutil.copytree(saved("qwen3_moe"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors[f"{name}.weight"][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with Checkpoint(source) as original, Checkpoint(out, decode=False) as target:
        problems = verify(original, target).problems
    wanted = (
        f"{source / 'model.safetensors'}: {name}.weight: of {name}, weights are NaN or infinite"
    )
    assert [problem for problem in problems if problem.startswith(wanted)], problems
    assert not any("are not what" in p or "is not what" in p for p in problems), problems


def test_verify_an_unfinished_target(good: dict[str, Path], saved: Folders, tmp_path: Path) -> None:
    shutil.copytree(good["modelopt"], tmp_path / "half")
    (tmp_path / "half" / "config.json").unlink()
    assert "config.json does not exist" in refusal("verify", saved("qwen3_moe"), tmp_path / "half")


def test_verify_looks_into_folders_that_configs_name(saved: Folders, tmp_path: Path) -> None:
    source = shutil.copytree(saved("qwen3_moe"), tmp_path / "source")
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "spm.model").write_text("pieces")
    (source / "tokenizer_config.json").write_text('{"vocab_file": "tokenizer/spm.model"}')
    convert(source, tmp_path / "out")
    assert run("verify", source, tmp_path / "out").exit_code == 0
    (tmp_path / "out" / "tokenizer" / "spm.model").write_text("others")
    result = run("verify", source, tmp_path / "out")
    assert result.exit_code == 1
    assert "spm.model differs from the source's" in result.stderr


@pytest.mark.parametrize("metadata", [None, {"format": "tf"}])
def test_verify_looks_at_the_files_format(
    saved: Folders, tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    """Transformers asks a file which library its tensors are from."""
    convert(saved("qwen3_moe"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    save_file(load_file(file), file, metadata)
    result = run("verify", saved("qwen3_moe"), tmp_path / "out")
    assert result.exit_code == 1
    assert "__metadata__" in result.stderr
