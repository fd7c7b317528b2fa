"""Running a model forward layer by layer gives what Transformers computes in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantize.calibration.budget import state_size
from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.forward import LayerwiseForward
from quantize.calibration.layerwise import LayerwiseModel
from quantize.calibration.routing import Routing
from quantize.calibration.store import Store, states_name
from quantize.calibration.visitor import NullVisitor
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.find import find
from quantize.experts.group import ExpertGroup
from quantize.experts.identify import identify
from tests.quantize import families

CPU = torch.device("cpu")

FAMILIES = {family for name, family in families.classes().items()
            if name not in families.UNSUPPORTED}  # fmt: skip

NOT_RUN = families.NOT_CALIBRATED.keys() & FAMILIES


class Counting(NullVisitor):
    """A visitor that counts, and keeps what experts are given."""

    def __init__(self) -> None:
        self.groups: list[str] = []
        self.tokens = 0
        self.inputs: list[torch.Tensor] = []

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        self.groups.append(group.prefix)
        self.inputs.append(routing.x.clone())
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
    return layers_and_inputs(folder, ours, rows)[0][-1]


def layers_and_inputs(
    folder: Path, ours: LayerwiseModel, rows: torch.Tensor, **more: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What each layer returns, and what each layer's experts are given, in Transformers' model.

    ``more`` are fields of its text config.
    """
    model: Any = type(ours.model).from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager",
        attn_implementation=ours.model.config._attn_implementation,
    ).eval()  # fmt: skip
    for name, value in more.items():
        setattr(model.config.get_text_config(), name, value)
    states: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []

    def keep_output(module: Any, given: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    def keep_input(module: Any, given: Any, named: dict[str, Any]) -> None:
        x = next(iter((*given, *named.values())))
        inputs.append(x.reshape(-1, x.shape[-1]).clone())

    for layer in model.get_submodule(ours.layers_path)[: ours.last + 1]:
        layer.register_forward_hook(keep_output)
    for site in ours.sites:
        model.get_submodule(site.path).register_forward_pre_hook(keep_input, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=rows, use_cache=False)
    return states, inputs


def rows_of(count: int, length: int, high: int = 60) -> torch.Tensor:
    return torch.randint(1, high, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", sorted(FAMILIES - NOT_RUN))
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
        assert found.numel() == rows.numel() * state_size(checkpoint, hidden)
    assert {file.name for file in (tmp_path / "store").iterdir()} == {
        "index.json", *Store(tmp_path / "store").names(states_name(ours.last + 1))
    }  # fmt: skip


FOUR = {"num_hidden_layers": 4}
MIXED: dict[str, tuple[str, dict[str, Any], str]] = {
    "window": ("mixtral", {"sliding_window": 4}, ""),
    "GPT-OSS": ("gpt_oss", {"sliding_window": 4} | FOUR, "layer_types"),
    "MiMo-V2": ("mimo_v2_flash", {"sliding_window": 4} | FOUR, "layer_types"),
    "Step-3.7": (
        "step3p7",
        {"text_config": {"sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"]}},
        "layer_types",
    ),
    "Gemma4, embeddings of each layer": (
        "gemma4",
        {"text_config": FOUR | {"sliding_window": 4, "hidden_size_per_layer_input": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2}},
        "layer_types",
    ),
    "Qwen3-Next": (
        "qwen3_next", FOUR | {"layer_types": ["linear_attention", "full_attention"] * 2},
        "layer_types",
    ),
    "Jamba": (
        "jamba",
        FOUR | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
            "expert_layer_offset": 1},
        "layers_block_type",
    ),
    "Granite hybrid": (
        "granitemoehybrid", FOUR | {"layer_types": ["mamba", "full_attention"] * 2}, "layer_types"
    ),
    "LFM2": ("lfm2_moe", FOUR | {"layer_types": ["conv", "full_attention"] * 2}, "layer_types"),
    "DeepSeek-V3, groups and dense layers": (
        "deepseek_v3",
        FOUR | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 2},
        "",
    ),
}  # fmt: skip
"""Models whose layers differ, and whose windows are shorter than the texts: family, fields of the
config, and the field that says the layers' kinds."""


@pytest.mark.parametrize("case", MIXED)
def test_layers_that_differ_and_windows(case: str, tmp_path: Path) -> None:
    family, more, kinds = MIXED[case]
    model = families.build(family, **more)
    config: Any = model.config.get_text_config()
    assert not kinds or len(set(getattr(config, kinds))) == 2
    folder = families.save(model, family, families.LAYOUTS[0], tmp_path / "m")
    rows, visitor = rows_of(3, 24), Counting()
    found, ours = run_forward(folder, Store(tmp_path / "store"), rows, visitor)
    states, inputs = layers_and_inputs(folder, ours, rows)
    assert len(states) == config.num_hidden_layers
    assert (found - states[-1]).norm() / states[-1].norm() < 1e-6
    assert len(visitor.inputs) == len(inputs) > 0
    for got, want in zip(visitor.inputs, inputs, strict=True):
        assert ((got - want).norm(dim=1) <= 1e-5 * want.norm(dim=1)).all()  # float32 in places
    if getattr(config, "sliding_window", None) == 4:  # it is in force
        wide, _ = layers_and_inputs(folder, ours, rows, sliding_window=64)
        assert (found - wide[-1]).norm() / found.norm() > 1e-3


@pytest.mark.parametrize("family", sorted(NOT_RUN))
def test_what_cannot_be_run_says_so(family: str, tmp_path: Path) -> None:
    folder = families.save(families.build(family), family, families.LAYOUTS[0], tmp_path / "m")
    expected, _ = families.NOT_CALIBRATED[family]
    with pytest.raises(QuantizeError, match=expected) as error:
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
