"""Gates: what identification says, against what Transformers' own modules compute."""

import importlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import linear
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from quantize.errors import QuantizeError
from quantize.gates import FORMS, Gate, from_contract, to_contract
from quantize.gates.probe import Probe
from quantize.identify import identify, identify_config, match
from tests.quantize import checkpoints

OAI = {"form": "swiglu_oai", "alpha": 1.702, "beta": 1.0, "limit": 7.0}


def gemma4(**more: Any) -> transformers.PreTrainedConfig:
    return transformers.Gemma4TextConfig(
        **checkpoints.SIZES
        | {"num_experts": 4, "moe_intermediate_size": 48, "top_k_experts": 2}
        | more,
        enable_moe_block=True,
    )


def deepseek_v4(**more: Any) -> transformers.PreTrainedConfig:
    return transformers.DeepseekV4Config(
        **{"hidden_size": 32, "moe_intermediate_size": 48, "n_routed_experts": 4} | more
    )


CASES: dict[str, tuple[transformers.PreTrainedConfig, Gate]] = {
    "minimax_m3": (checkpoints.minimax_m3(), Gate(**OAI)),
    "minimax_m3, other numbers": (
        checkpoints.minimax_m3(swiglu_alpha=1.3, swiglu_limit=5.5),
        Gate("swiglu_oai", 1.3, 1.0, 5.5),
    ),
    "gpt_oss": (checkpoints.gpt_oss(), Gate(**OAI, interleaved=True)),
    "gpt_oss, another limit": (
        checkpoints.gpt_oss(swiglu_limit=4.25),
        Gate("swiglu_oai", 1.702, 1.0, 4.25, True),
    ),
    "qwen3_moe": (checkpoints.qwen3_moe(), Gate("silu")),
    "qwen3_moe, gelu": (checkpoints.qwen3_moe(hidden_act="gelu"), Gate("gelu")),
    "qwen3_moe, gelu_tanh": (
        checkpoints.qwen3_moe(hidden_act="gelu_pytorch_tanh"),
        Gate("gelu_tanh"),
    ),
    "mixtral": (checkpoints.mixtral(), Gate("silu")),
    "deepseek_v3": (checkpoints.deepseek_v3(), Gate("silu")),
    "gemma4": (gemma4(), Gate("gelu_tanh")),
    "deepseek_v4": (deepseek_v4(swiglu_limit=3.0), Gate("swiglu_oai", 1.0, 0.0, 3.0)),
}


def experts_class(config: transformers.PreTrainedConfig) -> type[torch.nn.Module]:
    """The one ``*Experts`` class of the modeling module, by Transformers' own tables."""
    text = config.get_text_config()
    model = MODEL_MAPPING.get(type(text), None) or MODEL_MAPPING[type(config)]
    module = importlib.import_module((model[0] if isinstance(model, tuple) else model).__module__)
    (cls,) = (
        cls
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if name.endswith("Experts") and cls.__module__ == module.__name__
    )
    return cls


def random_experts(config: transformers.PreTrainedConfig, std: float) -> torch.nn.Module:
    config._experts_implementation = "eager"
    torch.manual_seed(3)
    experts = experts_class(config)(config.get_text_config()).double()
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            # With 4.0, pre-activations from -60 to 60: far over every limit.
            parameter.normal_(std=std if "gate_up" in name else 0.2)
    return experts


def plain(experts: torch.nn.Module, gate: Gate, x: torch.Tensor, ids: Any, weights: Any) -> Any:
    """One token and expert at a time: GEMM, the identified gate, GEMM."""
    w13, w2 = experts.gate_up_proj, experts.down_proj
    if w2.shape[1] != x.shape[1]:  # stored [in, out]
        w13, w2 = w13.mT, w2.mT
    b13 = getattr(experts, "gate_up_proj_bias", torch.zeros(w13.shape[:2], dtype=x.dtype))
    b2 = getattr(experts, "down_proj_bias", torch.zeros(w2.shape[:2], dtype=x.dtype))
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            inner = gate.apply_stacked(linear(x[token], w13[expert], b13[expert]))
            out[token] += weight * linear(inner, w2[expert], b2[expert])
    return out


