"""What goes into the layer benchmark: routings, weights; and what plain arithmetic makes of it."""

from __future__ import annotations

import pytest
import torch

from quantize.experts.gates import Gate
from tests.benchmarks.moe_layers import M3, TINY, random
from vllm_nvfp4_moe.doctor.inputs import (
    Batch,
    Stored,
    batch,
    batches,
    plain,
    random_biases,
    random_weights,
)
from vllm_nvfp4_moe.doctor.shape import Shape, active_experts


def test_active_experts_are_counted_once() -> None:
    ids = torch.tensor([[3, 1, 7], [7, 3, -1], [0, 1, 3]], dtype=torch.int32)
    assert active_experts(ids) == 4
    assert active_experts(torch.tensor([[2, 5, 9]])) == 3


@pytest.mark.parametrize("skewed", [False, True])
def test_a_tokens_experts_are_distinct(skewed: bool) -> None:
    shape = Shape("router", 128, 32, 16, 8)
    x, weights, ids, _ = batch(shape, 500, skewed, random())
    assert (x.shape, x.dtype) == ((500, 32), torch.bfloat16)
    assert (weights.shape, weights.dtype) == ((500, 8), torch.float32)
    assert (ids.shape, ids.dtype) == ((500, 8), torch.int32) and ids.is_contiguous()
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert int(ids.min()) >= 0 and int(ids.max()) < 128
    assert torch.allclose(weights.sum(1), torch.ones(500))


def test_uniform_routing_is_even_and_skewed_is_not() -> None:
    shape = Shape("router", 128, 16, 16, 4)
    loads = [
        batch(shape, 4096, skewed, random()).ids.long().flatten().bincount(minlength=128)
        for skewed in (False, True)
    ]
    even, uneven = ((load.sort(descending=True).values / 4096).tolist() for load in loads)
    assert even[0] < 1.5 * 4 / 128 and even[-1] > 0.5 * 4 / 128
    # By Zipf's law: nearly half of the tokens want the first (1 / (1 + 1/2 + ...) = 0.18 of draws).
    assert 0.4 < uneven[0] < 0.8 and uneven[-1] < 0.2 * 4 / 128


def test_who_is_popular_differs_from_batch_to_batch() -> None:
    generator = random()
    shape = Shape("router", 128, 16, 16, 1)
    most = {int(batch(shape, 512, True, generator).ids.mode(0).values) for _ in range(6)}
    assert len(most) > 2


def test_small_batches_come_in_several_kinds() -> None:
    assert [batches(n) for n in (1, 256, 512, 2048, 4096)] == [8, 8, 2, 2, 1]


def test_bf16_gets_the_same_weights_exactly() -> None:
    for stored in random_weights(TINY, random()):
        weight = stored.weight(5)
        assert torch.equal(weight.bfloat16().float(), weight) and weight.std() > 0
        assert len(stored.global_scale.unique()) == 3


def test_plain_arithmetic_of_one_expert() -> None:
    """Weights of one, so that every sum is known."""
    shape = Shape("ones", 2, 32, 16, 1)
    one = torch.tensor([1.0, 2.0])

    def ones(rows: int, columns: int) -> Stored:
        codes = torch.full((2, rows, columns // 2), 0x22, dtype=torch.uint8)
        return Stored(codes, torch.ones(2, rows, columns // 16).to(torch.float8_e4m3fn), one)

    given = Batch(torch.full((1, 32), 0.125).bfloat16(), torch.tensor([[0.5]]), torch.tensor([[1]]))
    found = plain(shape, ones(32, 32), ones(32, 16), given)
    pre = 32 * 0.125 * 2
    middle = pre * pre / (1 + 2.718281828**-pre)
    assert torch.allclose(found, torch.full((1, 32), 0.5 * 2 * 16 * middle))


def test_plain_arithmetic_without_a_gate_and_with_biases() -> None:
    """Before the activation, and before the router's weight."""
    shape = Shape("ones", 2, 32, 16, 1, Gate("relu2"), biased=True)
    two = torch.full((2,), 2.0)

    def ones(rows: int, columns: int) -> Stored:
        codes = torch.full((2, rows, columns // 2), 0x22, dtype=torch.uint8)
        return Stored(codes, torch.ones(2, rows, columns // 16).to(torch.float8_e4m3fn), two)

    x = torch.tensor([0.125, -0.125]).repeat_interleave(32).view(2, 32).bfloat16()
    given = Batch(x, torch.full((2, 1), 0.5), torch.tensor([[0], [1]]))
    biases = (torch.tensor([[-3.0], [7.0]]).repeat(1, 16), torch.tensor([[10.0], [4.0]]))
    found = plain(shape, ones(16, 32), ones(32, 16), given, biases)
    assert found[0].tolist() == [0.5 * (16 * 2 * (8 - 3) ** 2 + 10)] * 32
    assert found[1].tolist() == [0.5 * 4] * 32  # 7 - 8 is below zero


def test_biases_are_of_the_sizes_that_they_are_added_to() -> None:
    shape = Shape("biased", 4, 32, 48, 1, Gate("relu2"), biased=True)
    for given, rows in ((shape, 48), (Shape("gated", 4, 32, 48, 1, biased=True), 96)):
        found = random_biases(given, random())
        assert found is not None
        assert [tuple(b.shape) for b in found] == [(4, rows), (4, 32)]
        assert {b.dtype for b in found} == {torch.bfloat16}
    assert random_biases(TINY, random()) is None
    assert random_weights(shape, random())[0].codes.shape == (4, 48, 16)


def test_gates_get_what_matters_to_them() -> None:
    """The clamp at 7 is reached by some of the values, not by most."""
    shape = Shape("m3", 16, 256, 128, 4, M3.gate)
    w13, w2 = random_weights(shape, random())
    given = batch(shape, 32, False, random())
    pre = torch.cat([given.x.float() @ w13.weight(expert).T for expert in range(16)])
    assert 0.01 < float((pre > 7).float().mean()) < 0.2
    assert 0.1 < float(plain(shape, w13, w2, given).std()) < 100
