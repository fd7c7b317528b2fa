"""Ways to load that have no checkpoint's tensors: made-up weights, and weights already converted;
and how much a rank looks at of what is not its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_nvfp4_moe.loading.tensors import TensorKind

LAYER = "model.layers.1.mlp.experts"
Load = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("source", ["modelopt", "compressed-tensors", "on the fly"])
def test_dummy_weights(
    load: Load, shallow: dict[str, Path], shallow_bf16: Path, source: str
) -> None:
    """vLLM makes up scales of both signs. They mean nothing, so there is no self-check either."""
    folder = shallow.get(source, shallow_bf16)
    layer = load(folder, load_format="dummy")[LAYER].routed_experts
    check = layer.quant_method.context.self_check
    assert (check.worst, check.skipped) == (None, None)
    for name in ("w13_weight_scale", "w2_weight_scale", "w13_weight_scale_2", "w2_weight_scale_2"):
        scales = getattr(layer, name).float()
        assert scales.isfinite().all() and (scales > 0).all(), name
    torch.manual_seed(0)
    for tokens in (1, 300):
        x = torch.randn(tokens, 384).bfloat16()
        ids = torch.rand(tokens, 32).topk(4).indices.int()
        out = layer.quant_method.apply(layer, x, torch.full((tokens, 4), 0.25), ids, None, None)
        assert out.isfinite().all()
        assert 1e-3 < float(out.float().std()) < 1e3


@pytest.mark.parametrize("load_format", ["sharded_state", "runai_streamer_sharded", "tensorizer"])
def test_weights_that_were_converted_before(
    load: Load, shallow: dict[str, Path], load_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor import model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    # Whichever loader it is, it builds the model first; vLLM's own need packages and other files.
    loaders = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    monkeypatch.setitem(loaders, load_format, loaders["dummy"])
    more = {"model_loader_extra_config": {"tensorizer_uri": "x"}} if "tens" in load_format else {}
    monkeypatch.setattr(loaders["dummy"], "__init__", BaseModelLoader.__init__)
    with pytest.raises(ValueError, match=f"--load-format {load_format} loads weights as they were"):
        load(shallow["modelopt"], load_format=load_format, **more)


def test_values_of_other_ranks_experts(
    load: Load, shallow: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are another rank's to check; what a name promises is looked at everywhere."""
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    loads = layer.quant_method.loads
    monkeypatch.setattr(
        type(layer), "_map_global_expert_id_to_local_expert_id", lambda self, e: -1 if e > 15 else e
    )
    scale = torch.full((128, 24), torch.nan).to(torch.float8_e4m3fn)
    loads.check(TensorKind.BLOCK_SCALE, "w1", 16, scale)
    with pytest.raises(ValueError, match=r"expert 15, gate \(w1\), weight_scale: .*NaN"):
        loads.check(TensorKind.BLOCK_SCALE, "w1", 15, scale)
    for wrong, problem in ((scale[:, 1:], "shape"), (scale.float(), "dtype")):
        with pytest.raises(ValueError, match=f"expert 16, .* weight_scale: {problem}"):
            loads.check(TensorKind.BLOCK_SCALE, "w1", 16, wrong)
    # Some kernels take the input scales of all.
    monkeypatch.setattr(loads, "global_input_scales", True)
    monkeypatch.setattr(loads, "uses_input_scales", True)
    with pytest.raises(ValueError, match=r"expert 16, .* input_scale: "):
        loads.check(TensorKind.INPUT_SCALE, "w1", 16, torch.tensor(0.0))
