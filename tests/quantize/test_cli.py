"""The command as a user types it: what it prints, where, and its exit code."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantize.cli.app import app
from tests.quantize import reference
from tests.quantize.checkpoints import contents
from tests.trained import Sizes

Folders = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def run(*args: object, columns: int = 200) -> Result:
    """The command in this process; any exception but an exit is a crash."""
    runner = CliRunner(env={"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"})
    result = runner.invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(*args: object, code: int = 1) -> str:
    """What a command that must fail says, last of all and in one line."""
    result = run(*args)
    assert result.exit_code == code, result.output
    *before, last = [line for line in result.stderr.splitlines() if line.strip()]
    assert last.startswith("error: "), result.stderr
    assert not [line for line in before if "error" in line]
    assert "Traceback" not in result.output
    return last


# -- quantize --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["quantize", "inspect", "verify", "evaluate", "doctor"])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_word_is_no_folder(
    command: str, empty: str, saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that a script did not set; an empty path would be the current folder."""
    monkeypatch.chdir(shutil.copytree(saved("qwen3_moe"), tmp_path / "here"))
    before = contents(Path())
    more = {"quantize": [tmp_path / "out"], "verify": ["."], "evaluate": ["."]}.get(command, [])
    option = {"evaluate": "--text", "doctor": "--json"}.get(command, "--revision")
    flag = {"quantize": "--overwrite", "doctor": "--quick"}.get(command, "--json")
    for words, whose in (
        ([empty, *more], "an argument"),
        ([flag, empty, *more], "an argument"),
        ([".", *more, option, empty], f"the value of {option}"),
        ([".", *more, f"{option}="], f"the value of {option}"),
        *([([".", empty], "an argument")] if command == "quantize" else []),
    ):
        result = run(command, *words)
        assert result.exit_code == 2, result.output
        assert f"{whose} is empty" in " ".join(result.stderr.replace("│", "").split())
    assert contents(Path()) == before and not (tmp_path / "out").exists()


