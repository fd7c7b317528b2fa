"""Registration is cheap, repeatable, and changes nothing for anyone who does not ask for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.plugin.conftest import Damage


def python(code: str, **env: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_nothing_heavy() -> None:
    """In a fresh process: no torch, no vLLM, no transformers, until vLLM asks for methods."""
    out = python(
        "import sys, vllm_nvfp4_moe\n"
        "vllm_nvfp4_moe.register(); vllm_nvfp4_moe.register()\n"
        "heavy = ('torch', 'vllm', 'transformers', 'numba', 'numpy', 'quantize')\n"
        "print([m for m in heavy if m in sys.modules])\n"
    )
    assert out.strip() == "[]"


def test_vllm_finds_it_through_the_entry_point() -> None:
    """Loaded as vLLM loads plugins, known by name; our modules beyond the config stay unloaded."""
    out = python(
        "import sys\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "from vllm.model_executor.layers import quantization as q\n"
        "print(q.get_quantization_config('nvfp4_moe').__module__)\n"
        "print(q.QUANTIZATION_METHODS.count('nvfp4_moe'))\n"
        "print([m for m in sys.modules if m.startswith(('vllm_nvfp4_moe.b', 'quantize'))])\n"
    )
    assert out.split("\n")[-4:-1] == ["vllm_nvfp4_moe.config", "1", "[]"]


def test_registering_after_the_import_works_too() -> None:
    out = python(
        "from vllm.model_executor.layers import quantization as q\n"
        "import vllm_nvfp4_moe\n"
        "vllm_nvfp4_moe.register(); vllm_nvfp4_moe.register()\n"
        "print(q.QUANTIZATION_METHODS.count('nvfp4_moe'))\n",
        VLLM_PLUGINS="",
    )
    assert out.split()[-1] == "1"


@pytest.mark.parametrize(
    ("found", "accepted"),
    [("0.32.0", True), ("0.32.5+cpu", True), ("0.33.1", True), ("0.31.2", False), ("1.0", False),
     ("0.34.0rc1", False), (None, False)],
)  # fmt: skip
def test_versions(monkeypatch, caplog, found: str | None, accepted: bool) -> None:
    from vllm_nvfp4_moe import registration, versions

    waiting: list[str] = []
    monkeypatch.delenv("NVFP4_MOE_ANY_VLLM", raising=False)  # test-next may set it
    monkeypatch.setattr(versions, "installed_version", lambda: found)
    monkeypatch.setattr(registration, "when_imported", lambda name, callback: waiting.append(name))
    monkeypatch.setattr(registration.logger, "propagate", True)
    registration.register()
    assert bool(waiting) == accepted
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == (0 if accepted else 1)
    if errors:
        assert "needs vLLM 0.32 or 0.33" in errors[0]
        assert str(found) in errors[0] or found is None
        assert found is None or "NVFP4_MOE_ANY_VLLM=1" in errors[0]


def test_any_version_is_tried_if_asked_for(monkeypatch, caplog) -> None:
    from vllm_nvfp4_moe import registration, versions

    waiting: list[str] = []
    monkeypatch.setattr(versions, "installed_version", lambda: "0.41.0")
    monkeypatch.setattr(registration, "when_imported", lambda name, callback: waiting.append(name))
    monkeypatch.setattr(registration.logger, "propagate", True)
    for value, tried in (("0", False), ("", False), ("1", True)):
        caplog.clear()
        monkeypatch.setenv("NVFP4_MOE_ANY_VLLM", value)
        registration.register()
        assert bool(waiting) == tried
        (record,) = caplog.records
        assert record.levelname == ("WARNING" if tried else "ERROR")
        assert "0.41.0" in record.getMessage()
        assert "NVFP4_MOE_ANY_VLLM=1" in record.getMessage()


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_what_it_claims(quantized: dict[str, Path], layout: str) -> None:
    """What it is asked for, and what has a contract and names no other method."""
    from types import SimpleNamespace

    from vllm_nvfp4_moe.config import NvFp4MoEConfig

    config = json.loads((quantized[layout] / "config.json").read_text())
    stored = config["quantization_config"]
    claim = NvFp4MoEConfig.override_quantization_method
    without = SimpleNamespace()
    ours = SimpleNamespace(nvfp4_moe=config["nvfp4_moe"])
    assert claim(stored, "nvfp4_moe", without) == claim(stored, None, ours) == "nvfp4_moe"
    assert claim(stored, None, without) is claim(stored, None) is None
    for asked in ("modelopt_fp4", "compressed-tensors", "fp8"):
        assert claim(stored, asked, ours) is None
    for other in ({"quant_method": "fp8"}, None):
        assert claim(other, "fp8", ours) is claim(other, None, ours) is claim(other, None) is None


STOCK = [("modelopt", "modelopt_fp4"), ("compressed-tensors", "compressed-tensors")]


@pytest.mark.parametrize(("layout", "stock"), STOCK)
def test_without_the_flag(
    quantized: dict[str, Path], tmp_path: Path, layout: str, stock: str
) -> None:
    """vLLM's own resolution: a contract is enough, and it is needed."""
    from vllm.engine.arg_utils import EngineArgs

    folder = quantized[layout]
    for asked in (None, "nvfp4_moe"):
        config = EngineArgs(model=str(folder), quantization=asked).create_model_config()
        assert config.quantization == "nvfp4_moe"
    without = Damage(folder, tmp_path / "copy").config(lambda c: c.pop("nvfp4_moe"))
    assert EngineArgs(model=str(without)).create_model_config().quantization == stock
    told = {"nvfp4_moe": json.loads((folder / "config.json").read_text())["nvfp4_moe"]}
    config = EngineArgs(model=str(without), hf_overrides=told).create_model_config()
    assert config.quantization == "nvfp4_moe"


