"""Parameters of experts that vLLM's own methods run: what nothing was loaded into is refused, and
what is loaded as it should be stays as it was loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_nvfp4_moe.loading import unloaded

EXPERTS, ROWS, COLUMNS = 3, 4, 12


class Method:
    """As a method of vLLM's: it makes parameters, and processes them once they are loaded."""

    def __init__(self, **parameters: torch.Tensor) -> None:
        self.parameters = parameters
        self.processed: dict[str, torch.Tensor] = {}

    def create_weights(self, layer: torch.nn.Module) -> None:
        for name, data in self.parameters.items():
            layer.register_parameter(name, torch.nn.Parameter(data.clone(), requires_grad=False))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.processed = {name: each.data.clone() for name, each in layer.named_parameters()}


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``guarded(load_format, **parameters)``: a method with the guard, and its layer."""

    def guarded(load_format: str = "auto", **parameters: torch.Tensor) -> tuple[Method, Any]:
        config = SimpleNamespace(load_config=SimpleNamespace(load_format=load_format))
        monkeypatch.setattr(unloaded, "get_current_vllm_config", lambda: config)
        stored: Any = SimpleNamespace(has=lambda *_: True, bias=lambda _: None)
        method, layer = Method(**parameters), torch.nn.Module()
        layer.layer_name = "model.layers.0.mlp.experts"  # type: ignore[assignment]
        layer.moe_config = SimpleNamespace(w13_num_shards=2)  # type: ignore[assignment]
        unloaded.guard(method, layer.layer_name, stored)
        method.create_weights(layer)
        return method, layer

    return guarded


def test_padding_keeps_what_vllm_made(guarded: Any) -> None:
    """vLLM rounds sizes up for some ways of sharing experts out, and loads a part of each row."""
    made = torch.ones(EXPERTS, 2 * ROWS, COLUMNS)
    method, layer = guarded(w13_weight_scale=made, w2_weight_scale=made[:, :ROWS].clone())
    for parameter in layer.parameters():
        parameter.data[:, :, : COLUMNS - 5] = 0.5
    method.process_weights_after_loading(layer)
    for found in method.processed.values():
        assert (found[:, :, : COLUMNS - 5] == 0.5).all()
        assert (found[:, :, COLUMNS - 5 :] == 1.0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_blocks_of_bytes(guarded: Any, dtype: torch.dtype) -> None:
    """GGML's blocks are a dimension more."""
    made = torch.zeros(EXPERTS, 2 * ROWS, 5, 74, dtype=dtype)
    method, layer = guarded(w13_weight=made)
    layer.w13_weight.data[:, :ROWS] = 3
    with pytest.raises(ValueError, match=r"w13_weight for 3 of its 3 experts .* 0, w3\)"):
        method.process_weights_after_loading(layer)
    method, layer = guarded(w13_weight=made)
    layer.w13_weight.data[:] = 3
    method.process_weights_after_loading(layer)
    assert (method.processed["w13_weight"] == 3).all()


@pytest.mark.parametrize("shape", [(EXPERTS, 2), (EXPERTS,)])
def test_experts_that_calibration_did_not_see(guarded: Any, shape: tuple[int, ...]) -> None:
    """They lack an input scale, and vLLM's 1.0 is meant; but not if all lack it."""
    name = "w13_input_scale" if len(shape) == 2 else "w2_input_scale"
    method, layer = guarded(**{name: torch.ones(shape)})
    getattr(layer, name).data[1] = 0.25
    method.process_weights_after_loading(layer)
    found = method.processed[name]
    assert (found[1] == 0.25).all() and (found[[0, 2]] == 1.0).all()
    method, layer = guarded(**{name: torch.ones(shape)})
    with pytest.raises(ValueError, match=f"nothing was loaded into {name} for 3 of its 3"):
        method.process_weights_after_loading(layer)


def test_loaders_that_fill_weights_by_themselves(guarded: Any) -> None:
    """One that somebody has registered may do so after weights are processed."""
    made = torch.ones(EXPERTS, 2 * ROWS, COLUMNS)
    method, layer = guarded("somebodys", w13_weight_scale=made)
    method.process_weights_after_loading(layer)
    assert torch.equal(method.processed["w13_weight_scale"], made)
