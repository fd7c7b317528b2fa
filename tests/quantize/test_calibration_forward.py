"""Running a model forward layer by layer gives what Transformers computes in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantize.calibration.budget import residual_streams
from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.forward import LayerwiseForward
from quantize.calibration.layerwise import LayerwiseModel
from quantize.calibration.routing import Routing
from quantize.calibration.store import Store, states_name
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.find import find
from quantize.experts.group import ExpertGroup
from quantize.experts.identify import identify
from tests.quantize import families

CPU = torch.device("cpu")

FAMILIES = {family for name, family in families.classes().items()
            if name not in families.UNSUPPORTED}  # fmt: skip

NOT_RUN = {
    "axk1": "fails on text",  # as Transformers' own does, with sizes as small as these
    "dbrx": "not found",  # blocks, not layers
    "deepseek_v3": "fails on text",  # likewise; with another head_dim below
    "diffusion_gemma": "fails on text",
    "ernie4_5_vl_moe": "is not there",  # images' experts, which text does not go to
    "gemma4": "fails on text",
    "glm4v_moe": "fails on text",  # likewise
    "jetmoe": "takes inputs, expert_size",
    "llama4": "takes hidden_states",
    "longcat_flash": "fails on text",  # likewise
    "mimo_v2_flash": "fails on text",  # likewise
    "openai_privacy_filter": "fails on text",
    "qwen3_omni_moe": "fails on text",  # three models in one
    "step3p7": "fails on text",  # likewise
}
"""Part of the error for each family whose tiny model cannot be calibrated."""


class Counting:
    """A visitor that counts."""

    def __init__(self) -> None:
        self.groups: list[str] = []
        self.tokens = 0

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        self.groups.append(group.prefix)
        self.tokens += int(routing.counts.sum())

    def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
        return weights

    def end(self) -> None:
        pass


def run_forward(
    folder: Path,
    store: Store,
    rows: torch.Tensor,
    visitor: Any,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, LayerwiseModel]:
    """What the last layer with experts returns."""
    with Checkpoint(folder) as checkpoint:
        model = LayerwiseModel(checkpoint, find(checkpoint), CPU, dtype)
        run = LayerwiseForward(checkpoint, identify(folder), model, rows, store)
        for layer in range(model.last + 1):
            run.layer_forward(layer, visitor)
            run.remove_states(layer)
    return store.open(f"{states_name(model.last + 1)}.000"), model


def whole(folder: Path, ours: LayerwiseModel, rows: torch.Tensor) -> torch.Tensor:
    """The same from Transformers' model, loaded and run as its users do."""
    model: Any = type(ours.model).from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager",
        attn_implementation=ours.model.config._attn_implementation,
    ).eval()  # fmt: skip
    seen: list[Any] = []
    layer = model.get_submodule(ours.layers_path)[ours.last]
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=rows, use_cache=False)
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def rows_of(count: int, length: int, high: int = 60) -> torch.Tensor:
    return torch.randint(1, high, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", sorted(FAMILIES - NOT_RUN.keys()))
def test_as_transformers(family: str, tmp_path: Path) -> None:
    folder = families.save(families.build(family), family, families.LAYOUTS[0], tmp_path / "m")
    rows = rows_of(3, 16)
    visitor = Counting()
    found, ours = run_forward(folder, Store(tmp_path / "store"), rows, visitor)
    truth = whole(folder, ours, rows)
    # Routers of some families compute in float32.
    assert (found - truth).norm() / truth.norm() < 1e-6
    assert visitor.groups
    assert visitor.tokens % rows.numel() == 0
    with Checkpoint(folder) as checkpoint:  # what the budget counts on
        hidden = find(checkpoint)[0].hidden
        assert found.numel() == rows.numel() * hidden * residual_streams(checkpoint)
    assert {file.name for file in (tmp_path / "store").iterdir()} == {
        "index.json", *Store(tmp_path / "store").names(states_name(ours.last + 1))
    }  # fmt: skip


@pytest.mark.parametrize("family", sorted(NOT_RUN))
def test_what_cannot_be_run_says_so(family: str, tmp_path: Path) -> None:
    folder = families.save(families.build(family), family, families.LAYOUTS[0], tmp_path / "m")
    with pytest.raises(QuantizeError, match=NOT_RUN[family]) as error:
        run_forward(folder, Store(tmp_path / "store"), rows_of(3, 16), Counting())
    assert "calibrat" in str(error.value)


def truth_of(folder: Path, rows: torch.Tensor, without_experts: bool = False) -> torch.Tensor:
    """What the trained model's last layer returns in Transformers, float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    for layer in model.model.layers[1:] if without_experts else ():
        layer.mlp.experts.down_proj.data.zero_()
    seen: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        model(input_ids=rows, use_cache=False)
    return seen[0]


def test_the_published_layout_in_several_runs(
    trained: Path, trained_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As published: one tensor an expert, other names; two rows at a time."""
    monkeypatch.setattr("quantize.calibration.forward.TOKENS_PER_RUN", 64)
    rows = rows_of(5, 32, 2000)
    found, _ = run_forward(trained_hub, Store(tmp_path / "store"), rows, Counting())
    truth = truth_of(trained, rows)
    assert (found - truth).norm() / truth.norm() < 1e-6


def test_what_a_visitor_returns_is_what_the_model_goes_on_with(
    trained: Path, tmp_path: Path
) -> None:
    class Zeros(Counting):
        def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
            weights.down = torch.zeros_like(weights.down)
            return weights

    rows = rows_of(2, 16, 2000)
    found, _ = run_forward(trained, Store(tmp_path / "store"), rows, Zeros())
    truth = truth_of(trained, rows, without_experts=True)
    assert (found - truth).norm() / truth.norm() < 1e-6


def test_in_bfloat16_as_on_a_gpu(trained: Path, tmp_path: Path) -> None:
    """Dtypes agree everywhere, and the router's bias keeps its own."""
    rows = rows_of(3, 16, 2000)
    found, ours = run_forward(trained, Store(tmp_path / "store"), rows, Counting(), torch.bfloat16)
    assert found.dtype == torch.bfloat16
    truth = truth_of(trained, rows)
    assert (found - truth).norm() / truth.norm() < 0.05
    assert ours.loader.dtype_plan["e_score_correction_bias"] == torch.float32


def test_layers_that_return_different_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GLM-5-next's: what one hands on beside its states, the next may not; in several runs."""
    monkeypatch.setattr("quantize.calibration.forward.TOKENS_PER_RUN", 16)
    family = "glm5_next"
    folder = families.save(families.build(family), family, families.LAYOUTS[0], tmp_path / "m")
    rows = rows_of(3, 16)
    found, ours = run_forward(folder, Store(tmp_path / "store"), rows, Counting())
    truth = whole(folder, ours, rows)
    assert (found - truth).norm() / truth.norm() < 1e-6
