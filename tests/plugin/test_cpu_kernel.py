"""The CPU's kernel in C++, with each instruction set that this host has, beside plain floats."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantize.experts.gates import Gate
from tests.plugin.cpu_kernels import EXPERTS, TOP_K, Case, kernel
from tests.plugin.reference import dequantize, m3_gate, relu2, routed
from tests.plugin.test_layer import OTHER_GATES, relative, routing
from vllm_nvfp4_moe.backends.cpu import forward
from vllm_nvfp4_moe.kernels.cpu.kernel import FORMS, Kernel

__all__ = ["kernel"]  # a fixture

GATES = {
    (Gate("swiglu_oai", 1.702, 1.0, 7.0)): m3_gate,
    (Gate("relu2")): relu2,
    **{Gate(form, alpha, 0.0, limit): what for (form, alpha, limit), what in OTHER_GATES.items()},
}


def bound(kernel: Kernel) -> float:
    """Of the relative error: with bfloat16 what is between the products is rounded to it."""
    return 4e-3 if kernel.variant.takes == (torch.bfloat16,) else 2e-6


# Sizes: less than what is decoded at a time; a whole number of it; and with a rest of some blocks.
@pytest.mark.parametrize(("hidden", "inner"), [(16, 48), (256, 128), (400, 144), (144, 784)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 90])
def test_as_plain_floats(kernel: Kernel, hidden: int, inner: int, tokens: int) -> None:
    torch.manual_seed(hidden + tokens)
    case, (weights, ids) = Case(hidden, inner), routing(tokens, EXPERTS, TOP_K)
    gate = Gate("swiglu_oai", 1.702, 1.0, 7.0)
    for dtype in kernel.variant.takes:
        x = torch.randn(tokens, hidden).to(dtype)
        out = case.run(kernel, x, weights, ids, gate)
        assert out.dtype == torch.float32
        assert relative(out, routed(x, case.plain, weights, ids)) < bound(kernel), dtype


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_each_gate(kernel: Kernel, gate: Gate) -> None:
    torch.manual_seed(1)
    case, (weights, ids) = Case(80, 176, gate.gated), routing(9, EXPERTS, TOP_K)
    x = torch.randn(9, 80).bfloat16() * 6
    out = case.run(kernel, x, weights, ids, gate)
    assert relative(out, routed(x, case.plain, weights, ids, GATES[gate])) < bound(kernel)


def test_all_forms_are_here() -> None:
    assert {gate.form for gate in GATES} == set(FORMS)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("on_input", [True, False])
def test_biases_and_experts_elsewhere(kernel: Kernel, gated: bool, on_input: bool) -> None:
    torch.manual_seed(2)
    case = Case(48, 80, gated, biased=True)
    expert_map = torch.tensor([3, -1, 0, 1, -1, 2, 4], dtype=torch.int32)
    weights, ids = routing(11, len(expert_map), 3)
    x = torch.randn(11, 48).bfloat16()
    gate = Gate("silu") if gated else Gate("relu2")
    out = case.run(kernel, x, weights, ids, gate, expert_map, on_input)
    truth = torch.zeros(11, 48, dtype=torch.float64)
    for token in range(11):
        for weight, expert in zip(
            weights[token].double(), expert_map[ids[token].long()], strict=True
        ):
            if expert < 0:
                continue
            *first, down = case.plain[expert]
            row = x[token].double() * (weight if on_input else 1)
            parts = case.b13[expert].double().chunk(1 + gated)
            products = [m @ row + bias for m, bias in zip(first, parts, strict=True)]
            middle = (OTHER_GATES["silu", 1.0, None] if gated else relu2)(*products)
            own = down @ middle + case.b2[expert].double()
            truth[token] += own * (1 if on_input else weight)
    assert relative(out, truth) < bound(kernel)


def test_every_code_and_every_scale(kernel: Kernel) -> None:
    """Exactly. Token t picks column t of w2: the first product gives it a 1 there, and zeros."""
    size = 128
    rows, blocks = torch.arange(size)[:, None], torch.arange(size // 16)[None]
    bits = (rows // 8 * 8 + blocks).clamp(max=126)  # of all scales that are not negative nor NaN
    scales = bits.byte().view(torch.float8_e4m3fn)
    numbers = (2 * (rows % 8) + torch.arange(size)[None]) % 16
    codes = (numbers[:, 0::2] | numbers[:, 1::2] << 4).byte()
    one = torch.zeros(size, size, dtype=torch.long)
    one.fill_diagonal_(2)  # the code of 1.0
    first = (one[:, 0::2] | one[:, 1::2] << 4).byte()
    ones = torch.ones(1)
    out = kernel.run(
        torch.eye(size).bfloat16(), first[None], torch.ones(1, size, size // 16).to(scales.dtype),
        ones, codes[None], scales[None], ones, torch.ones(size, 1),
        torch.zeros(size, 1, dtype=torch.int32), None, Gate("relu2"), False, None, None,
    )  # fmt: skip
    assert len(set(bits.flatten().tolist())) == 127
    assert torch.equal(out.T.double(), dequantize(codes, scales, ones))


def test_between_the_products_ties_go_to_even(kernel: Kernel) -> None:
    """1.0625 squared lies in the middle between two bfloat16 numbers."""
    x = torch.full((1, 16), 0.0)
    x[0, 0] = 1.0625
    one = torch.zeros(16, 8, dtype=torch.uint8)
    one[0, 0] = 2  # the code of 1.0, of row 0 and column 0
    scales = torch.ones(1, 16, 1).to(torch.float8_e4m3fn)
    ones, expert = torch.ones(1), torch.zeros(1, 1, dtype=torch.int32)
    out = kernel.run(
        x.bfloat16(), one[None], scales, ones, one[None], scales, ones, ones[None], expert, None,
        Gate("relu2"), False, None, None,
    )  # fmt: skip
    squared = torch.tensor(1.0625**2)
    rounds = kernel.variant.takes == (torch.bfloat16,)
    assert out[0, 0] == (squared.bfloat16() if rounds else squared)


def test_the_same_bits_whatever_the_neighbours_and_threads(kernel: Kernel) -> None:
    torch.manual_seed(3)
    case, (weights, ids) = Case(272, 144), routing(70, EXPERTS, TOP_K)
    x, gate = torch.randn(70, 272).bfloat16(), Gate("silu")
    whole = case.run(kernel, x, weights, ids, gate)
    alone = [
        case.run(kernel, *(each[i : i + 1] for each in (x, weights, ids)), gate) for i in range(70)
    ]
    if kernel.variant.invariant:
        assert torch.equal(torch.cat(alone), whole)
    else:  # the order of sums is another; then what is between the products may round differently
        assert not torch.equal(torch.cat(alone), whole)
        assert relative(torch.cat(alone), whole) < bound(kernel)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(case.run(kernel, x, weights, ids, gate), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gate_that_the_loops_do_not_have(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library multiplies then, in an order of its own for each number of tokens; but not where
    vLLM is to be invariant of the batch."""
    assert "relu" not in FORMS
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    torch.manual_seed(7)
    case, (weights, ids) = Case(272, 144, gated=False), routing(70, EXPERTS, TOP_K)
    x = torch.randn(70, 272).to(dtype)

    def run(*given: torch.Tensor) -> torch.Tensor:
        rows, factors, chosen = given
        return forward.experts_forward(
            rows, case.w13, case.s13, case.g13, case.w2, case.s2, case.g2, factors, chosen, None,
            "relu", 1.0, 0.0, None, False,
        )  # fmt: skip

    whole = run(x, weights, ids)
    truth = routed(x, case.plain, weights, ids, lambda up: up.clamp(min=0))
    assert relative(whole, truth) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    alone = [run(*(each[i : i + 1] for each in (x, weights, ids))) for i in range(70)]
    assert torch.equal(torch.cat(alone), whole)


