"""The CPU's operators in C++, beside plain arithmetic and vLLM's router."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from quantize.experts.gates import Gate
from quantize.native import jit
from tests.plugin.cpu_kernels import EXPERTS, NATIVE, TOP_K, Case
from tests.plugin.test_layer import LAYER, routing
from vllm_nvfp4_moe import quirks
from vllm_nvfp4_moe.backends.cpu import forward
from vllm_nvfp4_moe.backends.cpu import method as cpu_method
from vllm_nvfp4_moe.backends.cpu import routing as cpu_routing
from vllm_nvfp4_moe.kernels.cpu import operators
from vllm_nvfp4_moe.kernels.cpu.kernel import ANY, FORMS, Kernel, choice

GATE = Gate("swiglu_oai", 1.702, 1.0, 7.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments(case: Case, out: torch.Tensor, x: torch.Tensor, kernels: Any) -> tuple[Any, ...]:
    weights, ids = routing(len(x), EXPERTS, TOP_K)
    return (
        out, x, case.w13, case.s13, case.g13, case.w2, case.s2, case.g2, weights, ids, None,
        case.b13, case.b2, choice(kernels), FORMS[GATE.form], 1.702, 1.0, 7.0, False,
    )  # fmt: skip


@pytest.fixture(scope="module", params=NATIVE, ids=lambda each: each.instructions.name)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return Kernel(request.param)


def test_results_in_each_dtype(kernel: Kernel) -> None:
    """They are the float32 ones, rounded as PyTorch rounds; inputs mean what they do there."""
    torch.manual_seed(0)
    case = Case(48, 80, biased=True)
    numbers = torch.randn(9, 48).half() * torch.logspace(-6, 1, 9)[:, None].half()
    for dtype, to in product(kernel.variant.takes, DTYPES):
        x, out = numbers.to(dtype), torch.empty(9, 48, dtype=to)
        torch.manual_seed(1)
        given = arguments(case, out, x, [(math.inf, kernel)])
        torch.ops.vllm_nvfp4_moe.experts(*given)
        weights, ids = given[8:10]
        want = case.run(kernel, x.float(), weights, ids, GATE)
        assert torch.equal(out, want.to(to)), (dtype, to)


def test_what_is_not_a_number_stays_so(kernel: Kernel) -> None:
    case = Case(16, 16)
    for to in DTYPES:
        out, x = torch.zeros(2, 16, dtype=to), torch.ones(2, 16)
        x[1, 3] = math.nan
        torch.ops.vllm_nvfp4_moe.experts(*arguments(case, out, x, [(math.inf, kernel)]))
        assert out[0].isfinite().all() and out[1].isnan().all(), to


@pytest.mark.skipif(len(NATIVE) < 2, reason="one kernel is all that this processor has")
def test_the_kernel_is_chosen_by_the_number_of_tokens() -> None:
    torch.manual_seed(2)
    case, two = Case(256, 128), [Kernel(NATIVE[0]), Kernel(NATIVE[-1])]
    for tokens in (1, 4, 5, 9):
        x, out = torch.randn(tokens, 256).bfloat16(), torch.empty(tokens, 256)
        given = arguments(case, out, x, [(4, two[0]), (math.inf, two[1])])
        torch.ops.vllm_nvfp4_moe.experts(*given)
        bits = [torch.equal(out, case.run(each, x, *given[8:10], GATE)) for each in two]
        assert bits == [tokens <= 4, tokens > 4]


def test_no_kernel_for_so_many_tokens(kernel: Kernel) -> None:
    given = arguments(Case(16, 16), torch.empty(3, 16), torch.zeros(3, 16), [(2, kernel)])
    with pytest.raises(RuntimeError, match="choice: it has no kernel for 3 tokens"):
        torch.ops.vllm_nvfp4_moe.experts(*given)
    strange = (*given[:13], torch.tensor([[99, 63]]), *given[14:])
    with pytest.raises(RuntimeError, match="choice: it has no kernel for 3 tokens"):
        torch.ops.vllm_nvfp4_moe.experts(*strange)


@pytest.mark.parametrize(
    ("place", "tensor", "said"),
    [
        (0, torch.empty(2, 15), r"out: float32 \[2, 15\] where float32 \[2, 16\] in C order"),
        (0, torch.empty(2, 16).int(), "out: int32 where bfloat16, float16 or float32 is taken"),
        (1, torch.empty(16), "x, topk_ids, w2 or choice has not 2, 2, 3 and 2 dimensions"),
        (1, torch.empty(16, 2).mT, r"x: float32 \[2, 16\] where float32 \[2, 16\] in C order"),
        (8, torch.empty(2, 2).double(), "topk_weights: another dtype"),
        (9, torch.empty(2, 2).long(), r"topk_ids: int64 \[2, 2\] where int32 \[2, 2\]"),
        (10, torch.empty(5, 1).int(), r"expert_map: int32 \[5, 1\] where int32 \[0\]"),
        (13, torch.empty(1, 3).long(), r"choice: int64 \[1, 3\] where int64 \[1, 2\]"),
    ],
)
def test_what_the_experts_do_not_take(
    kernel: Kernel, place: int, tensor: torch.Tensor, said: str
) -> None:
    given = list(arguments(Case(16, 16), torch.empty(2, 16), torch.zeros(2, 16), [(9, kernel)]))
    given[place] = tensor
    with pytest.raises(RuntimeError, match=said):
        torch.ops.vllm_nvfp4_moe.experts(*given)


def test_tensors_are_given_back(kernel: Kernel) -> None:
    """All of them, after a call and after an error: else each would keep its memory for ever."""
    case = Case(16, 16, biased=True)
    given = list(arguments(case, torch.empty(2, 16), torch.zeros(2, 16), [(9, kernel)]))
    given[10] = torch.arange(EXPERTS, dtype=torch.int32)
    tensors = [each for each in given if isinstance(each, torch.Tensor)]
    before = [each._use_count() for each in tensors]
    for wrong in (False, True):
        for _ in range(3):
            if wrong:
                with pytest.raises(RuntimeError, match="beyond the last"):
                    torch.ops.vllm_nvfp4_moe.experts(
                        *given[:9], torch.full((2, 2), EXPERTS, dtype=torch.int32), *given[10:]
                    )
            else:
                torch.ops.vllm_nvfp4_moe.experts(*given)
        assert [each._use_count() for each in tensors] == before, wrong


def test_compiled_with_a_model(kernel: Kernel) -> None:
    """torch.compile takes both operators into one graph, for any number of tokens."""
    torch.manual_seed(3)
    case = Case(48, 32)
    kernels = choice([(math.inf, kernel)])

    def step(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        weights = torch.empty(len(x), TOP_K)
        ids = torch.empty(len(x), TOP_K, dtype=torch.int32)
        torch.ops.vllm_nvfp4_moe.route(weights, ids, logits * 2, None, True, True, 1.5)
        out = torch.empty_like(x)
        torch.ops.vllm_nvfp4_moe.experts(
            out, x + 1, case.w13, case.s13, case.g13, case.w2, case.s2, case.g2, weights, ids,
            None, None, None, kernels, FORMS[GATE.form], 1.702, 1.0, 7.0, False,
        )  # fmt: skip
        return out - x

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 7):
        given = torch.randn(tokens, 48).bfloat16(), torch.randn(tokens, EXPERTS)
        assert torch.equal(compiled(*given), step(*given))


def plain_routing(
    logits: torch.Tensor, bias: torch.Tensor | None, k: int, sigmoid: bool, renormalize: bool,
    factor: float,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """In Python's numbers: each token's experts, the highest first, and their weights."""
    every_id, every_weight = [], []
    for row in logits.double().tolist():
        most = max(row)
        raised = [math.exp(value - most) for value in row]
        scores = [1 / (1 + math.exp(-v)) if sigmoid else r / sum(raised)
                  for v, r in zip(row, raised, strict=True)]  # fmt: skip
        biased = [s + b for s, b in zip(scores, [0.0] * len(row) if bias is None
                                        else bias.double().tolist(), strict=True)]  # fmt: skip
        ids = sorted(range(len(row)), key=lambda e, biased=biased: -biased[e])[:k]
        total = sum(scores[e] for e in ids) if renormalize else 1.0
        every_id.append(ids)
        every_weight.append([scores[e] / total * factor for e in ids])
    return every_id, every_weight


def route(logits: torch.Tensor, bias: torch.Tensor | None, k: int, *more: Any) -> Any:
    operators.load()
    weights, ids = torch.empty(len(logits), k), torch.empty(len(logits), k, dtype=torch.int32)
    torch.ops.vllm_nvfp4_moe.route(weights, ids, logits, bias, *more)
    return weights, ids


@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("bias_is", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routing_as_plain_numbers(
    dtype: torch.dtype, bias_is: torch.dtype | None, renormalize: bool, sigmoid: bool
) -> None:
    torch.manual_seed(4)
    for tokens, experts, k in ((1, 1, 1), (3, 7, 7), (70, 33, 4), (129, 256, 8)):
        # No two of a token's scores are so close that rounding could exchange them.
        logits = torch.stack([torch.randperm(experts) for _ in range(tokens)])
        logits = (logits.float() / 32 - 2).to(dtype)
        bias = None if bias_is is None else (torch.randint(2, (experts,)) * 8.0).to(bias_is)
        weights, ids = route(logits, bias, k, sigmoid, renormalize, 2.5)
        want_ids, want = plain_routing(logits, bias, k, sigmoid, renormalize, 2.5)
        assert ids.tolist() == want_ids
        torch.testing.assert_close(weights, torch.tensor(want), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_read_as_pytorch_does(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    weights, _ = route(every[:, None].contiguous(), None, 1, True, False, 1.0)
    torch.testing.assert_close(
        weights[:, 0], every.float().sigmoid(), rtol=1e-6, atol=0, equal_nan=True
    )


def test_equal_scores_go_to_the_first_experts() -> None:
    weights, ids = route(torch.zeros(2, 9), None, 4, False, True, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2 and torch.equal(weights, torch.full((2, 4), 0.25))


def test_experts_are_distinct_and_no_number_hides() -> None:
    """With logits or biases that are infinite, or no numbers."""
    low, nan = -math.inf, math.nan
    logits = torch.tensor([[low, low, 1.0, low], [0.0, nan, 1.0, 2.0], [nan] * 4, [low] * 4])
    for sigmoid in (True, False):
        weights, ids = route(logits, None, 3, sigmoid, False, 1.0)
        assert all(len(set(row)) == 3 and set(row) <= set(range(4)) for row in ids.tolist())
        assert ids[0, 0] == 2 and 1 in ids[1].tolist()
        assert weights[1:3].isnan().any(dim=1).all() and weights[0].isfinite().all()
    _, ids = route(torch.zeros(1, 4), torch.tensor([0.0, low, low, low]), 3, True, True, 1.0)
    assert sorted(ids[0].tolist()) == [0, 1, 2]


def test_a_token_is_routed_alike_in_every_batch() -> None:
    torch.manual_seed(5)
    logits = torch.randn(200, 32).bfloat16()
    weights, ids = route(logits, None, 4, False, True, 1.0)
    for i in (0, 77, 199):
        alone = route(logits[i : i + 1].contiguous(), None, 4, False, True, 1.0)
        assert torch.equal(alone[0][0], weights[i]) and torch.equal(alone[1][0], ids[i])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": torch.empty(2, 9)}, "9 experts a token, of 8"),
        ({"weights": torch.empty(2)}, "weights or logits has not 2 dimensions"),
        ({"ids": torch.empty(2, 4).long()}, r"ids: int64 \[2, 4\] where int32 \[2, 4\]"),
        ({"logits": torch.empty(2, 8).long()}, "logits: int64 where bfloat16, float16 or float32"),
        ({"bias": torch.empty(7)}, r"bias: float32 \[7\] where float32 \[8\]"),
    ],
)
def test_what_routing_does_not_take(change: dict[str, torch.Tensor], said: str) -> None:
    operators.load()
    given = {
        "weights": torch.empty(2, 4), "ids": torch.empty(2, 4, dtype=torch.int32),
        "logits": torch.empty(2, 8), "bias": None,
    } | change  # fmt: skip
    with pytest.raises(RuntimeError, match=said):
        torch.ops.vllm_nvfp4_moe.route(**given, sigmoid=True, renormalize=True, factor=1.0)


def grouped(groups: int, **more: Any) -> dict[str, Any]:
    return {"use_grouped_topk": True, "num_expert_group": groups, "topk_group": 1, **more}


BIAS = torch.linspace(-0.5, 0.5, 32).roll(7)
TAKEN = [
    {}, {"renormalize": False}, grouped(1), grouped(1, renormalize=False),
    grouped(1, scoring_func="sigmoid"), grouped(1, scoring_func="sigmoid", routed_scaling_factor=2),
    grouped(1, scoring_func="sigmoid", e_score_correction_bias=BIAS),
    grouped(1, scoring_func="softmax", e_score_correction_bias=BIAS.bfloat16()),
    {"routed_scaling_factor": 2.0},
]  # fmt: skip
LEFT = [
    grouped(4, scoring_func="sigmoid"), {"scoring_func": "sqrtsoftplus"},
    {"custom_routing_function": print}, {"e_score_correction_bias": BIAS},
]  # fmt: skip


def router_of(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> CPURouter:
    """A router as the backend leaves it."""
    router = CPURouter(top_k=4, global_num_experts=32, **asked)
    monkeypatch.setattr(quirks, "runner_of", lambda layer: SimpleNamespace(router=router))
    cpu_routing.use_operator(SimpleNamespace())  # type: ignore[arg-type]
    return router


@pytest.mark.parametrize("asked", TAKEN, ids=str)
def test_as_vllms_router(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    torch.manual_seed(6)
    x, logits = torch.zeros(50, 16), torch.randn(50, 32)
    theirs = CPURouter(top_k=4, global_num_experts=32, **asked).select_experts(x, logits)
    router, seen = router_of(monkeypatch, asked), []
    assert "_compute_routing" in vars(router)
    router.set_capture_fn(seen.append)  # what else vLLM's routers do stays
    ours = router.select_experts(x, logits, topk_indices_dtype=torch.int64)
    assert ours[1].dtype == torch.int64 and torch.equal(seen[0], ours[1].int())
    order, our_order = theirs[1].argsort(), ours[1].argsort()
    assert torch.equal(theirs[1].gather(1, order), ours[1].gather(1, our_order).int())
    torch.testing.assert_close(theirs[0].gather(1, order), ours[0].gather(1, our_order))


@pytest.mark.parametrize("asked", LEFT, ids=str)
def test_other_routing_stays_vllms(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    assert "_compute_routing" not in vars(router_of(monkeypatch, asked))


@pytest.mark.usefixtures("numba")
def test_without_cpp_routing_stays_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "_compute_routing" not in vars(router_of(monkeypatch, {}))


def test_where_operators_cannot_be_had_routing_stays_vllms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That is found out once, and not by compiling for each layer."""
    asked: list[str] = []

    def fails(source: str, language: jit.Language) -> Any:
        asked.append(language.suffix)
        raise jit.KernelError("no C++ compiler")

    monkeypatch.setattr(jit, "load", fails)
    monkeypatch.setattr(operators, "load", cache(operators.load.__wrapped__))
    monkeypatch.setattr(cpu_routing, "_loaded", cache(cpu_routing._loaded.__wrapped__))
    for _ in range(3):
        assert "_compute_routing" not in vars(router_of(monkeypatch, {}))
    assert asked == [".cpp"]