def outputs(
    config: transformers.PreTrainedConfig, gate: Gate, std: float = 4.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the module's, the plain implementation's) for some tokens."""
    experts = random_experts(config, std)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6, config.get_text_config().hidden_size, generator=generator).double()
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(6)])
    weights = torch.rand(6, 2, generator=generator).double()
    with torch.no_grad():
        return experts(x, ids, weights), plain(experts, gate, x, ids, weights)


@pytest.mark.parametrize("case", CASES)
def test_identified_gate_and_numbers(case: str) -> None:
    config, want = CASES[case]
    assert identify_config(config) == want


@pytest.mark.parametrize("case", CASES)
def test_identified_gate_computes_what_the_module_does(case: str) -> None:
    config, _ = CASES[case]
    theirs, ours = outputs(config, identify_config(config))
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["minimax_m3", "gpt_oss", "deepseek_v4", "gemma4"])
def test_another_gate_would_be_noticed(case: str) -> None:
    """The comparison above can fail: plain SiLU is far from these modules."""
    theirs, ours = outputs(CASES[case][0], Gate("silu"), std=0.5)
    assert (ours - theirs).norm() > 0.01 * theirs.norm()


def types_with_experts() -> list[str]:
    """Model types whose own modeling file has experts that Transformers can dispatch."""
    models = Path(transformers.__file__).parent / "models"
    files = {name: models / name / f"modeling_{name}.py" for name in transformers.CONFIG_MAPPING}
    return [
        name
        for name, file in files.items()
        if file.exists() and re.search(r"def _apply_gate|@use_experts_impl", file.read_text())
    ]


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "ffn_dim": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
}

REFUSED = {
    "step3p7": "layer to layer",
    "nemotron_h": "has no gate",
    "qwen3_omni_moe": "no '…Experts' class",  # its language model is one part of several
    "ernie4_5_vl_moe": "cannot be built",  # its sizes are lists, one for text and one for vision
}


@pytest.mark.parametrize("model_type", types_with_experts())
def test_every_model_that_transformers_has(model_type: str) -> None:
    config = transformers.CONFIG_MAPPING[model_type]()
    text = config.get_text_config()
    for name, value in SMALL.items():
        if hasattr(text, name) and not isinstance(getattr(text, name), list):
            setattr(text, name, value)
    if model_type in REFUSED:
        with pytest.raises(QuantizeError, match=REFUSED[model_type]):
            identify_config(config)
        return
    theirs, ours = outputs(config, identify_config(config))
    assert theirs.abs().max() > 1
    # Some modules compute in float32.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_there_are_models_to_go_through() -> None:
    assert {"qwen3_moe", "minimax_m3_vl", "gpt_oss", *REFUSED} <= set(types_with_experts())


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "minimax_m3", "gpt_oss"])
def test_identify_from_a_saved_folder(name: str, saved: Callable[[str], Path]) -> None:
    assert identify(saved(name)) == CASES[name][1]


def test_identify_m3_nano(m3_nano: Path) -> None:
    assert identify(m3_nano) == Gate(**OAI)


def test_identify_the_hub_layout_of_minimax_m3(m3_nano_hub: Path) -> None:
    """Its config is the multimodal one, with the text model's nested."""
    assert identify(m3_nano_hub) == Gate(**OAI)


# -- refusals --------------------------------------------------------------------------------------


def test_limits_that_differ_by_layer_are_refused() -> None:
    config = transformers.CONFIG_MAPPING["step3p7"]()
    with pytest.raises(QuantizeError, match=r"Step3p7Experts.*layer to layer.*not supported"):
        identify_config(config)


def test_experts_without_a_gate_are_refused() -> None:
    config = transformers.CONFIG_MAPPING["nemotron_h"]()
    with pytest.raises(QuantizeError, match=r"NemotronHExperts has no gate"):
        identify_config(config)