def test_other_defaults_of_pytorch(kernel: Kernel) -> None:
    """vLLM loads under the model's dtype and device as defaults, and kernels run then, too."""
    torch.manual_seed(6)
    case, (weights, ids) = Case(48, 32), routing(7, EXPERTS, TOP_K)
    x = torch.randn(7, 48).bfloat16()
    want = case.run(kernel, x, weights, ids, Gate("silu"))
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            out = case.run(kernel, x, weights, ids, Gate("silu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype == torch.float32
    assert torch.equal(out, want)


def test_nothing_to_do(kernel: Kernel) -> None:
    case, none = Case(16, 16), torch.zeros(0, 2)
    assert case.run(kernel, torch.zeros(0, 16), none, none.int(), Gate("silu")).shape == (0, 16)
    elsewhere = torch.full((EXPERTS,), -1, dtype=torch.int32)
    weights, ids = routing(3, EXPERTS, TOP_K)
    out = case.run(kernel, torch.randn(3, 16), weights, ids, Gate("silu"), elsewhere)
    assert not out.any()


def test_infinite_activations_stay_so(kernel: Kernel) -> None:
    """What a model makes of them is its own; zeros beyond the last column must not become NaN."""
    case = Case(16, 16)
    x = torch.zeros(2, 16).bfloat16()
    x[0, 3] = float("inf")
    ids = torch.zeros(2, 1, dtype=torch.int32)
    out = case.run(kernel, x, torch.ones(2, 1), ids, Gate("silu"))
    assert not out[0].isfinite().any()
    assert not out[1].any()


def test_what_its_own_arithmetic_is_worth(kernel: Kernel) -> None:
    """A kernel that takes scales of a neighbouring block is far outside of the bound."""
    torch.manual_seed(5)
    case, (weights, ids) = Case(64, 64), routing(4, EXPERTS, TOP_K)
    x: Any = torch.randn(4, 64).bfloat16()
    truth = routed(x, case.plain, weights, ids, OTHER_GATES["silu", 1.0, None])
    case.s2 = case.s2.view(torch.uint8).roll(1, -1).view(case.s2.dtype).contiguous()
    assert relative(case.run(kernel, x, weights, ids, Gate("silu")), truth) > 100 * bound(kernel)
