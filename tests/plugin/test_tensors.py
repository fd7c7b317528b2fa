"""The table of an expert's tensors, against what the layouts write."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers.fused_moe import FusedMoeWeightScaleSupported

from quantize.layouts import LAYOUTS
from tests.quantize.plain import plainly
from vllm_nvfp4_moe.loading.tensors import EXPERT_TENSORS, TensorKind, name_of


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_is_what_the_layout_stores(layout) -> None:
    (weight,) = plainly([torch.randn(48, 64)])
    stored = layout.store(weight) | layout.store_input_scale(0.5)
    assert [*EXPERT_TENSORS, TensorKind.BIAS] == list(TensorKind)
    assert [name_of(kind, layout) for kind in TensorKind] == [*stored, "bias"]
    for tensor in EXPERT_TENSORS.values():
        found = stored.pop(tensor.suffix(layout))
        assert found.dtype == tensor.dtype
        if tensor.per_matrix:
            assert found.numel() == 1 and tensor.shape(48, 64) == ()
        else:
            assert found.shape == tensor.shape(48, 64)
    assert not stored


def test_canonical_names_are_modelopts() -> None:
    names = tuple(tensor.canonical for tensor in EXPERT_TENSORS.values())
    assert names == LAYOUTS["modelopt"].suffixes


def test_vllm_knows_the_granularities() -> None:
    found = {tensor.granularity for tensor in EXPERT_TENSORS.values()}
    assert found == {None, "group", "tensor"}
    assert {FusedMoeWeightScaleSupported(g).value for g in found if g} == {"group", "tensor"}
