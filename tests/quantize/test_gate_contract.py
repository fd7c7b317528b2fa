"""The gate contract: what is written into a config, and what of that is read."""

import json
from typing import Any

import pytest

from quantize.errors import QuantizeError
from quantize.experts.gates import FORMS, Gate, Gates, from_contract, to_contract
from tests.quantize.test_gates import OAI


@pytest.mark.parametrize(
    "gate",
    [
        Gate("silu"),
        Gate("gelu"),
        Gate("gelu_tanh"),
        Gate(**OAI),
        Gate("swiglu_oai", 1.3, 0.0, None, True),
        Gate("swiglu_step", limit=7.0),
        Gate("relu"),
        Gate("relu2"),
    ],
    ids=str,
)
def test_contract_round_trip_through_json(gate: Gate) -> None:
    gates = Gates.uniform(gate)
    assert from_contract(json.loads(json.dumps(to_contract(gates)))) == gates


def test_contract_is_what_the_design_says() -> None:
    gates = Gates.uniform(Gate(**OAI))
    assert to_contract(gates) == {"version": 1, "gate": OAI | {"interleaved": False}}


STEP = {"form": "swiglu_step", "alpha": 1.0, "beta": 0.0, "limit": 7.0, "interleaved": False}
PLAIN_SILU = {"form": "silu", "alpha": 1.0, "beta": 0.0, "limit": None, "interleaved": False}


def test_contract_of_layers_that_differ() -> None:
    gates = Gates.of_layers(
        {2: Gate("silu"), 3: Gate("silu"), 43: Gate(**STEP), 44: Gate(**STEP), 5: Gate("silu")}
    )
    contract = json.loads(json.dumps(to_contract(gates)))
    assert contract == {"version": 2, "gate": PLAIN_SILU, "layers": {"43": STEP, "44": STEP}}
    assert from_contract(contract) == gates
    assert str(gates) == "silu; in layers 43, 44: swiglu_step(limit=7)"


def test_contract_with_a_norm_after_down() -> None:
    """Version 3, so that whoever does not know of it refuses; other contracts are as they were."""
    normed = PLAIN_SILU | {"post_norm": True}
    gates = Gates(Gate("silu", post_norm=True))
    assert to_contract(gates) == {"version": 3, "gate": normed}
    assert str(gates) == "silu(post_norm)"
    some = Gates(Gate("silu"), {3: Gate("silu", post_norm=True)})
    assert to_contract(some) == {"version": 3, "gate": PLAIN_SILU, "layers": {"3": normed}}
    for each in (gates, some):
        assert from_contract(json.loads(json.dumps(to_contract(each)))) == each


@pytest.mark.parametrize(
    ("prefix", "form"),
    [
        ("model.layers.43.mlp.experts", "swiglu_step"),
        ("model.language_model.layers.43.moe.experts", "swiglu_step"),
        ("transformer.blocks.43.ffn.experts", "swiglu_step"),
        ("model.layers.4.mlp.experts", "silu"),
        ("model.layers.143.mlp.experts", "silu"),
        ("model.layers.4.mlp.experts.43", "silu"),
        ("mlp43.experts", "silu"),
    ],
)
def test_the_gate_of_a_module(prefix: str, form: str) -> None:
    gates = Gates(Gate("silu"), {43: Gate(**STEP)})
    assert gates.of(prefix).form == form


def test_a_layer_that_does_not_differ_is_no_difference() -> None:
    assert Gates(Gate("silu"), {3: Gate("silu")}) == Gates.uniform(Gate("silu"))


def contract(**gate: Any) -> dict[str, Any]:
    return {"version": 1, "gate": gate}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"version": 4, "gate": OAI}, "version is 4.*knows 1, 2, 3"),
        ({"version": True, "gate": OAI}, "version is True"),
        ({"version": [1], "gate": OAI}, r"version is \[1\]"),
        ({"version": 2, "gate": OAI}, "'layers' belongs to versions 2 and 3"),
        ({"version": 1, "gate": OAI, "layers": {}}, "'layers' belongs to versions 2 and 3"),
        ({"version": 2, "gate": OAI, "layers": []}, "not a gate contract"),
        ({"version": 2, "gate": OAI, "layers": ["3"]}, "not a gate contract"),
        ({"version": 2, "gate": OAI, "layers": None}, "not a gate contract"),
        ({"version": 2, "gate": OAI, "layers": {"x": OAI}}, "not a gate contract.*'x'"),
        ({"version": 2, "gate": OAI, "layers": {"-1": OAI}}, "not a gate contract.*'-1'"),
        ({"version": 2, "gate": OAI, "layers": {"3": None}}, "not a gate contract"),
        ({"version": 2, "gate": OAI, "layers": {"3": {"form": "swish9"}}}, "unknown gate form"),
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
        (contract(form="relu2", beta=1.0), "relu2.*beta|beta.*relu2"),
        (contract(form="swiglu_step", limit=7.0, alpha=1.702), "swiglu_step.*alpha"),
        (contract(form="relu2", interleaved=True), "relu2.*interleave"),
        (contract(form="situ", alpha=4.0, beta=1.0), "situ.*beta|beta.*situ"),
        (contract(form="situ", alpha=0.0), "alpha must be positive"),
        (contract(form="silu", post_norm=1), "post_norm must be true or false"),
        (contract(form="silu", post_norm=True), "'post_norm' belongs to version 3"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_contracts(value: Any, message: str) -> None:
    with pytest.raises(QuantizeError, match=rf"(?s)some/config\.json: nvfp4_moe.*({message})"):
        from_contract(value, "some/config.json")


def test_every_form_has_a_name_that_the_contract_takes() -> None:
    gated = {"silu", "swiglu_oai", "swiglu_step", "situ", "gelu", "gelu_tanh"}
    assert {name for name, form in FORMS.items() if form.gated} == gated
    assert set(FORMS) - gated == {"relu", "relu2"}
