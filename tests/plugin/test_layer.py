"""One MoE layer, loaded by vLLM from our files, against a plain float64 implementation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plugin import nemotron
from tests.plugin.reference import dequantize, experts_of, m3_gate, relu2, routed
from tests.quantize.plain import plainly

LAYER = "model.layers.1.mlp.experts"


def relative(out: torch.Tensor, truth: torch.Tensor) -> float:
    return float((out.double() - truth).norm() / truth.norm())


def routing(tokens: int, experts: int = 32, k: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).int()
    return torch.rand(tokens, k) + 0.1, ids


GATED: dict[bool, tuple[tuple[Any, ...], Callable[..., torch.Tensor]]] = {
    True: (("swiglu_oai", 1.702, 1.0, 7.0), m3_gate),
    False: (("relu2", 1.0, 0.0, None), relu2),
}
"""Form and numbers, and what they are, by whether up has a gate before it."""


@pytest.mark.usefixtures("compiled_by")
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_experts_match_the_reference(load, shallow: dict[str, Path], layout: str) -> None:
    layer = load(shallow[layout], dtype="float32")[LAYER].routed_experts
    truth_weights = experts_of(shallow[layout], LAYER, layout, 32)
    torch.manual_seed(0)
    for tokens in (1, 7, 300):  # 300 take the path with one matrix product an expert
        x = torch.randn(tokens, 384) * 3
        weights, ids = routing(tokens)
        out = layer.quant_method.apply(layer, x, weights, ids, None, None)
        assert relative(out, routed(x, truth_weights, weights, ids)) < 1e-5, tokens


@pytest.mark.usefixtures("compiled_by")
@pytest.mark.parametrize("gated", [True, False])
def test_bfloat16_loses_only_roundings_of_activations(
    load, shallow: dict[str, Path], ungated: dict[str, Path], gated: bool
) -> None:
    folder, layer, stored, experts, hidden, top_k = (
        (shallow["modelopt"], LAYER, LAYER, 32, 384, 4)
        if gated
        else (ungated["modelopt"], nemotron.LAYER, nemotron.STORED, nemotron.EXPERTS,
              nemotron.LATENT, nemotron.TOP_K)
    )  # fmt: skip
    kinds = () if gated else (("up_proj", "down_proj"),)
    truth_weights = experts_of(folder, stored, "modelopt", experts, *kinds)
    module = load(folder)[layer].routed_experts
    torch.manual_seed(0)
    for tokens in (1, 300):
        x = torch.randn(tokens, hidden).bfloat16()
        weights, ids = routing(tokens, experts, top_k)
        out = module.quant_method.apply(module, x, weights, ids, None, None)
        assert out.dtype == torch.bfloat16
        truth = routed(x, truth_weights, weights, ids, GATED[gated][1])
        assert relative(out, truth) < 6e-3, tokens


def test_a_hidden_size_that_is_padded(
    load, shallow: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's all-to-all kernels ask for; what lies in the padding must not count."""
    from vllm_nvfp4_moe.backends.cpu.method import CpuMethod

    empty = torch.empty

    def dirty(*shape: int, **more: object) -> torch.Tensor:
        tensor = empty(*shape, **more)  # type: ignore[call-overload]
        if tensor.dtype in (torch.uint8, torch.float8_e4m3fn) and tensor.ndim == 3:
            tensor.view(torch.uint8).fill_(0x7F)  # NaN as a scale
        return tensor

    monkeypatch.setattr(torch, "empty", dirty)
    monkeypatch.setattr(
        CpuMethod, "maybe_roundup_sizes", lambda self, hidden, inner, *_: (512, inner)
    )
    layer = load(shallow["modelopt"], dtype="float32")[LAYER].routed_experts
    assert layer.w13_weight.shape[2] == 256
    check = layer.quant_method.context.self_check
    assert check.skipped is None
    assert check.worst < 1e-5
    torch.manual_seed(0)
    x = torch.randn(5, 384)
    weights, ids = routing(5)
    padded = torch.nn.functional.pad(x, (0, 128))
    out = layer.quant_method.apply(layer, padded, weights, ids, None, None)
    truth = routed(x, experts_of(shallow["modelopt"], LAYER, "modelopt", 32), weights, ids)
    assert relative(out[:, :384], truth) < 1e-5


@pytest.mark.usefixtures("compiled_by")
def test_float16_does_not_overflow(load, shallow: dict[str, Path]) -> None:
    """Before the global scale, products leave float16's range; on either path they must not."""
    layer = load(shallow["modelopt"], dtype="float16")[LAYER].routed_experts
    truth_weights = experts_of(shallow["modelopt"], LAYER, "modelopt", 32)
    torch.manual_seed(5)
    for tokens in (1, 300):
        x = (torch.randn(tokens, 384) * 8).half()
        weights, ids = routing(tokens)
        out = layer.quant_method.apply(layer, x, weights, ids, None, None)
        assert out.dtype == torch.float16
        assert relative(out, routed(x, truth_weights, weights, ids)) < 2e-3, tokens


