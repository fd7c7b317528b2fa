"""Fast kernels against the reference arithmetic: the same bits, whatever the weights.

The reference itself is judged in ``test_nvfp4.py``. On a machine with a GPU, its kernel is tested
here too.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.kernels.kernel import Kernel, NotFiniteError, Quantized, quantize_weights
from quantize.nvfp4.kernels.reference import ReferenceKernel
from quantize.nvfp4.scales import RULES

DEVICES = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
JUDGE = ReferenceKernel()

pytestmark = pytest.mark.parametrize("device", DEVICES)


def kernel(device: str) -> Kernel:
    return for_device(torch.device(device))


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


def check(weights: list[torch.Tensor], rule: str, device: str) -> None:
    on_device = [weight.to(device) for weight in weights]
    assert_same(
        quantize_weights(on_device, rule, kernel(device)), quantize_weights(weights, rule, JUDGE)
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-6, 0.02, 1.0, 200.0])
def test_random_weights(device: str, dtype: torch.dtype, rule: str, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (200, 208)  # 2600 blocks: not a whole number of the kernels' chunks
    spread = torch.exp(torch.randn(shape[0], 1, generator=generator))
    weight = (torch.randn(shape, generator=generator) * spread * size).to(dtype)
    weight[3] = 0
    weight[5, :16] *= 1e-4
    check([weight, weight[:64] / 3], rule, device)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_that_16_bits_can_be(device: str, dtype: torch.dtype, rule: str) -> None:
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    generator = torch.Generator().manual_seed(1)
    shuffled = numbers[torch.randperm(len(numbers), generator=generator)]
    for order in (numbers, shuffled):
        # In one weight, small numbers vanish beside large ones; alone, each range has its scale.
        check([order.view(-1, 16)], rule, device)
        for part in order.view(-1, 16).split(17):
            check([part], rule, device)


@pytest.mark.parametrize("rule", RULES)
def test_ties_between_codes_and_between_scales(device: str, rule: str) -> None:
    halves = torch.arange(0, 7, 0.125)
    blocks = halves.repeat(16, 1).T.contiguous()
    blocks[:, 0] = 6  # each block's scale is 1, or a power of two, times the global one
    powers = torch.tensor([2.0**-k for k in range(19)]).repeat_interleave(16)[: len(blocks)]
    blocks = torch.cat((blocks, blocks * powers[:, None], -blocks))
    blocks[0] = 2688  # so that the global scale is 1
    check([blocks], rule, device)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_weights(device: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    biggest = float(torch.finfo(dtype).max)
    number = st.floats(-biggest, biggest, width=32) | st.floats(-8, 8, width=16)
    values = data.draw(st.lists(number, min_size=1, max_size=rows * blocks * 16))
    flat = torch.tensor(values, dtype=torch.float32).to(dtype)
    flat = torch.where(flat.isfinite(), flat, torch.zeros_like(flat))
    weight = flat.repeat(rows * blocks * 16)[: rows * blocks * 16].view(rows, -1)
    check([weight], data.draw(st.sampled_from(sorted(RULES))), device)


@pytest.mark.parametrize("rule", RULES)
def test_weights_that_do_not_lie_in_one_run(device: str, rule: str) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    for view in (weight.T, weight[::2], weight[:, :48]):
        check([view], rule, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 777, 1023])
def test_what_is_not_finite_is_refused(
    device: str, dtype: torch.dtype, value: float, place: int
) -> None:
    weight = torch.ones(16, 64, dtype=dtype, device=device)
    weight.view(-1)[place] = value
    with pytest.raises(NotFiniteError):
        quantize_weights([torch.ones_like(weight), weight], "max", kernel(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_comparison_with_what_is_stored(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(100, 208, generator=generator).to(dtype)
    stored = quantize_weights([weight], "max", JUDGE)[0].weight
    other = torch.randn(100, 208, generator=generator).to(dtype)
    cpu = kernel("cpu")
    for against in (weight, other):
        lost = stored.dequantize().double() - against.double()
        noise, signal = cpu.compare(against, stored)
        assert noise == pytest.approx(float(lost.square().sum()), rel=1e-5)
        assert signal == pytest.approx(float(against.double().square().sum()), rel=1e-5)
