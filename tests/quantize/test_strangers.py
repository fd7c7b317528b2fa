"""Tensors beside experts' weights that are not known: without them the model is another."""

from pathlib import Path

import pytest
import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.evaluate.side import Side
from quantize.experts.gates import Gate
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan
from tests.quantize.test_experts import Folders, changed

NAMES = {
    "qwen3_moe": (
        "0.up_proj.lora_A.weight", "3.down_proj.weight_g", "1.gate_proj.lora_B.default.weight",
        "lora_A.weight", "base_layer.lora_B.weight", "0.norm.weight", "2.scale",
        "3.adapter.up_proj.weight", "1.fourth_proj.bias",
    ),
    "gpt_oss": ("gate_up_proj.lora_A", "down_proj_g", "lora_embedding_A"),
}  # fmt: skip
EXPERTS = "model.layers.1.mlp.experts"
GATES = {
    "qwen3_moe": Gate("silu"),
    "gpt_oss": Gate("swiglu_oai", 1.702, 1.0, 7.0, interleaved=True),
}


def with_stranger(model: str, name: str, saved: Folders, target: Path) -> Path:
    added = {f"{EXPERTS}.{name}": torch.zeros(4, 4)}
    return changed(saved(model), target, lambda tensors: tensors.update(added))


@pytest.mark.parametrize("stated", [False, True], ids=["class", "stated"])
@pytest.mark.parametrize(
    ("model", "name"), [(model, name) for model, names in NAMES.items() for name in names]
)
def test_what_lies_beside_an_experts_weight(
    model: str, name: str, stated: bool, saved: Folders, tmp_path: Path
) -> None:
    """An adapter that was not merged, or a norm: also if the user says what the gate is."""
    folder = with_stranger(model, name, saved, tmp_path / "x")
    with pytest.raises(QuantizeError) as caught, Checkpoint(folder) as checkpoint:
        plan(checkpoint, Options(gate=GATES[model] if stated else None))
    said = f"model.safetensors: {EXPERTS}.{name} lies beside an expert's weight"
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("name", NAMES["qwen3_moe"])
def test_beside_what_stays(name: str, saved: Folders, tmp_path: Path) -> None:
    """It is copied with the experts that it belongs to, but a model that is run would lack it."""
    options = Options(exclude=("*.layers.1.*",))
    with Checkpoint(with_stranger("qwen3_moe", name, saved, tmp_path / "x")) as checkpoint:
        planned = plan(checkpoint, options)
        written = {
            out.name for shard in range(len(planned.shards)) for out in planned.outputs(shard)
        }
        assert f"{EXPERTS}.{name}" in written
        calibrated = Options(exclude=options.exclude, calibration=Calibration("text", 4, 64, ""))
        with pytest.raises(QuantizeError, match="lies beside an expert's weight"):
            plan(checkpoint, calibrated)
        with pytest.raises(QuantizeError, match="lies beside an expert's weight"):
            Side(checkpoint, torch.device("cpu"), torch.float32)
