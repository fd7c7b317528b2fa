"""The guard against attention captured into piecewise CUDA graphs (see quirks)."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vllm_nvfp4_moe import quirks

ARMED = "from vllm_nvfp4_moe.quirks import attention_break_is_armed as a; print(a())"


@pytest.mark.parametrize(("setting", "armed"), [("1", True), ("0", False), (None, False)])
def test_vllm_decides_when_attention_is_imported(setting: str | None, armed: bool) -> None:
    """The quirk itself, in vLLM's own module: if this fails, the guard may have become needless.
    Where vLLM decides at capture, attention is always ready for it."""
    said = str(armed or not quirks.FROZEN_ATTENTION.seen_here())
    env = {k: v for k, v in os.environ.items() if k != "VLLM_USE_BREAKABLE_CUDAGRAPH"}
    if setting is not None:
        env["VLLM_USE_BREAKABLE_CUDAGRAPH"] = setting
    # Setting it afterwards, as VllmConfig does, changes nothing.
    late = "; import os; os.environ['VLLM_USE_BREAKABLE_CUDAGRAPH'] = '1'; print(a())"
    done = subprocess.run(
        [sys.executable, "-c", ARMED + late], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout.split()[-2:] == [said, said]


@pytest.mark.parametrize(
    ("mode", "breakable", "armed", "after"),
    [
        ("FULL_AND_PIECEWISE", True, False, "FULL_DECODE_ONLY"),
        ("PIECEWISE", True, False, "NONE"),
        ("FULL_AND_PIECEWISE", True, True, "FULL_AND_PIECEWISE"),
        ("FULL_AND_PIECEWISE", False, False, "FULL_AND_PIECEWISE"),
        ("FULL_DECODE_ONLY", True, False, "FULL_DECODE_ONLY"),
        ("NONE", True, False, "NONE"),
    ],
)
def test_piecewise_graphs_are_given_up_only_where_they_are_wrong(
    monkeypatch, mode: str, breakable: bool, armed: bool, after: str
) -> None:
    from vllm.config import CUDAGraphMode

    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", str(int(breakable)))
    monkeypatch.setattr(quirks, "attention_break_is_armed", lambda: armed)
    config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]))
    quirks.avoid_frozen_attention(config)
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode[after]