def test_weights_stay_four_bit(load, shallow: dict[str, Path]) -> None:
    """Bytes of all the layer's parameters and buffers: 4.5 bits a weight and a few scalars."""
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    weights = 32 * 3 * 384 * 128
    assert held <= weights * 4.5 / 8 + 32 * 8 * 4


@pytest.mark.usefixtures("compiled_by")
def test_router_matches_transformers(load, shallow: dict[str, Path], shallow_bf16: Path) -> None:
    """Sigmoid scores, bias for the choice only, renormalised, scaled: as the model's own router."""
    from safetensors.torch import load_file
    from transformers import AutoConfig
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTopKRouter

    tensors = load_file(shallow_bf16 / "model.safetensors")
    config = AutoConfig.from_pretrained(shallow_bf16)
    theirs = MiniMaxM3VLTopKRouter(config)
    prefix = "model.layers.1.mlp.gate."
    theirs.load_state_dict({n: tensors[prefix + n].float() for n in theirs.state_dict()})
    # A correction bias that changes choices, so that a router without it cannot pass.
    torch.manual_seed(1)
    theirs.e_score_correction_bias.copy_(torch.randn(32) * 0.3)
    runner = load(shallow["modelopt"], dtype="float32")[LAYER]
    runner.router.e_score_correction_bias.copy_(theirs.e_score_correction_bias)

    x = torch.randn(64, 384)
    logits, weights, ids = theirs(x)
    ours, our_ids = runner.router.select_experts(hidden_states=x, router_logits=logits)
    order, our_order = ids.argsort(1), our_ids.long().argsort(1)
    assert torch.equal(ids.gather(1, order), our_ids.long().gather(1, our_order))
    torch.testing.assert_close(
        weights.gather(1, order).float(), ours.gather(1, our_order), rtol=1e-5, atol=1e-6
    )
    # Both sides scale the experts' sum afterwards, vLLM's by the runner's factor.
    assert runner.routed_scaling_factor == config.routed_scaling_factor == 2


@pytest.mark.usefixtures("compiled_by")
@pytest.mark.parametrize("gated", GATED)
def test_expert_map_and_weight_on_input(gated: bool) -> None:
    """Experts of other ranks contribute nothing; router weights may multiply the input instead."""
    from vllm_nvfp4_moe.backends.cpu import forward

    gate, truth_gate = GATED[gated]
    torch.manual_seed(2)
    weights13 = [plainly([torch.randn(32 * (1 + gated), 48) / 5])[0] for _ in range(3)]
    weights2 = [plainly([torch.randn(48, 32) / 5])[0] for _ in range(3)]
    stacked = [
        torch.stack([getattr(w, field) for w in weights])
        for weights in (weights13, weights2)
        for field in ("codes", "block_scale", "global_scale")
    ]
    plain = [
        [*dequantize(*a).chunk(1 + gated), dequantize(*b)]
        for a, b in zip(weights13, weights2, strict=True)
    ]
    expert_map = torch.tensor([-1, 0, -1, 1, 2], dtype=torch.int32)
    for tokens in (5, 400):
        x = torch.randn(tokens, 48)
        factors, ids = routing(tokens, experts=5, k=2)
        local = expert_map[ids.long()]
        masked = torch.where(local < 0, 0.0, factors)
        for on_input in (False, True):
            out = forward.experts_forward(x, *stacked, factors, ids, expert_map, *gate, on_input)
            if not on_input:
                truth = routed(x, plain, masked, local.clamp(min=0), truth_gate)
            else:
                truth = torch.zeros(tokens, 48, dtype=torch.float64)
                for t in range(tokens):
                    for f, e in zip(factors[t].double(), local[t].tolist(), strict=True):
                        if e >= 0:
                            *first, down = plain[e]
                            row = x[t].double() * f
                            truth[t] += down @ truth_gate(*(weight @ row for weight in first))
            assert relative(out, truth) < 1e-5, (tokens, on_input)