def test_the_gate_that_the_user_says(
    load: Callable[..., dict[str, Any]], damage: Callable[..., Damage], summary_lines: list[str]
) -> None:
    """``--hf-overrides`` goes before the contract in the file, and before the model's class."""
    gate = {"form": "swiglu_oai", "alpha": 1.5, "beta": 0.5, "limit": 6.0}
    said = {"nvfp4_moe": {"version": 1, "gate": gate}}
    experts = damage("modelopt")
    for folder in (experts.folder, experts.config(lambda config: config.pop("nvfp4_moe"))):
        runners = load(folder, hf_overrides=said)
        assert "gate swiglu_oai(alpha=1.5, beta=0.5, limit=6); " in summary_lines.pop()
        ours = runners["model.layers.1.mlp.experts"].routed_experts
        assert (ours.quant_method.gate.alpha, ours.quant_method.gate.beta) == (1.5, 0.5)
    load(folder)
    assert "gate swiglu_oai(alpha=1.702, beta=1, limit=7); " in summary_lines.pop()


def test_without_the_flag_as_the_hub_publishes_it(trained_hub: Path, tmp_path: Path) -> None:
    """vLLM has a config class of its own for MiniMax-M3, and texts nested in it."""
    from vllm.engine.arg_utils import EngineArgs

    from quantize.checkpoint.reader import Checkpoint
    from quantize.execute import execute
    from quantize.run.plan import plan

    with Checkpoint(trained_hub) as source:
        execute(source, plan(source), tmp_path / "hub")
    args = EngineArgs(model=str(tmp_path / "hub"))
    assert args.create_model_config().quantization == "nvfp4_moe"


@pytest.mark.parametrize(("layout", "stock"), STOCK)
def test_naming_vllms_own_method(
    quantized: dict[str, Path], tmp_path: Path, monkeypatch, layout: str, stock: str
) -> None:
    """It is obeyed, with one warning if vLLM may apply another gate."""
    from vllm.engine.arg_utils import EngineArgs

    from tests.plugin.conftest import Damage
    from vllm_nvfp4_moe import config

    warnings: list[str] = []
    warn = lambda text, *args: warnings.append(text % args)  # noqa: E731
    monkeypatch.setattr(config.logger, "warning_once", warn)
    folder = quantized[layout]
    chosen = EngineArgs(model=str(folder), quantization=stock).create_model_config()
    assert chosen.quantization == stock
    (warning,) = warnings
    assert warning.startswith("THE GATE MAY BE WRONG, AND THE TEXT WITH IT: this checkpoint's")
    assert "swiglu_oai(alpha=1.702, beta=1, limit=7), and --quantization " + stock in warning
    silu = Damage(folder, tmp_path / "silu").config(
        lambda c: c["nvfp4_moe"].update(gate={"form": "silu"})
    )
    chosen = EngineArgs(model=str(silu), quantization=stock).create_model_config()
    assert (chosen.quantization, len(warnings)) == (stock, 1)


def test_everything_but_experts_is_stock(load, shallow: dict[str, Path]) -> None:
    """With the plugin asked for, every linear layer has vLLM's own unquantized method."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    for folder in shallow.values():
        model = load(folder)["model"]
        linear = [m for m in model.modules() if isinstance(m, LinearBase)]
        assert len(linear) >= 8
        assert all(isinstance(m.quant_method, UnquantizedLinearMethod) for m in linear)


@pytest.mark.parametrize("first", ["", "import vllm.ray.ray_env; "])
def test_settings_reach_workers_on_ray(first: str) -> None:
    """By vLLM's own list, in the process that starts them, whichever was imported first."""
    out = python(
        f"{first}from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.ray.ray_env import get_env_vars_to_copy\n"
        "print(sorted(get_env_vars_to_copy() & {'NVFP4_MOE_ACTIVATIONS', 'VLLM_FOO', 'FOO'}))",
        NVFP4_MOE_ACTIVATIONS="fp8",
        VLLM_FOO="1",
        FOO="1",
    )
    assert out.splitlines()[-1] == "['NVFP4_MOE_ACTIVATIONS', 'VLLM_FOO']"


def test_the_cpu_backend_where_nothing_can_be_written() -> None:
    """numba finds no folder for its cache, as with a read-only file system and a user without a
    home directory: the loops are compiled for this process alone."""
    out = python(
        "from numba.core.caching import CacheImpl; CacheImpl._locator_classes = []\n"
        "import torch; from vllm_nvfp4_moe.backends.cpu import kernels\n"
        "codes = torch.full((2, 8), 0x32, dtype=torch.uint8)\n"
        "print(kernels.expand(codes, torch.ones(2, 1).to(torch.float8_e4m3fn)).unique().tolist())"
    )
    assert out.splitlines()[-1] == "[1.0, 1.5]"
