"""Gates: what identification says, against what Transformers' own modules compute."""

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import linear
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from quantize.errors import QuantizeError
from quantize.experts.gates import Gate, Gates
from quantize.experts.gates.probe import Probe
from quantize.experts.identify import identify, identify_config, match
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
    assert identify_config(config) == Gates.uniform(want)


@pytest.mark.parametrize("case", CASES)
def test_identified_gate_computes_what_the_module_does(case: str) -> None:
    config, _ = CASES[case]
    theirs, ours = outputs(config, identify_config(config).default)
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["minimax_m3", "gpt_oss", "deepseek_v4", "gemma4"])
def test_another_gate_would_be_noticed(case: str) -> None:
    """The comparison above can fail: plain SiLU is far from these modules."""
    theirs, ours = outputs(CASES[case][0], Gate("silu"), std=0.5)
    assert (ours - theirs).norm() > 0.01 * theirs.norm()


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "minimax_m3", "gpt_oss"])
def test_identify_from_a_saved_folder(name: str, saved: Callable[[str], Path]) -> None:
    assert identify(saved(name)) == Gates.uniform(CASES[name][1])


def test_identify_a_trained_model(trained: Path) -> None:
    assert identify(trained) == Gates.uniform(Gate(**OAI))


def test_identify_the_hub_layout_of_minimax_m3(trained_hub: Path) -> None:
    """Its config is the multimodal one, with the text model's nested."""
    assert identify(trained_hub) == Gates.uniform(Gate(**OAI))


def test_limits_that_differ_by_layer() -> None:
    """Step-3.7's lists: 0 or nothing is no limit; dense layers have no experts."""
    config = transformers.CONFIG_MAPPING["step3p7"]()
    text = config.get_text_config()
    text.num_hidden_layers = 8
    text.layer_types = ["full_attention"] * 8
    text.mlp_layer_types = ["dense"] * 2 + ["sparse"] * 6
    text.swiglu_limits = [0.0] * 5 + [None, 7.0, 5.0]
    gates = identify_config(config)
    assert gates.default == Gate("silu")
    assert gates.layers == {
        6: Gate("swiglu_step", limit=7.0),
        7: Gate("swiglu_step", limit=5.0),
    }


def test_experts_without_a_gate() -> None:
    """By their own forward: Nemotron-H's class has no gating code that could be called."""
    config = transformers.CONFIG_MAPPING["nemotron_h"]()
    assert identify_config(config) == Gates.uniform(Gate("relu2"))
    config.mlp_hidden_act = "silu"
    with pytest.raises(
        QuantizeError, match=r"activation \(it has no gate\) is none of relu, relu2"
    ):
        identify_config(config)


@pytest.mark.parametrize(
    ("family", "want"),
    [
        ("minimax_m3_vl", Gate(**OAI)),
        ("mixtral", Gate("silu")),
        ("nemotron_h", Gate("relu2")),
        ("step3p7", None),
        ("llama", None),
    ],
)
def test_a_model_that_cannot_be_built(
    family: str, want: Gate | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its experts' class may do alone, unless it wants to know more than the config."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("No module named 'scipy'")

    monkeypatch.setattr(transformers.PreTrainedModel, "__init__", refuse)
    config = transformers.CONFIG_MAPPING[family]()
    if want is not None:
        assert identify_config(config) == Gates.uniform(want)
        return
    with pytest.raises(QuantizeError, match=r"cannot be built from its config \(No module.*--gate"):
        identify_config(config)


# -- refusals --------------------------------------------------------------------------------------


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


# -- matching --------------------------------------------------------------------------------------

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def situ(alpha: float, limit: float | None) -> Function:
    """As Inkling2SoftcappedSwiGLU and vLLM's SituAndMul have it, with their numbers in float32."""

    def cap(value: torch.Tensor, at: float | None) -> torch.Tensor:
        return value if at is None else at * torch.tanh(value / at)

    return lambda g, u: cap(g, alpha) * torch.sigmoid(g) * cap(u, limit)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.702, 4.0, 30.0])
@pytest.mark.parametrize("limit", [None, 0.5, 1.5, 25.0, 1000.0])
def test_caps_are_recovered(alpha: float, limit: float | None) -> None:
    exact = situ(alpha, limit)
    rounded = lambda g, u: exact(g.float(), u.float()).double()  # noqa: E731
    for function in (exact, rounded):
        assert match(Probe(function)) == Gate("situ", alpha, limit=limit)


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


@pytest.mark.parametrize("limit", [1.5, 7.0, 10.0])
def test_a_clamp_after_silu_is_told_from_one_before(limit: float) -> None:
    after = match(
        Probe(lambda g, u: torch.nn.functional.silu(g).clamp(max=limit) * u.clamp(-limit, limit))
    )
    assert after == Gate("swiglu_step", limit=limit)
    assert match(Probe(oai(1.0, 0.0, limit))) == Gate("swiglu_oai", limit=limit)


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (lambda up: up.clamp(min=0) ** 2, "relu2"),
        (lambda up: up.clamp(min=0), "relu"),
        (lambda up: up.clamp(min=0) ** 2 * 1.001, None),
        (torch.nn.functional.silu, None),
    ],
)
def test_activations_without_a_gate(
    function: Callable[[torch.Tensor], torch.Tensor], want: str | None
) -> None:
    found = match(Probe(lambda _, up: function(up), gated=False))
    assert found == (Gate(want) if want else None)


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
    "gate clamped after silu, up at another limit": lambda g, u: (
        torch.nn.functional.silu(g).clamp(max=7) * u.clamp(-6, 6)
    ),
    "scaled": lambda g, u: 2 * torch.nn.functional.silu(g) * u,
    "a small constant added": lambda g, u: torch.nn.functional.silu(g) * u + 1e-3,
    "gelu by sigmoid times 1.01": lambda g, u: g * torch.sigmoid(1.702 * g) * u * 1.01,
    "sigmoid of the capped gate": lambda g, u: (
        torch.nn.functional.silu(4 * torch.tanh(g / 4)) * 25 * torch.tanh(u / 25)
    ),
    "a cap of the product": lambda g, u: 25 * torch.tanh(torch.nn.functional.silu(g) * u / 25),
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