@pytest.mark.usefixtures("compiled_by")
@pytest.mark.parametrize("mapped", [False, True])
def test_ids_that_no_expert_has(mapped: bool) -> None:
    """A negative id is nobody's, whatever is last in the map; one beyond the last is an error, and
    not what lies in memory behind the weights."""
    from vllm_nvfp4_moe.backends.cpu import forward

    torch.manual_seed(3)
    stacked = [
        torch.stack([getattr(w, field) for w in weights])
        for weights in ([plainly([torch.randn(*shape) / 5])[0] for _ in range(3)]
                        for shape in ((64, 48), (48, 32)))
        for field in ("codes", "block_scale", "global_scale")
    ]  # fmt: skip
    plain = [
        [*dequantize(*a).chunk(2), dequantize(*b)]
        for a, b in zip(zip(*stacked[:3], strict=True), zip(*stacked[3:], strict=True), strict=True)
    ]
    expert_map = torch.arange(3, dtype=torch.int32) if mapped else None
    for tokens in (5, 400):  # 400 take the path with one matrix product an expert
        x, (weights, ids) = torch.randn(tokens, 48), routing(tokens, experts=3, k=2)
        ids[::2, 1], ids[1] = -1, -1
        out = forward.experts_forward(x, *stacked, weights, ids, expert_map, *GATED[True][0], False)
        masked = torch.where(ids < 0, 0.0, weights)
        truth = routed(x, plain, masked, ids.clamp(min=0), m3_gate)
        assert relative(out, truth) < 1e-5 and not out[1].any(), tokens
        ids[3, 1] = 3
        with pytest.raises(RuntimeError, match="a token is sent to an expert beyond the last of 3"):
            forward.experts_forward(x, *stacked, weights, ids, expert_map, *GATED[True][0], False)


def capped(value: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(value / cap)


OTHER_GATES: dict[tuple[str, float, float | None], Any] = {
    ("silu", 1.0, None): lambda g, u: torch.nn.functional.silu(g) * u,
    ("gelu", 1.0, None): lambda g, u: torch.nn.functional.gelu(g) * u,
    ("gelu_tanh", 1.0, None): lambda g, u: torch.nn.functional.gelu(g, approximate="tanh") * u,
    ("swiglu_step", 1.0, 7.0): lambda g, u: (
        torch.nn.functional.silu(g).clamp(max=7.0) * u.clamp(-7.0, 7.0)
    ),
    ("situ", 4.0, 25.0): lambda g, u: capped(g, 4.0) * torch.sigmoid(g) * capped(u, 25.0),
    ("situ", 2.0, 3.0): lambda g, u: capped(g, 2.0) * torch.sigmoid(g) * capped(u, 3.0),
    ("situ", 4.0, None): lambda g, u: capped(g, 4.0) * torch.sigmoid(g) * u,
}
"""By form, alpha and limit."""


@pytest.mark.usefixtures("compiled_by")
@pytest.mark.parametrize(("form", "alpha", "limit"), OTHER_GATES)
def test_other_gates(form: str, alpha: float, limit: float | None) -> None:
    from vllm_nvfp4_moe.backends.cpu import forward

    torch.manual_seed(3)
    w13, w2 = plainly([torch.randn(64, 48)])[0], plainly([torch.randn(48, 32)])[0]
    gate, up = dequantize(*w13).chunk(2)
    plain = [[gate, up, dequantize(*w2)]]
    for tokens in (3, 100):
        x = torch.randn(tokens, 48)
        ones, ids = torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.int32)
        out = forward.experts_forward(
            x, *(t[None] for t in (*w13, *w2)), ones, ids, None, form, alpha, 0.0, limit, False
        )
        truth = routed(x, plain, ones, ids, OTHER_GATES[form, alpha, limit])
        assert relative(out, truth) < 1e-5, tokens


@pytest.mark.usefixtures("compiled_by")
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_equal_inputs_give_equal_bits(load, shallow: dict[str, Path], tokens: int) -> None:
    """However the work is split over threads, and whatever the neighbours are."""
    from vllm_nvfp4_moe.backends.cpu import kernels

    layer = load(shallow["modelopt"])[LAYER].routed_experts
    torch.manual_seed(4)
    x = torch.randn(tokens, 384).bfloat16()
    weights, ids = routing(tokens)
    apply = layer.quant_method.apply
    first = apply(layer, x, weights, ids, None, None)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            kernels.team.cache_clear()
            assert torch.equal(apply(layer, x, weights, ids, None, None), first)
    finally:
        torch.set_num_threads(threads)
        kernels.team.cache_clear()
    alone = torch.cat(
        [apply(layer, x[i : i + 1], weights[i : i + 1], ids[i : i + 1], None, None)
         for i in range(tokens)]
    )  # fmt: skip
    assert torch.equal(alone, first)


@pytest.mark.usefixtures("numba")
def test_batch_invariance(load, shallow: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """``VLLM_BATCH_INVARIANT``: a token's bits do not depend on who comes with it."""
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    torch.manual_seed(3)
    x, (weights, ids) = torch.randn(300, 384).bfloat16(), routing(300)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        apply = layer.quant_method.apply
        alone = [
            apply(layer, x[i : i + 1], weights[i : i + 1], ids[i : i + 1], None, None)
            for i in range(20)
        ]
        return torch.cat(alone), apply(layer, x, weights, ids, None, None)[:20]

    assert not torch.equal(*both())  # the reason for the variable
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert torch.equal(*both())