def test_a_bias_that_is_loaded_later_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a reload: the router's own tensor, or another in its place."""
    router = router_of(
        monkeypatch, grouped(1, scoring_func="sigmoid", e_score_correction_bias=torch.zeros(32))
    )
    for expert in (5, 9):
        bias = torch.zeros(32)
        bias[expert] = 3
        if expert == 5:
            router.e_score_correction_bias.copy_(bias)
        else:
            router.e_score_correction_bias = bias
        _, ids = router.select_experts(torch.zeros(1, 16), torch.zeros(1, 32))
        assert ids[0, 0] == expert


def test_a_layers_call_needs_no_python(
    load: Any, shallow: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    torch.manual_seed(7)
    x, (weights, ids) = torch.randn(5, 384).bfloat16(), routing(5)
    want = forward.experts_forward(
        x, layer.w13_weight, layer.w13_weight_scale, layer.w13_weight_scale_2, layer.w2_weight,
        layer.w2_weight_scale, layer.w2_weight_scale_2, weights, ids, None,
        GATE.form, GATE.alpha, GATE.beta, GATE.limit, False,
    )  # fmt: skip

    def never(*_: Any) -> None:
        raise AssertionError("Python was called")

    monkeypatch.setattr(Kernel, "run", never)
    with pytest.raises(AssertionError):  # which the operator in Python would call
        forward.experts_forward(
            x, layer.w13_weight, layer.w13_weight_scale, layer.w13_weight_scale_2, layer.w2_weight,
            layer.w2_weight_scale, layer.w2_weight_scale_2, weights, ids, None,
            GATE.form, GATE.alpha, GATE.beta, GATE.limit, False,
        )  # fmt: skip
    assert torch.equal(layer.quant_method.apply(layer, x, weights, ids, None, None), want)


@pytest.mark.usefixtures("numba")
def test_without_cpp_a_layer_has_no_kernel_to_choose(load: Any, shallow: dict[str, Path]) -> None:
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    assert layer.quant_method.variant == cpu_method.NUMBA
    assert not hasattr(layer, "kernel_choice")


def test_a_pytorch_without_an_operators_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba does the work then, with a line that says why."""
    names = (*operators._FUNCTIONS[:-1], "aoti_torch_of_next_year")
    monkeypatch.setattr(operators, "_FUNCTIONS", names)
    monkeypatch.setattr(operators, "load", operators.load.__wrapped__)
    with pytest.raises(jit.KernelError, match=r"this PyTorch has not all .*of_next_year"):
        Kernel(NATIVE[-1])
    said: list[str] = []
    monkeypatch.setattr(forward.logger, "warning", lambda text, *args: said.append(text % args))
    monkeypatch.setattr(forward, "kernel_for", lambda *_: Kernel(NATIVE[-1]))
    assert forward.native.__wrapped__(torch.float32) is None
    assert len(said) == 1 and "numba runs the experts" in said[0]


def test_a_pytorch_whose_library_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(jit.KernelError, match=r"this PyTorch has not all .*libtorch_cpu\.so"):
        operators.load.__wrapped__()


def test_a_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    source = operators.source()
    text = source[0].replace("int32_t bfloat16, ", "int32_t bfloat16, more[4], ")
    monkeypatch.setattr(operators, "source", lambda: (text, source[1]))
    with pytest.raises(jit.KernelError, match=r"torch_abi\.h and operators\.py differ"):
        operators.load.__wrapped__()


def test_dtypes_are_all_that_kernels_take() -> None:
    assert set(DTYPES) == set(ANY)
