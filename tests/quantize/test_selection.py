"""Which modules are quantized: ``--include``, ``--exclude``, ``--all-linears``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts import linears
from quantize.experts.find import find
from quantize.experts.gates import Gate
from quantize.layouts import LAYOUTS
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.quantize import checkpoints, reference
from tests.quantize.checkpoints import convert
from tests.quantize.reference import Raw
from tests.quantize.test_cli import refusal, run

Folders = Callable[[str], Path]
SILU = Gate("silu")
Patterns = tuple[str, ...]

SUFFIXES = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale"),
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def experts_of(*layers: int) -> set[str]:
    """Modules of qwen3_moe's experts."""
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}"
        for layer in layers
        for expert in range(4)
        for kind in checkpoints.PROJECTIONS
    }


def attention_of(*layers: int) -> set[str]:
    return {f"model.layers.{layer}.self_attn.{kind}" for layer in layers for kind in ATTENTION}


def assert_just_these_are_quantized(
    source: dict[str, Raw], out: dict[str, Raw], modules: set[str], layout: str
) -> None:
    """And every other tensor is the source's, byte for byte."""
    made = {f"{module}.{suffix}" for module in modules for suffix in SUFFIXES[layout]}
    kept = {name for name in source if name.removesuffix(".weight") not in modules}
    assert set(out) == made | kept
    assert {name: out[name] for name in kept} == {name: source[name] for name in kept}
    for module in modules:
        exact = source[f"{module}.weight"].array()
        error = np.linalg.norm(reference.weight(out, module) - exact) / np.linalg.norm(exact)
        assert 0.02 < error < 0.2, module


# -- which are taken -------------------------------------------------------------------------------

