"""Fast kernels against the reference arithmetic: the same bits, whatever the weights.

The reference itself is judged in ``test_nvfp4.py``. On a machine with a GPU, its kernel is tested
here too.
"""

from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.native import environment, jit, processor
from quantize.nvfp4 import kernels
from quantize.nvfp4.format import NvFp4
from quantize.nvfp4.kernels import cpp_cpu, for_device
from quantize.nvfp4.kernels.kernel import Kernel, NotFiniteError, Quantized, quantize_weights
from quantize.nvfp4.kernels.numba_cpu import NumbaKernel
from quantize.nvfp4.kernels.reference import ReferenceKernel
from quantize.nvfp4.scales import RULES
from tests.quantize.test_cli import refusal
from tests.quantize.without_cpp import LACKS, take_away

CPP = {each.name: each for each in cpp_cpu.INSTRUCTIONS if each.here}
KERNELS = [*CPP, "numba", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
JUDGE = ReferenceKernel()

# What a kernel leaves to the reference is tried with one of them.
RULES_OF = [
    (name, rule) for name in KERNELS for rule in RULES if RULES[rule].reach or name == KERNELS[0]
]
by_rule = pytest.mark.parametrize(("name", "rule"), RULES_OF)
FAST = [rule for rule in RULES if RULES[rule].reach]
by_name = pytest.mark.parametrize("name", KERNELS)


@cache
def kernel(name: str) -> Kernel:
    if name in CPP:
        return cpp_cpu.CppKernel(CPP[name])
    return NumbaKernel() if name == "numba" else for_device(torch.device(name))


def device(name: str) -> str:
    return name if name.startswith("cuda") else "cpu"


def assert_same(ours: list[Quantized], theirs: list[Quantized]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.weight.codes.cpu(), b.weight.codes)
        scales = a.weight.block_scale.view(torch.uint8).cpu()
        assert torch.equal(scales, b.weight.block_scale.view(torch.uint8))
        assert torch.equal(a.weight.global_scale.cpu(), b.weight.global_scale)
        assert torch.equal(a.counts, b.counts)
        # Kernels add up in float32, a few thousand weights at a time.
        assert a.noise == pytest.approx(b.noise, rel=1e-3, abs=1e-9 * b.signal)
        assert a.signal == pytest.approx(b.signal, rel=1e-5)


def check(weights: list[torch.Tensor], rule: str, name: str) -> None:
    on_device = [weight.to(device(name)) for weight in weights]
    assert_same(quantize_weights(on_device, rule, kernel(name)), judged(weights, rule))


_JUDGED: dict[tuple[str, bytes], list[Quantized]] = {}


def judged(weights: list[torch.Tensor], rule: str) -> list[Quantized]:
    """What the reference says. It is slow, and is asked once for each kernel."""
    digest = sha256()
    for weight in weights:
        digest.update(f"{weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    key = rule, digest.digest()
    if key not in _JUDGED:
        _JUDGED[key] = quantize_weights(weights, rule, JUDGE)
    return _JUDGED[key]


@by_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-6, 0.02, 1.0, 200.0])
def test_random_weights(name: str, dtype: torch.dtype, rule: str, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (200, 208)  # 2600 blocks: not a whole number of the kernels' chunks
    spread = torch.exp(torch.randn(shape[0], 1, generator=generator))
    weight = (torch.randn(shape, generator=generator) * spread * size).to(dtype)
    weight[3] = 0
    weight[5, :16] *= 1e-4
    check([weight, weight[:64] / 3], rule, name)


@by_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_that_16_bits_can_be(name: str, dtype: torch.dtype, rule: str) -> None:
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    generator = torch.Generator().manual_seed(1)
    shuffled = numbers[torch.randperm(len(numbers), generator=generator)]
    for order in (numbers, shuffled):
        # In one weight, small numbers vanish beside large ones; alone, each range has its scale.
        check([order.view(-1, 16)], rule, name)
        for part in order.view(-1, 16).split(17):
            check([part], rule, name)


@by_rule
def test_ties_between_codes_and_between_scales(name: str, rule: str) -> None:
    halves = torch.arange(0, 7, 0.125)
    blocks = halves.repeat(16, 1).T.contiguous()
    blocks[:, 0] = 6  # each block's scale is 1, or a power of two, times the global one
    powers = torch.tensor([2.0**-k for k in range(19)]).repeat_interleave(16)[: len(blocks)]
    blocks = torch.cat((blocks, blocks * powers[:, None], -blocks))
    blocks[0] = 2688  # so that the global scale is 1
    check([blocks], rule, name)


@by_name
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_weights(name: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    biggest = float(torch.finfo(dtype).max)
    number = st.floats(-biggest, biggest, width=32) | st.floats(-8, 8, width=16)
    values = data.draw(st.lists(number, min_size=1, max_size=rows * blocks * 16))
    flat = torch.tensor(values, dtype=torch.float32).to(dtype)
    flat = torch.where(flat.isfinite(), flat, torch.zeros_like(flat))
    weight = flat.repeat(rows * blocks * 16)[: rows * blocks * 16].view(rows, -1)
    check([weight], data.draw(st.sampled_from(FAST)), name)


@by_rule
def test_weights_that_do_not_lie_in_one_run(name: str, rule: str) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    for view in (weight.T, weight[::2], weight[:, :48]):
        check([view], rule, name)


@by_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 777, 1023])
def test_what_is_not_finite_is_refused(
    name: str, dtype: torch.dtype, value: float, place: int
) -> None:
    weight = torch.ones(16, 64, dtype=dtype, device=device(name))
    weight.view(-1)[place] = value
    with pytest.raises(NotFiniteError):
        quantize_weights([torch.ones_like(weight), weight], "max", kernel(name))


