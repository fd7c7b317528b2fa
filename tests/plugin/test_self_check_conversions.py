"""The check at load refuses weights that a conversion for the kernel has broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.plugin import nemotron
from tests.plugin.conftest import Loader
from tests.plugin.stand_ins import LAYER
from vllm_nvfp4_moe import settings
from vllm_nvfp4_moe.backends.cpu.method import CpuMethod

MonkeyPatch = pytest.MonkeyPatch


def swap_halves(layer: Any) -> None:
    for tensor in (layer.w13_weight.data, layer.w13_weight_scale.data.view(torch.uint8)):
        half = tensor.shape[1] // 2
        tensor.copy_(torch.cat((tensor[:, half:], tensor[:, :half]), 1))


def swap_nibbles(layer: Any) -> None:
    codes = layer.w2_weight.data
    codes.copy_((codes >> 4) | (codes << 4))


def shift_experts(layer: Any) -> None:
    layer.w13_weight.data.copy_(layer.w13_weight.data.roll(1, 0))


def shift_the_last_expert(layer: Any) -> None:
    layer.w2_weight.data[-1] = layer.w2_weight.data[0]


def shift_scales(layer: Any) -> None:
    scales = layer.w13_weight_scale.data.view(torch.uint8)
    scales.copy_(scales.roll(1, 2))


def mirror_rows(layer: Any) -> None:
    for tensor in (layer.w2_weight.data, layer.w2_weight_scale.data.view(torch.uint8)):
        tensor[:, -16:] = tensor[:, -16:].flip(1)


def double_a_global_scale(layer: Any) -> None:
    layer.w2_weight_scale_2.data *= 2


def lose_a_row_of_scales(layer: Any) -> None:
    layer.w2_weight_scale.data.view(torch.uint8)[:, -1] = 0


BROKEN = [
    swap_halves,
    swap_nibbles,
    shift_experts,
    shift_the_last_expert,
    shift_scales,
    mirror_rows,
    double_a_global_scale,
    lose_a_row_of_scales,
]


def shift_rows(layer: Any) -> None:
    for tensor in (layer.w13_weight.data, layer.w13_weight_scale.data.view(torch.uint8)):
        tensor.copy_(tensor.roll(16, 1))


def lose_the_last_rows(layer: Any) -> None:
    inner = layer.w13_weight.shape[1]
    layer.w13_weight.data[:, inner // 2 :] = 0  # as if half of them were a gate's


UNGATED = [shift_rows, lose_the_last_rows]
"""Conversions that break experts without a gate."""


@pytest.mark.parametrize("broken", [*BROKEN, *UNGATED], ids=lambda f: f.__name__)
def test_a_conversion_that_breaks_weights(
    load: Loader, shallow: dict, ungated: dict, monkeypatch: MonkeyPatch,
    broken: Callable[[Any], None],
) -> None:  # fmt: skip
    folder, name = (shallow, LAYER) if broken in BROKEN else (ungated, nemotron.LAYER)
    prepare = CpuMethod.prepare

    def convert(self: CpuMethod, layer: Any) -> None:
        prepare(self, layer)
        broken(layer)

    monkeypatch.setattr(CpuMethod, "prepare", convert)
    with pytest.raises(ValueError, match="self-check: the CPU kernel does not compute what"):
        load(folder["modelopt"])
    monkeypatch.setenv(settings.SELF_CHECK, "0")
    method = load(folder["modelopt"])[name].routed_experts.quant_method
    assert method.context.self_check.worst is None
