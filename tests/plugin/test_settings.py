"""Every option of the plugin is read in one place, and documented there."""

from __future__ import annotations

import re

from tests.conftest import ROOT
from vllm_nvfp4_moe import settings

PACKAGE = ROOT / "vllm_nvfp4_moe"


def test_nothing_else_reads_the_environment() -> None:
    code = {f: f.read_text() for f in PACKAGE.rglob("*.py") if f.name != "settings.py"}
    assert [f.name for f, text in code.items() if re.search(r"os\.(environ|getenv)", text)] == []


def test_every_variable_is_documented() -> None:
    variables = {v for v in vars(settings).values() if str(v).startswith("NVFP4_MOE_")}
    assert len(variables) == 7
    assert set(re.findall(r"NVFP4_MOE_\w+", str(settings.__doc__))) == variables
    # A name that is written elsewhere is one of these too.
    source = "".join(f.read_text() for f in PACKAGE.rglob("*.py"))
    assert set(re.findall(r"NVFP4_MOE_[A-Z_]+", source)) == variables