def test_an_activation_of_no_known_form_is_refused() -> None:
    with pytest.raises(QuantizeError, match=r"Qwen3MoeExperts: its gate is none of silu, .*--gate"):
        identify_config(checkpoints.qwen3_moe(hidden_act="relu"))


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(QuantizeError, match=r"'llama'.*gate is unknown.*--gate"):
        identify_config(checkpoints.llama())


def test_a_model_that_transformers_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "brand_new_moe"}))
    with pytest.raises(QuantizeError, match=r"config\.json: Transformers does not know.*--gate"):
        identify(tmp_path)


def test_code_of_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizeError, match="does not know"):
        identify(tmp_path)
    assert not (tmp_path / "ran").exists()


# -- matching --------------------------------------------------------------------------------------

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def oai(alpha: float, beta: float, limit: float) -> Function:
    return lambda g, u: (
        (u.clamp(-limit, limit) + beta)
        * (g.clamp(max=limit) * torch.sigmoid(alpha * g.clamp(max=limit)))
    )


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.3, 1.702, 4.0])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.25, -0.5])
@pytest.mark.parametrize("limit", [1.5, 5.5, 7.0, 30.0, 1000.0])
def test_numbers_are_recovered(alpha: float, beta: float, limit: float) -> None:
    found = match(Probe(oai(alpha, beta, limit)))
    assert found is not None
    assert (found.form, found.alpha, found.beta, found.limit) == ("swiglu_oai", alpha, beta, limit)


@pytest.mark.parametrize("alpha", [0.5, 1.702])
def test_no_limit_is_recovered(alpha: float) -> None:
    found = match(Probe(lambda g, u: (u + 1) * g * torch.sigmoid(alpha * g)))
    assert found == Gate("swiglu_oai", alpha, 1.0, None)


UNKNOWN: dict[str, Function] = {
    "relu": lambda g, u: torch.relu(g) * u,
    "squared relu": lambda g, u: torch.relu(g) ** 2 * u,
    "plain sigmoid": lambda g, u: torch.sigmoid(g) * u,
    "product": lambda g, u: g * u,
    "no gate": lambda g, u: torch.nn.functional.silu(g) + 0 * u,
    "halves swapped": lambda g, u: torch.nn.functional.silu(u) * g,
    "gate clamped on both sides": lambda g, u: oai(1.702, 1.0, 7.0)(g.clamp(min=-7.0), u),
    "gate not clamped": lambda g, u: (u.clamp(-7, 7) + 1) * g * torch.sigmoid(1.702 * g),
    "up not clamped": lambda g, u: (u + 1) * g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)),
    "up clamped from above alone": lambda g, u: oai(1.702, 1.0, 7.0)(g, u.clamp(max=7).abs()),
    "different limits": lambda g, u: oai(1.702, 1.0, 7.0)(g.clamp(max=5.0), u),
    "clamped after silu": lambda g, u: torch.nn.functional.silu(g).clamp(max=7) * u.clamp(-7, 7),
    "scaled": lambda g, u: 2 * torch.nn.functional.silu(g) * u,
    "a small constant added": lambda g, u: torch.nn.functional.silu(g) * u + 1e-3,
    "gelu by sigmoid times 1.01": lambda g, u: g * torch.sigmoid(1.702 * g) * u * 1.01,
    "softplus": lambda g, u: torch.nn.functional.softplus(g) * u,
    "mish": lambda g, u: torch.nn.functional.mish(g) * u,
    "zero": lambda g, u: 0 * g * u,
    "NaN": lambda g, u: torch.nan * g * u,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_gate_is_never_guessed(name: str) -> None:
    try:
        found = match(Probe(UNKNOWN[name]))
    except ArithmeticError:  # identify turns any failure of the probing into a refusal
        return
    assert found is None


