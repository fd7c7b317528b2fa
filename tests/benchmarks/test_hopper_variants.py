"""The profile's changes of the kernel's source are made by text: each must find it."""

from __future__ import annotations

import pytest

from benchmarks.hopper_variants import ABLATIONS, Patch, variants
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

VARIANTS = variants(["few", "many"])


@pytest.mark.parametrize("name", VARIANTS, ids="-".join)
def test_a_variants_source_can_be_made(name: tuple[str, str]) -> None:
    source, whole = VARIANTS[name].source(), VARIANTS[name[0], "whole"].source()
    assert (source == whole) == (name[1] == "whole")
    kept = {line for line in source.splitlines() if line.startswith("DEFINE_GEMMS")}
    assert len(kept) == 2 and kept < set(KERNELS["bf16"].source().splitlines())


def test_a_change_that_finds_nothing_is_an_error() -> None:
    with pytest.raises(SystemExit, match="has 0 times, not 1: 'no such text'"):
        Patch("no such text", "").apply("some text")
    assert {name for _, name in VARIANTS} == {*ABLATIONS, "timeline"}
