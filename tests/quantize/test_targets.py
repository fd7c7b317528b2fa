"""Targets of compressed-tensors' groups: experts are one pattern a layer, which readers match."""

from __future__ import annotations

import pytest
from compressed_tensors.utils.match import match_name

from quantize.layouts.targets import named, targets


def modules(prefix: str, *names: str, experts: int = 3) -> list[str]:
    return [f"{prefix}.{e}.{name}" for e in range(experts) for name in names]


W = ("w1", "w3", "w2")
GATED = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("stored", "engine"),
    [
        ("model.layers.3.block_sparse_moe.experts", "model.layers.3.block_sparse_moe.experts"),
        ("model.language_model.layers.3.mlp.experts", "language_model.model.layers.3.mlp.experts"),
        ("backbone.layers.3.mixer.experts", "model.layers.3.mixer.experts"),
        ("model.layers.3.mlp.experts", "model.layers.3.block_sparse_moe.experts"),
        ("model.layers.3.mlp.experts", "model.layers.3.mlp.text_experts"),
        ("layers.3.mlp.experts", "model.layers.3.mlp.experts"),
        (
            "model.layers.3.feed_forward.experts",
            "language_model.model.layers.3.feed_forward.experts",
        ),
        ("transformer.h.3.moe.experts", "model.h.3.moe.experts"),
    ],
)
def test_whatever_engines_call_them(stored: str, engine: str) -> None:
    """vLLM's class for MiniMax-M3, the first, has ``w1`` in files, and asks for ``gate_proj``."""
    others = modules(stored.replace(".3.", ".13."), *W)
    (target,) = found = targets(modules(stored, *W), others)
    for names in (W, GATED, ("up_proj", "down_proj")):
        for path in (stored, engine):
            assert all(match_name(name, target) for name in modules(path, *names)), path
            assert all(named({"targets": found}, name) for name in modules(path, *names))
    for path in (stored, engine):
        for other in (
            path.replace(".3.", ".13."), path.replace(".3.", ".30."), path.replace(".3.", ".2."),
        ):  # fmt: skip
            assert not any(match_name(name, target) for name in modules(other, *GATED))
        layer = path.rsplit(".", 2)[0]
        for name in ("mlp.shared_experts.gate_proj", "self_attn.q_proj", "mlp.gate", "mlp.up_proj"):
            assert not match_name(f"{layer}.{name}", target)


def test_two_towers_with_the_same_layers() -> None:
    """A pattern that would match both gives way to names, which vLLM maps, and whole paths."""
    one, other = "thinker.model.layers.3.mlp.experts", "talker.model.layers.3.mlp.experts"
    for path, apart in ((one, other), (other, one)):
        found = targets(modules(path, *W), modules(apart, *W))
        assert set(modules(path, *W)) < set(found) and len(found) == 10
        for names in (W, GATED):
            assert all(named({"targets": found}, name) for name in modules(path, *names))
            assert not any(named({"targets": found}, name) for name in modules(apart, *names))
    both = targets(modules(one, *W) + modules(other, *W), [])
    assert all(named({"targets": both}, n) for p in (one, other) for n in modules(p, *GATED))


def test_others_in_the_same_layer() -> None:
    """Experts in two places, and a linear that is called like one of them."""
    experts = modules("model.layers.3.mlp.experts", *W)
    shared = ["model.layers.3.mlp.shared_experts.0.gate_proj"]
    found = targets(experts, shared)
    assert not named({"targets": found}, shared[0])
    assert all(named({"targets": found}, name) for name in experts)


def test_by_name() -> None:
    experts = modules("model.layers.3.mlp.experts", *W)
    assert targets(experts, [], by_name=True) == sorted(experts)


def test_linears_are_named() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    assert targets(names, modules("model.layers.1.mlp.experts", *W)) == sorted(names)


def test_a_config_stays_small() -> None:
    """57 layers of 128 experts."""
    every = [m for n in range(57) for m in modules(f"model.layers.{n}.e.experts", *W, experts=128)]
    assert sum(map(len, targets(every, []))) < 57 * 100


@pytest.mark.parametrize("group", [None, {}, {"targets": None}, {"targets": [3, "re:("]}])
def test_targets_that_name_nothing(group: object) -> None:
    assert not named(group, "model.layers.0.mlp.experts.0.w1")