def test_python_m_quantize_takes_a_source_at_once(saved: Folders, tmp_path: Path) -> None:
    """As a process of its own; the same files as the console script's ``quantize``."""
    source = saved("qwen3_moe")
    result = subprocess.run(
        [sys.executable, "-m", "quantize", source, tmp_path / "one", "--max-shard-size", "20KB"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert " s, shards at " in result.stdout
    again = run("quantize", source, tmp_path / "two", "--max-shard-size", "20KB")
    assert again.exit_code == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) > 5


def test_the_console_script_is_installed_with_its_three_commands() -> None:
    script = Path(sys.executable).with_name("nvfp4-moe")
    result = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    for command in ("quantize", "inspect", "verify"):
        assert command in result.stdout


def test_options_reach_the_pipeline(saved: Folders, tmp_path: Path) -> None:
    source = saved("qwen3_moe")
    options = ("--layout", "compressed-tensors", "--scales", "max")
    result = run("quantize", source, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "2 MoE layers, 8 experts, gate silu" in result.stderr
    out = reference.read_folder(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "nvfp4-pack-quantized"
    run("quantize", source, tmp_path / "mse", "--layout", "compressed-tensors")
    weights = reference.read_folder(source)
    module = "model.layers.0.mlp.experts.1.up_proj"
    exact = weights[f"{module}.weight"].array()
    largest, mse = (
        ((reference.weight(tensors, module) - exact) ** 2).sum()
        for tensors in (out, reference.read_folder(tmp_path / "mse"))
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
    assert "neither a folder nor a hub id" in refusal("quantize", tmp_path / "nowhere", out)
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-shard-size", "big"], "--max-shard-size 'big' is not a size"),
        (["--overwrite", "--resume"], "exclude each other"),
        (["--device", "tpu"], "neither cpu, nor cuda"),
    ],
)
def test_wrong_usage(options: list[str], words: str, saved: Folders, tmp_path: Path) -> None:
    assert words in refusal("quantize", saved("qwen3_moe"), tmp_path / "out", *options, code=2)
    assert not (tmp_path / "out").exists()


def commands() -> dict[str, Any]:
    return typer.main.get_command(app).commands


@pytest.mark.parametrize("command", ["quantize", "inspect", "verify"])
def test_every_option_has_an_example(command: str) -> None:
    options = [p for p in commands()[command].params if p.param_type_name == "option"]
    assert len(options) >= 3
    lacking = [option.opts[0] for option in options if "e.g." not in (option.help or "")]
    assert lacking == []
    assert f"nvfp4-moe {command} " in commands()[command].epilog
    shown = run(command, "--help")
    assert shown.exit_code == 0
    for option in options:
        assert option.opts[0] in shown.stdout


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
    assert config["nvfp4_moe"].pop("made")["scales"] == "mse"
    assert config["nvfp4_moe"] == {"version": 1, "gate": gate | {"interleaved": False}}
    assert run("verify", unknown, tmp_path / "out", "--gate", text).exit_code == 0
    assert run("inspect", unknown, "--gate", text).exit_code == 0


@pytest.mark.parametrize(
    "text",
    [
        "swish9",
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
    ids=lambda text: text[:40],
)
def test_a_bad_gate(text: str, saved: Folders, tmp_path: Path) -> None:
    words = ("quantize", saved("qwen3_moe"), tmp_path / "out", "--gate", text)
    assert "gate" in refusal(*words, code=2)
    assert not (tmp_path / "out").exists()


# -- inspect ---------------------------------------------------------------------------------------


def bytes_of_experts(sizes: Sizes) -> tuple[int, int]:
    """In bf16, and in 4.5 bits with a global scale for each of an expert's matrices."""
    scalars = len(sizes.sparse) * sizes.experts * 3 * 4
    return 2 * sizes.expert_weights, sizes.expert_weights * 9 // 16 + scalars


def test_inspect_a_trained_model(each_trained: Path) -> None:
    result, sizes = run("inspect", each_trained), Sizes.of(each_trained)
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if "N.mlp.experts" in line)
    cells = [cell.strip() for cell in row.strip("│┃| ").replace("┃", "│").split("│")]
    now, after = bytes_of_experts(sizes)
    assert cells == [
        "model.layers.N.mlp.experts",
        str(len(sizes.sparse)),
        str(sizes.experts),
        str(sizes.hidden),
        str(sizes.intermediate),
        f"{now / 1e6:.1f} MB",
        f"{after / 1e6:.1f} MB",
    ]
    assert "gate: swiglu_oai(alpha=1.702, beta=1, limit=7)" in result.stdout
    for stays in ("lm_head.weight", "model.embed_tokens.weight", "mlp.shared_experts.down_proj"):
        assert stays in result.stdout
    before = sum(len(raw.data) for raw in reference.read_folder(each_trained).values())
    assert f"{before / 1e6:.1f} MB -> {(before - now + after) / 1e6:.1f} MB" in result.stdout


def test_inspect_says_what_quantize_then_writes(saved: Folders, tmp_path: Path) -> None:
    shown = run("inspect", saved("deepseek_v3"), "--layout", "compressed-tensors").stdout
    run("quantize", saved("deepseek_v3"), tmp_path / "out", "--layout", "compressed-tensors")
    size = sum(len(raw.data) for raw in reference.read_folder(tmp_path / "out").values())
    assert f"-> {size / 1000:.1f} kB" in shown
    assert "gate: silu" in shown
    assert "mlp.shared_experts.gate_proj.weight" in shown


def test_inspect_cuts_nothing_off_on_a_narrow_terminal(trained: Path) -> None:
    shown = run("inspect", trained, columns=80).stdout
    assert "Stays as it is" in shown
    assert "…" not in shown


def test_inspect_a_dense_model(saved: Folders) -> None:
    result = run("inspect", saved("llama"))
    assert result.exit_code == 1
    assert "no routed experts" in result.stderr
    assert "model.layers.N.mlp.down_proj.weight" in result.stderr


# -- --json ----------------------------------------------------------------------------------------


def parsed(result: Result) -> dict[str, Any]:
    """Standard output, which must be JSON as the standard has it: without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(result.stdout, parse_constant=refuse)


def test_inspect_as_json(trained: Path) -> None:
    result = run("inspect", trained, "--json", columns=20)
    assert result.exit_code == 0
    assert result.stderr == ""
    shown = parsed(result)
    stays = {row["pattern"]: row for row in shown.pop("unchanged")}
    before = sum(len(raw.data) for raw in reference.read_folder(trained).values())
    sizes = Sizes.of(trained)
    now, after = bytes_of_experts(sizes)
    assert shown.pop("notes") == []
    assert shown == {
        "source": str(trained),
        "revision": None,
        "gate": {"form": "swiglu_oai", "alpha": 1.702, "beta": 1, "limit": 7, "interleaved": False},
        "layer_gates": {},
        "source_formats": [],
        "layers": [f"model.layers.{layer}.mlp.experts" for layer in sizes.sparse],
        "experts": [
            {
                "pattern": "model.layers.N.mlp.experts",
                "layers": len(sizes.sparse),
                "experts": sizes.experts,
                "hidden": sizes.hidden,
                "intermediate": sizes.intermediate,
                "bytes_now": now,
                "bytes_after": after,
            }
        ],
        "dense_linears": 0,
        "base": None,
        "base_linears": 0,
        "kv_cache": None,
        "bytes_before": before,
        "bytes_after": before - now + after,
    }
    assert stays["model.layers.N.self_attn.o_proj.weight"] == {
        "pattern": "model.layers.N.self_attn.o_proj.weight",
        "count": sizes.layers,
        "dtype": "BF16",
        "nbytes": sizes.layers * sizes.hidden * sizes.hidden * 2,
    }
    assert sum(row["nbytes"] for row in stays.values()) == before - now


def test_inspect_counts_linears(saved: Folders) -> None:
    shown = run("inspect", saved("qwen3_moe"), "--all-linears")
    assert "Linears quantized too: 8" in shown.stdout
    assert parsed(run("inspect", saved("qwen3_moe"), "--all-linears", "--json"))[
        "dense_linears"
    ] == len(("q", "k", "v", "o")) * len(range(2))


def test_verify_as_json(saved: Folders, tmp_path: Path) -> None:
    source, out = saved("qwen3_moe"), tmp_path / "out"
    run("quantize", source, out)
    good = run("verify", source, out, "--json", columns=20)
    assert good.exit_code == 0
    shown = parsed(good)
    assert shown.pop("ok") is True
    assert shown.pop("problems") == []
    assert shown.pop("notes") == []
    (layers,) = shown.values()
    assert list(shown) == ["layers"]
    assert [layer["prefix"] for layer in layers] == [
        f"model.layers.{layer}.mlp.experts" for layer in range(2)
    ]
    for layer in layers:
        assert set(layer) == {"prefix", "relative_error", "sqnr_db", "worst"}
        assert layer["worst"]["module"].startswith(f"{layer['prefix']}.")
        assert layer["relative_error"] <= layer["worst"]["relative"] < 0.2
        assert 0.05 < layer["relative_error"] < 0.15
        assert layer["sqnr_db"] == pytest.approx(-20 * math.log10(layer["relative_error"]))

    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.up_proj.weight_scale_2"
    tensors[name].fill_(float("nan"))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    bad = run("verify", source, out, "--json")
    assert bad.exit_code == 1
    shown = parsed(bad)
    assert shown["ok"] is False
    (problem,) = shown["problems"]
    assert name in problem
    assert f"problem: {problem}" in bad.stderr


def test_verify_of_weights_that_are_zero_or_not_numbers(saved: Folders, tmp_path: Path) -> None:
    """Nothing is lost of zeros, and all of NaNs; JSON has no number for either."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(saved("qwen3_moe"), source)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if ".layers.0.mlp.experts." in name:
            tensors[name].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    run("quantize", source, out)
    tensors["model.layers.1.mlp.experts.0.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = run("verify", source, out, "--json")
    assert result.exit_code == 1
    zeros, numbers = parsed(result)["layers"]
    assert (zeros["relative_error"], zeros["sqnr_db"]) == (0, None)
    assert (numbers["relative_error"], numbers["sqnr_db"]) == (None, None)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_errors_leave_no_json(command: str, saved: Folders, tmp_path: Path) -> None:
    words = {"inspect": [saved("llama")], "verify": [saved("qwen3_moe"), tmp_path / "nowhere"]}
    result = run(command, *words[command], "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: " in result.stderr
    assert run(command, *words[command], "--jason").exit_code == 2
