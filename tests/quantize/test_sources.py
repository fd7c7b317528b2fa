"""Sources that are quantized already: decoded bit for bit.

The judge is float64 arithmetic on the formats' definitions (``published.py``).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.sources.find import find_stored_weights
from quantize.checkpoint.sources.refusals import check_config
from tests.quantize import published as pub
from tests.quantize.checkpoints import save
from tests.quantize.published import PUBLISHED, config_of
from tests.quantize.source_headers import PLAIN, find, headers, write
from tests.quantize.stored_formats import (
    E4M3,
    EXPERTS,
    Published,
    assert_same,
    e2m1_pairs,
    e4m3,
    fp8,
    mx,
    tensor,
)


@pytest.mark.parametrize("publish", PUBLISHED)
def test_published(publish: Callable[[], Published], tmp_path: Path) -> None:
    """Through a checkpoint: one tensor of floats by its usual name, each of its experts alike."""
    published = publish()
    with Checkpoint(write(tmp_path, published)) as checkpoint:
        check_config(checkpoint.config, "config.json")
        assert checkpoint.formats == {published.format}
        assert set(checkpoint.tensors) == {*published.weights, *PLAIN}
        [(name, expected)] = published.weights.items()
        assert set(checkpoint.parts(name)) == set(published.stored)
        sizes = [t.numel() * t.element_size() for t in published.stored.values()]
        assert checkpoint.stored_bytes(name) == sum(sizes)
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape) == ("BF16", expected.shape)
        assert_same(checkpoint.load(name), expected)
        if expected.ndim == 3:
            for expert in range(EXPERTS):
                assert_same(checkpoint.load_expert(name, expert), expected[expert])
        assert torch.equal(checkpoint.load("model.norm.weight"), PLAIN["model.norm.weight"])


@pytest.mark.parametrize("publish", PUBLISHED)
def test_into_given_memory(publish: Callable[[], Published]) -> None:
    published = publish()
    [(name, expected)] = published.weights.items()
    stored_weight = find(published)[name]
    memory = torch.full((expected.size,), torch.nan)
    decoded = stored_weight.decode(
        *(published.stored[part] for part in stored_weight.parts), out=memory
    )
    assert decoded.data_ptr() == memory.data_ptr()
    assert_same(decoded, expected)


def test_nested_config(tmp_path: Path) -> None:
    """A multimodal model's own quantization_config counts, block size and all."""
    published = pub.deepseek_v41_dense()
    save(tmp_path, published.stored, config_of(published, nested=True))
    with Checkpoint(tmp_path) as checkpoint:
        [(name, expected)] = published.weights.items()
        assert_same(checkpoint.load(name), expected)


# Every code, every scale, every size.


def test_mxfp8_every_code_and_scale() -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scale = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 8))
    stored = {"a.weight": tensor(codes, E4M3), "a.weight_scale_inv": tensor(scale)}
    published = mx(stored, None, "a.weight", e4m3(codes), scale, "mxfp8")
    expected = published.weights["a.weight"]
    decoded = find(published)["a.weight"].decode(*stored.values())
    assert_same(decoded, expected)
    assert decoded[255].isnan().all()  # a NaN scale is for the caller to see
    assert decoded[127, 0x7F].isnan()
    assert decoded[127, 1] == 2.0**-9


def test_mxfp4_every_code_and_scale() -> None:
    packed = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scale = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 16))
    stored = {"a.weight_packed": tensor(packed), "a.weight_scale": tensor(scale)}
    published = mx(stored, None, "a.weight", e2m1_pairs(packed), scale, "mxfp4")
    decoded = find(published)["a.weight"].decode(*stored.values())
    assert_same(decoded, published.weights["a.weight"])
    assert decoded[255].isnan().all()
    assert decoded[127, 2 * 0x3A : 2 * 0x3A + 2].tolist() == [-1.0, 1.5]  # low nibble, high one


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    block=st.tuples(*[st.sampled_from([1, 3, 32, 64, 128, 200])] * 2),
    experts=st.sampled_from([None, 1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_fp8_every_size(
    shape: tuple[int, int], block: tuple[int, int], experts: int | None, dtype: torch.dtype
) -> None:
    lead = () if experts is None else (experts,)
    grid = (*lead, -(-shape[0] // block[0]), -(-shape[1] // block[1]))
    config = {"quant_method": "fp8", "weight_block_size": list(block)}
    published = fp8("a", "a_scale_inv", (*lead, *shape), grid, block, config, dtype)
    stored_weight = find(published)["a"]
    assert_same(stored_weight.decode(*published.stored.values()), published.weights["a"])
    for expert in range(experts or 0):
        parts = [part[expert] for part in published.stored.values()]
        assert_same(stored_weight.decode(*parts), published.weights["a"][expert])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_scale_reaches_the_caller(bad: float) -> None:
    stored = {"a.weight": torch.ones(4, 4).to(E4M3), "a.weight_scale_inv": torch.full((1, 1), bad)}
    stored_weight = find_stored_weights(headers(stored), {})["a.weight"]
    assert not stored_weight.decode(*stored.values()).isfinite().any()
