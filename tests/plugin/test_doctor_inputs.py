"""What doctor gives to kernels, and what plain arithmetic makes of it, beside another
implementation of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantize.experts.gates import Gate
from tests.gpu import reference as independent
from vllm_nvfp4_moe.doctor.cases import (
    TOKENS,
    Case,
    all_cases,
    judged,
    make_batch,
    make_weights,
    together,
)
from vllm_nvfp4_moe.doctor.reference import Rounding, outputs
from vllm_nvfp4_moe.doctor.routing import KINDS, correction_bias
from vllm_nvfp4_moe.doctor.shape import CLAMPED, Shape

CPU = torch.device("cpu")
TINY = Shape("tiny", 8, 256, 128, 2, CLAMPED, router="sigmoid")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_logits_are_what_they_are_called(kind: str, router: str) -> None:
    shape = replace(TINY, experts=64, top_k=4, router=router)
    given = make_batch(shape, Case(400, kind), CPU)
    assert given.logits is not None
    chosen = given.logits.gather(1, given.ids.long())
    others = given.logits.scatter(1, given.ids.long(), -100.0).amax(1)
    assert bool((chosen.amin(1) > others + 1).all())
    assert bool((given.logits < 0).all()) == (kind == "all-negative")
    assert (len(chosen.unique()) == 1) == (kind == "tied")
    loads = given.ids.flatten().long().bincount(minlength=64).sort(descending=True).values
    assert (float(loads[0]) > 0.4 * 400) == (kind == "skewed")


def test_plain_arithmetic_is_that_of_another_implementation() -> None:
    """``tests.gpu.reference`` shares no code with the package: experts, gate and router."""
    for gate, router in (
        (CLAMPED, "sigmoid"),
        (Gate("silu"), "softmax"),
        (Gate("relu2"), "softmax"),
    ):
        shape = replace(TINY, gate=gate, router=router)
        weights = make_weights(shape, CPU)
        given = make_batch(shape, Case(64, "uniform"), CPU)
        logits = given.logits
        assert logits is not None
        scores = logits.sigmoid() if router == "sigmoid" else logits.softmax(-1)
        bias = correction_bias(8) if router == "sigmoid" else 0.0
        ids = (scores + bias).topk(2).indices
        factor = scores.gather(1, ids) / scores.gather(1, ids).sum(1, keepdim=True)
        torch.testing.assert_close(given.weights, factor)
        assert torch.equal(given.ids.long(), ids)
        w13, w2 = (independent.Stored(*part) for part in (weights.w13, weights.w2))
        if not gate.gated:  # theirs drops a second half
            w13 = independent.Stored(*(torch.cat([p, p], 1) if p.ndim > 1 else p for p in w13))
        truth = independent.routed(given.x, w13, w2, factor, ids.int(), gate.form, torch.float64)
        (ours,) = outputs(weights, given, Rounding())
        assert float((ours - truth).norm() / truth.norm()) < 1e-5


def test_four_bit_activations_are_those_of_another_implementation() -> None:
    weights = make_weights(TINY, CPU)
    ones = torch.ones(8)
    weights = replace(weights, input_scales=(ones, ones))
    given = make_batch(TINY, Case(64, "uniform"), CPU)
    w13, w2 = (independent.Stored(*part) for part in (weights.w13, weights.w2))
    truth = independent.routed(
        given.x, w13, w2, given.weights, given.ids, "swiglu_oai", emulated=True
    )
    (ours,) = outputs(weights, given, Rounding(nvfp4=True))
    (plain,) = outputs(weights, given, Rounding())
    # Theirs also rounds to bfloat16 in between, which puts some values on the other side.
    assert float((ours - truth).norm()) < 0.5 * float((plain - truth).norm())


def test_whose_input_scale_shows() -> None:
    weights, given = make_weights(TINY, CPU), make_batch(TINY, Case(64, "uniform"), CPU)
    own, largest = (outputs(weights, given, Rounding(True, by))[0] for by in (True, False))
    assert float((own - largest).norm() / own.norm()) > 0.02


def test_judged_tokens_are_first_last_and_some_between() -> None:
    assert judged(8, 12).tolist() == list(range(8))
    some = judged(8192, 12).tolist()
    assert some[0] == 0 and some[-1] == 8191 and 10 <= len(set(some)) <= 12
    assert len(all_cases(TOKENS)) == 36
    batch = together([make_batch(TINY, Case(n, "tied"), CPU) for n in (2, 3)])
    assert (batch.x.shape, batch.ids.shape) == ((5, 256), (5, 2))