class ToyExperts(torch.nn.Module):
    """A module as Transformers has them, with gating code of its own."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.sigmoid(gate) * gate.abs() ** self.power * gate.sign() * up


@pytest.mark.parametrize(("power", "known"), [(1.0, True), (1.001, False), (2.0, False)])
def test_a_toy_module(power: float, known: bool) -> None:
    toy = ToyExperts(power)
    probe = Probe(lambda g, u: toy._apply_gate(torch.cat((g, u)).unsqueeze(0)).squeeze(0))
    assert match(probe) == (Gate("silu") if known else None)


# -- applying --------------------------------------------------------------------------------------


def test_interleaved_and_concatenated_orders() -> None:
    gate, up = torch.randn(2, 5, 8).unbind()
    want = torch.sigmoid(gate) * gate * up
    assert torch.allclose(Gate("silu").apply_stacked(torch.cat((gate, up), -1)), want)
    mixed = torch.stack((gate, up), -1).flatten(-2)
    assert torch.allclose(Gate("silu", interleaved=True).apply_stacked(mixed), want)
    assert Gate(**OAI, interleaved=True).concatenated() == Gate(**OAI)


# -- the contract ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gate",
    [
        Gate("silu"),
        Gate("gelu"),
        Gate("gelu_tanh"),
        Gate(**OAI),
        Gate("swiglu_oai", 1.3, 0.0, None, True),
    ],
    ids=str,
)
def test_contract_round_trip_through_json(gate: Gate) -> None:
    assert from_contract(json.loads(json.dumps(to_contract(gate)))) == gate


def test_contract_is_what_the_design_says() -> None:
    assert to_contract(Gate(**OAI)) == {"version": 1, "gate": OAI | {"interleaved": False}}


def contract(**gate: Any) -> dict[str, Any]:
    return {"version": 1, "gate": gate}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"version": 2, "gate": OAI}, "version is 2.*knows 1"),
        ({"version": "1", "gate": OAI}, "version is '1'"),
        ({"gate": OAI}, "not a gate contract"),
        ({"version": 1}, "not a gate contract"),
        ({"version": 1, "gate": None}, "not a gate contract"),
        ({"version": 1, "gate": "silu"}, "not a gate contract"),
        (None, "not a gate contract"),
        ([], "not a gate contract"),
        ("silu", "not a gate contract"),
        (contract(), "not a gate contract"),
        (contract(form="swish9"), "unknown gate form 'swish9'.*silu"),
        (contract(form=["silu"]), "not a gate contract|unknown gate form"),
        (contract(form=None), "unknown gate form"),
        (contract(**OAI, gamma=2.0), "not a gate contract.*gamma"),
        (contract(**OAI | {"alpha": "1.702"}), "alpha must be a number"),
        (contract(**OAI | {"alpha": True}), "alpha must be a number"),
        (contract(**OAI | {"beta": None}), "beta must be a number"),
        (contract(**OAI | {"alpha": float("nan")}), "alpha must be finite"),
        (contract(**OAI | {"limit": float("inf")}), "limit must be finite"),
        (contract(**OAI | {"limit": 0}), "limit must be positive"),
        (contract(**OAI | {"limit": -7.0}), "limit must be positive"),
        (contract(**OAI | {"alpha": 10**400}), "alpha"),
        (contract(**OAI, interleaved="no"), "interleaved"),
        (contract(**OAI, interleaved=1), "interleaved"),
        # Numbers that the form would silently ignore.
        (contract(form="silu", limit=7.0), "silu.*limit|limit.*silu"),
        (contract(form="gelu", alpha=1.702), "gelu.*alpha|alpha.*gelu"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_contracts(value: Any, message: str) -> None:
    with pytest.raises(QuantizeError, match=rf"(?s)some/config\.json: nvfp4_moe.*({message})"):
        from_contract(value, "some/config.json")


def test_every_form_has_a_name_that_the_contract_takes() -> None:
    assert set(FORMS) == {"silu", "swiglu_oai", "gelu", "gelu_tanh"}
