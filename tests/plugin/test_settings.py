"""Every option of the plugin is read in one place, and documented there and for operators."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantize.native import environment
from tests.conftest import ROOT
from vllm_nvfp4_moe import settings

PACKAGE = ROOT / "vllm_nvfp4_moe"
SERVING = ROOT / "docs" / "operators" / "serving.md"

READ = {
    settings.SELF_CHECK: (settings.self_check, True, False),
    settings.HOPPER: (settings.hopper, True, False),
    settings.CPP: (environment.cpp, True, False),
    settings.ACTIVATIONS: (settings.hopper_activations, "bf16", "fp8"),
    settings.SELECT: (lambda: settings.MEASURED if settings.measured() else None, None, "measured"),
    settings.CACHE: (environment.cache, None, Path("/kernels")),
}
"""Of each option that ``--additional-config`` may say: who reads it, what is read if nobody says
anything, and something else."""


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in settings.OPTIONS:
        monkeypatch.delenv(name, raising=False)
    yield
    for said in (settings._configured, environment.configured):
        said.clear()


def key(variable: str) -> str:
    return variable.removeprefix("NVFP4_MOE_").lower()


def in_json(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def test_what_both_packages_read_has_one_name() -> None:
    assert (settings.CPP, settings.CACHE) == (environment.CPP, environment.CACHE)


def test_nothing_else_reads_the_environment() -> None:
    code = {f: f.read_text() for f in PACKAGE.rglob("*.py") if f.name != "settings.py"}
    assert [f.name for f, text in code.items() if re.search(r"os\.(environ|getenv)", text)] == []


def test_every_variable_is_documented() -> None:
    variables = {v for v in vars(settings).values() if str(v).startswith("NVFP4_MOE_")}
    assert set(settings.OPTIONS) < variables
    assert set(re.findall(r"NVFP4_MOE_\w+", str(settings.__doc__))) == variables
    # A name that is written elsewhere is one of these too.
    source = "".join(f.read_text() for f in PACKAGE.rglob("*.py"))
    assert set(re.findall(r"NVFP4_MOE_[A-Z_]+", source)) == variables


def test_operators_have_one_table_of_all() -> None:
    rows = re.findall(r"^\| (`.*?`|none) \| `(NVFP4_MOE_\w+)` \|", SERVING.read_text(), flags=re.M)
    named = {variable: first.strip("`") for first, variable in rows}
    for variable in settings.OPTIONS:
        assert named.pop(variable) == key(variable)
    assert set(named) == {settings.ANY_VLLM} and set(named.values()) == {"none"}


@pytest.mark.parametrize("name", settings.OPTIONS)
def test_both_ways_and_which_wins(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read, plain, other = READ[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_CACHE_ROOT", "relative")  # so that there is no folder by default
    assert read() == plain
    settings.use({"nvfp4_moe": {key(name): in_json(other)}, "gdn_prefill_backend": "triton"})
    assert read() == other
    settings.use({"nvfp4_moe": {}})
    assert read() == plain
    variable = {True: "1", False: "0", None: "/elsewhere"}
    monkeypatch.setenv(name, variable.get(other, str(other)))
    assert read() == other
    said: list[str] = []
    monkeypatch.setattr(settings.logger, "warning", lambda text, *args: said.append(text % args))
    monkeypatch.setenv(name, variable.get(plain, str(plain)))
    for _ in range(2):  # of two layers
        settings.use({"nvfp4_moe": {key(name): in_json(other)}})
    assert read() == other
    (line,) = said
    assert line.startswith(f"{name}={variable.get(plain, plain)} in the environment does not count")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hoper": False}, "has no option 'hoper'; there are self_check, hopper, "),
        ({"any_vllm": True}, "has no option 'any_vllm'"),
        ({"hopper": 0}, "nvfp4_moe.hopper must be true or false, not 0"),
        ({"hopper": "false"}, "nvfp4_moe.hopper must be true or false, not 'false'"),
        ({"activations": False}, "nvfp4_moe.activations must be text, not False"),
        ({"cache": None}, "nvfp4_moe.cache must be text, not None"),
        (["hopper"], r"nvfp4_moe must be options by name, not \['hopper'\]"),
        ("fp8", "nvfp4_moe must be options by name, not 'fp8'"),
    ],
)
def test_what_cannot_be(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^--additional-config: .*{message}"):
        settings.use({"nvfp4_moe": config})
    assert settings.hopper()


def test_a_variable_that_is_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.HOPPER, "false")
    with pytest.raises(ValueError, match=r"^NVFP4_MOE_HOPPER=false in the environment: must"):
        settings.use({})


def test_through_vllm(
    load: Callable[..., dict[str, Any]], shallow: dict[str, Path], summary_lines: list[str]
) -> None:
    """As ``--additional-config`` hands it over; it also makes another hash of vLLM's config."""
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())

    def given(options: dict[str, Any]) -> EngineArgs:
        words = ["--additional-config", json.dumps({"nvfp4_moe": options}), "--enforce-eager"]
        words += ["--model", str(shallow["modelopt"]), "--max-model-len", "64"]
        return EngineArgs.from_cli_args(parser.parse_args(words))

    off, on = ({"self_check": value} for value in (False, True))
    configs = [VllmConfig(additional_config=given(said).additional_config) for said in (off, on)]
    hashes = [config.compute_hash() for config in (*configs, *configs)]
    assert hashes[0] != hashes[1] and hashes[:2] == hashes[2:]
    load(shallow["modelopt"], additional_config=given(off).additional_config)
    assert summary_lines[0].endswith("; no self-check")
    with pytest.raises(ValueError, match="has no option 'selfcheck'"):
        load(shallow["modelopt"], additional_config={"nvfp4_moe": {"selfcheck": False}})