CHOICES: dict[str, tuple[Patterns, Patterns, bool, set[str]]] = {
    "all experts": ((), (), False, experts_of(0, 1)),
    "one layer": (("model.layers.1.*",), (), False, experts_of(1)),
    "all but one": ((), ("*.layers.1.mlp.experts",), False, experts_of(0)),
    "both": (("*.layers.?.*",), ("*.layers.0.*",), False, experts_of(1)),
    "several": (("*.layers.0.*", "*.layers.1.*"), (), False, experts_of(0, 1)),
    "linears too": ((), (), True, experts_of(0, 1) | attention_of(0, 1)),
    "linears alone": (("*.self_attn.*",), (), True, attention_of(0, 1)),
    "linears of one": ((), ("*.1.self_attn.*",), True, experts_of(0, 1) | attention_of(0)),
    "no output": (
        *((), ("*.o_proj",), True),
        experts_of(0, 1) | {m for m in attention_of(0, 1) if not m.endswith("o_proj")},
    ),
    "query without its siblings": (
        *((), ("*.q_proj",), True),
        experts_of(0, 1) | {m for m in attention_of(0, 1) if m.endswith("o_proj")},
    ),
    "what stays anyway": ((), ("lm_head", "*.norm", "*.mlp.gate"), False, experts_of(0, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("choice", CHOICES)
def test_just_the_chosen_modules_are_quantized(
    choice: str, layout: str, saved: Folders, tmp_path: Path
) -> None:
    include, exclude, all_linears, modules = CHOICES[choice]
    options = [f"--include={p}" for p in include] + [f"--exclude={p}" for p in exclude]
    options += ["--all-linears"] * all_linears + ["--layout", layout]
    result = run("quantize", saved("qwen3_moe"), tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    out = reference.read_folder(tmp_path / "out")
    source = reference.read_folder(saved("qwen3_moe"))
    assert_just_these_are_quantized(source, out, modules, layout)
    checked = run("verify", saved("qwen3_moe"), tmp_path / "out")
    assert checked.exit_code == 0, checked.stderr
    shown = run("inspect", saved("qwen3_moe"), "--json", *options)
    size = sum(len(raw.data) for raw in out.values())
    assert json.loads(shown.stdout)["bytes_after"] == size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_only_is_the_default(layout: str, saved: Folders, tmp_path: Path) -> None:
    source = saved("deepseek_v3")
    for name, flags in (("one", []), ("two", ["--experts-only"])):
        assert run("quantize", source, tmp_path / name, "--layout", layout, *flags).exit_code == 0
    one, two = (reference.read_folder(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert not [n for n in one if "self_attn" in n and n.endswith(SUFFIXES[layout][1])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_excluded_stacked_experts_stay_stacked(
    layout: str, stacked: Folders, tmp_path: Path
) -> None:
    source = stacked("qwen3_moe")
    convert(source, tmp_path / "out", layout, exclude=("*.layers.0.*",))
    out, original = reference.read_folder(tmp_path / "out"), reference.read_folder(source)
    left = {n: raw for n, raw in out.items() if n.startswith("model.layers.0.mlp.experts")}
    assert left == {n: raw for n, raw in original.items() if n in left}
    assert set(left) == {
        f"model.layers.0.mlp.experts.{kind}" for kind in ("gate_up_proj", "down_proj")
    }
    assert run("verify", source, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_names_what_is_wrong_with_what_was_left(
    layout: str, stacked: Folders, tmp_path: Path
) -> None:
    source, out = stacked("qwen3_moe"), tmp_path / "out"
    convert(source, out, layout, exclude=("*.layers.0.*",), linears=True)
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.down_proj"]
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    del tensors[f"model.layers.1.self_attn.o_proj.{SUFFIXES[layout][1]}"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    result = run("verify", source, out, "--json")
    assert result.exit_code == 1
    problems = sorted(json.loads(result.stdout)["problems"])
    assert [problem.partition(";")[0] for problem in problems] == [
        "model.layers.0.mlp.experts.down_proj is missing",
        "model.layers.1.self_attn.o_proj.weight_scale is missing",
        "model.safetensors: model.layers.0.self_attn.q_proj.weight differs from the source",
    ]


# -- siblings share a global scale -----------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linears_follow_the_max_rule_with_one_global_scale_for_fused_siblings(
    layout: str, saved: Folders, tmp_path: Path
) -> None:
    source = reference.read_folder(saved("deepseek_v3"))
    convert(saved("deepseek_v3"), tmp_path / "out", layout, linears=True)
    out = reference.read_folder(tmp_path / "out")
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp.shared_experts"
    sets = (
        (f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa"),
        (f"{attention}.q_b_proj",),
        (f"{attention}.o_proj",),
        (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        (f"{mlp}.down_proj",),
        tuple(f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up")),
    )
    codes_at, blocks_at, scale_at = SUFFIXES[layout]
    for modules in sets:
        scale, wanted = reference.max_rule(*(source[f"{m}.weight"].array() for m in modules))
        for module, (codes, blocks) in zip(modules, wanted, strict=True):
            packed = out[f"{module}.{codes_at}"].array()
            np.testing.assert_array_equal(reference.unpack(packed), codes, err_msg=module)
            np.testing.assert_array_equal(out[f"{module}.{blocks_at}"].array(), blocks)
            factor = out[f"{module}.{scale_at}"].array()
            assert factor == (scale if layout == "modelopt" else np.float32(1) / scale), module
    assert out[f"{attention}.kv_b_proj.weight"] == source[f"{attention}.kv_b_proj.weight"]


def linear_sets(folder: Path, tensors: dict[str, tuple[int, ...]], **config: Any) -> set[Any]:
    """The sets found among linears of these shapes, beside the experts of layer 0."""
    experts = {
        f"model.layers.0.mlp.experts.{e}.{kind}.weight": (32, 32)
        for e in range(2)
        for kind in checkpoints.PROJECTIONS
    }
    made = {name: torch.zeros(shape) for name, shape in (experts | tensors).items()}
    checkpoints.save(folder, made, {"num_experts": 2, "num_hidden_layers": 1} | config)
    with Checkpoint(folder) as checkpoint:
        found = linears.find(checkpoint, find(checkpoint))
    return {frozenset(name.removesuffix(".weight") for name in names) for names in found}


def test_which_linears_are_siblings(tmp_path: Path) -> None:
    at = "model.layers.0.self_attn"
    found = linear_sets(
        tmp_path,
        {
            **{f"{at}.{kind}.weight": (32, 32) for kind in ATTENTION},
            "model.layers.0.mlp.shared_expert.gate_proj.weight": (32, 32),
            "model.layers.0.mlp.shared_expert.up_proj.weight": (32, 32),
            "model.layers.0.mlp.shared_expert.down_proj.weight": (32, 32),
        },
    )
    mlp = "model.layers.0.mlp.shared_expert"
    assert found == {
        frozenset(f"{at}.{kind}" for kind in ATTENTION[:3]),
        frozenset({f"{at}.o_proj"}),
        frozenset({f"{mlp}.gate_proj", f"{mlp}.up_proj"}),
        frozenset({f"{mlp}.down_proj"}),
    }


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("k_proj", (24, 32)),  # its rows are no multiple of a block
        ("index_q_proj", (32, 32)),  # MiniMax-M3's, fused with the others
        ("b_proj", (2, 32)),  # Bailing's
    ],
)
def test_siblings_of_what_cannot_be_quantized_stay(
    name: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    """An engine that fuses them needs all of them in one format."""
    at = "model.layers.0.self_attn"
    tensors = {f"{at}.{kind}.weight": (32, 32) for kind in ATTENTION} | {
        f"{at}.{name}.weight": shape
    }
    assert linear_sets(tmp_path, tensors) == {frozenset({f"{at}.o_proj"})}


@pytest.mark.parametrize(
    "module",
    [
        "visual.layers.0.self_attn.q_proj",  # a tower of its own
        "model.layers.1.self_attn.q_proj",  # drafting: beyond num_hidden_layers
        "mtp.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.gate",
        "model.layers.0.self_attn.kv_b_proj",
        "lm_head",
        "q_proj",
    ],
)
def test_what_is_no_linear_of_the_decoder(module: str, tmp_path: Path) -> None:
    assert linear_sets(tmp_path, {f"{module}.weight": (32, 32)}) == set()


# -- patterns that are mistakes --------------------------------------------------------------------


@pytest.mark.parametrize("command", ["quantize", "inspect"])
@pytest.mark.parametrize(
    ("options", "pattern", "why"),
    [
        (["--include", "*.layer.1.*"], "*.layer.1.*", "matches nothing"),
        (["--exclude", "*.layers.9.*"], "*.layers.9.*", "matches nothing"),
        (["--exclude", "*.layers.0.*", "--exclude", "typo"], "typo", "matches nothing"),
        (["--exclude", "model.layers.0"], "model.layers.0", "model.layers.0.mlp.experts"),
        (["--exclude", "*.experts.3.*"], "*.experts.3.*", "matches nothing"),
        (["--include", "*.self_attn.*"], "*.self_attn.*", "--all-linears"),
        (["--include", "lm_head", "--all-linears"], "lm_head", "matches nothing"),
    ],
)
def test_a_pattern_that_changes_nothing(
    options: list[str], pattern: str, why: str, command: str, saved: Folders, tmp_path: Path
) -> None:
    target = [tmp_path / "out"] * (command == "quantize")
    message = refusal(command, saved("qwen3_moe"), *target, *options)
    assert f"{options[-2 if '--all-linears' not in options else 0]} {pattern!r}" in message
    assert why in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [["--exclude", "*"], ["--include", "*.q_proj", "--all-linears"]]
)
def test_patterns_that_leave_nothing(options: list[str], saved: Folders, tmp_path: Path) -> None:
    message = refusal("quantize", saved("qwen3_moe"), tmp_path / "out", *options)
    assert "leave nothing to quantize" in message


def test_all_linears_of_a_model_that_has_none(tmp_path: Path) -> None:
    linear_sets(tmp_path, {})
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(QuantizeError, match="--all-linears"):
        plan(checkpoint, Options(linears=True, gate=SILU))