@pytest.mark.parametrize("name", [*CPP, "numba"])
def test_small_float16_where_pytorch_flushes_denormals(name: str) -> None:
    """Such a number is none of float32's."""
    weight = (torch.randn(16, 64, generator=torch.Generator().manual_seed(4)) * 1e-5).half()
    want = judged([weight], "mse")
    assert_same(quantize_weights([weight], "mse", kernel(name)), want)
    if not torch.set_flush_denormal(True):
        pytest.skip("the processor cannot")
    try:
        assert_same(quantize_weights([weight], "mse", kernel(name)), want)
    finally:
        torch.set_flush_denormal(False)


@by_name
@pytest.mark.parametrize("rule", FAST)
def test_rows_that_are_no_whole_number_of_blocks(name: str, rule: str) -> None:
    """Even if the weight is: more scales would be written than there is room for."""
    weight = torch.ones(64, 24, device=device(name))
    with pytest.raises(RuntimeError, match="unflatten"):
        quantize_weights([weight], rule, kernel(name))


@by_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_comparison_with_what_is_stored(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(100, 208, generator=generator).to(dtype)
    stored = quantize_weights([weight], "max", JUDGE)[0].weight
    other = torch.randn(100, 208, generator=generator).to(dtype)
    for against in (weight, other):
        lost = stored.dequantize().double() - against.double()
        noise, signal = kernel(name).compare(
            against.to(device(name)), NvFp4(*(t.to(device(name)) for t in stored))
        )
        assert noise == pytest.approx(float(lost.square().sum()), rel=1e-5)
        assert signal == pytest.approx(float(against.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("lacks", LACKS)
def test_without_cpp_numba_does_the_work(
    lacks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With one line that says why, unless that is what the user has asked for."""
    said: list[str] = []
    monkeypatch.setattr(kernels.logger, "warning", lambda text, *args: said.append(text % args))
    kernels._for_cpus.cache_clear()
    take_away(lacks, tmp_path, monkeypatch)
    try:
        for _ in range(2):
            assert isinstance(for_device(torch.device("cpu")), NumbaKernel)
    finally:
        kernels._for_cpus.cache_clear()
    if lacks == "a compiler":
        (line,) = said
        assert "numba quantizes, which is slower than C++ would be: no C++ compiler" in line
    else:
        assert said == []


def test_an_old_compiler_compiles_the_next_best(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = CPP.values()
    made = cpp_cpu.CppKernel

    def compiled(instructions: processor.Instructions) -> cpp_cpu.CppKernel:
        if instructions is first or not others:
            raise jit.KernelError("unrecognized option")
        return made(instructions)

    monkeypatch.setattr(cpp_cpu, "CppKernel", compiled)
    assert isinstance(kernels._for_cpus.__wrapped__(), made if others else NumbaKernel)


def test_a_processor_of_which_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where /proc is not mounted."""
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "missing")
    monkeypatch.setattr(processor, "flags", processor.flags.__wrapped__)
    assert isinstance(kernels._for_cpus.__wrapped__(), NumbaKernel)


def test_a_variable_that_is_neither(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(environment.CPP, "no")
    said = refusal("quantize", saved("qwen3_moe"), tmp_path / "out")
    assert said == "error: NVFP4_MOE_CPP=no in the environment: must be 0 or 1"
    assert not (tmp_path / "out").exists()


def test_the_fastest_is_chosen() -> None:
    assert isinstance(for_device(torch.device("cpu")), cpp_cpu.CppKernel if CPP else NumbaKernel)
