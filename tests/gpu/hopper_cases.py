"""What each Hopper kernel is held to beside its reference, on a GPU."""

from __future__ import annotations

import functools

import pytest
import torch

from quantize.experts.gates import Gate
from tests.gpu import reference
from tests.gpu.layer import MODELS, Shape, error
from tests.gpu.packed import GATES, Packed
from tests.gpu.reference import Stored
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape

SHAPES = [
    *MODELS,
    # Slices of tensor parallelism: of 2 and 8 ranks.
    Shape("qwen3-235b-tp2", 128, 4096, 768, 8),
    Shape("qwen3-235b-tp8", 128, 4096, 192, 8),
    # Neither a multiple of a tile.
    Shape("pad-both", 32, 2880, 720, 4),
    Shape("pad-narrow", 8, 448, 48, 2),
    Shape("pad-rows", 8, 400, 80, 2),
]


def poison(packed: Packed, x: torch.Tensor) -> None:
    """NaN where the kernel's workspace will likely lie, so that what it must not read shows."""
    pairs = len(x) * packed.shape.top_k
    for width in (packed.shape.hidden, packed.shape.intermediate, packed.shape.intermediate // 2):
        torch.full(((pairs + 4096) * (width + 128),), torch.nan, dtype=x.dtype, device=x.device)


class Cases:
    """A subclass says how large an error may be; its module has the fixtures ``packed`` and
    ``tile_shape``."""

    bound: float

    def test_graphs_give_the_same_bits(self, packed: Packed, tile_shape: TileShape) -> None:
        x, ids, weights = packed.batch(16, "uniform", 0)
        eager = packed.kernel.run(
            x, packed.experts, ids, weights, GATES["silu"], tile_shape=tile_shape
        )
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = packed.kernel.run(
                    x, packed.experts, ids, weights, GATES["silu"], tile_shape=tile_shape
                )
        other = packed.batch(16, "skewed", 1)
        for inputs in (other, (x.clone(), ids.clone(), weights.clone())):
            expected = packed.kernel.run(
                inputs[0], packed.experts, *inputs[1:], GATES["silu"], tile_shape=tile_shape
            )
            x.copy_(inputs[0])
            ids.copy_(inputs[1])
            weights.copy_(inputs[2])
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, expected)
        assert torch.equal(out, eager)

    def test_half_of_the_experts_elsewhere(self, packed: Packed, tile_shape: TileShape) -> None:
        """Two ranks' outputs add up to one's (expert parallel); one without a token gives zeros."""
        shape = packed.shape
        x, ids, weights = packed.batch(33, "uniform", 2)
        truth = packed.truth(x, ids, weights, "silu")
        total = torch.zeros_like(truth)
        for rank in range(2):
            mine = torch.arange(rank, shape.experts, 2, device=packed.device)
            local = torch.full((shape.experts,), -1, dtype=torch.int32, device=packed.device)
            local[mine] = torch.arange(len(mine), dtype=torch.int32, device=packed.device)
            parts = [Stored(*(t[mine] for t in stored)) for stored in (packed.w13, packed.w2)]
            experts = packed.kernel.pack(*parts[0], *parts[1])
            poison(packed, x)
            total += packed.kernel.run(
                x, experts, ids, weights, GATES["silu"], local=local, tile_shape=tile_shape
            )
            nowhere = torch.full_like(local, -1)
            out = packed.kernel.run(
                x, experts, ids, weights, GATES["silu"], local=nowhere, tile_shape=tile_shape
            )
            assert out.count_nonzero() == 0
        assert error(total, truth).whole < self.bound

    def test_one_hot_expert(self, packed: Packed, tile_shape: TileShape) -> None:
        """All tokens choose the same experts: many tiles of one, none of most."""
        shape = packed.shape
        x, _, weights = packed.batch(300, "uniform", 3)
        ids = torch.arange(shape.top_k, dtype=torch.int32, device=packed.device).repeat(300, 1)
        ids += shape.experts - shape.top_k
        poison(packed, x)
        out = packed.kernel.run(
            x, packed.experts, ids, weights, GATES["swiglu_oai"], tile_shape=tile_shape
        )
        assert error(out, packed.truth(x, ids, weights, "swiglu_oai")).whole < self.bound

    def test_rows_apart_and_in_place(self, packed: Packed) -> None:
        """x may be a slice of wider rows, and the output may lie where x does."""
        x, ids, weights = packed.batch(16, "uniform", 4)
        expected = packed.kernel.run(x, packed.experts, ids, weights, GATES["silu"])
        wide = torch.full((16, x.shape[1] + 64), torch.nan, dtype=x.dtype, device=x.device)
        wide[:, 8 : 8 + x.shape[1]] = x
        apart = wide[:, 8 : 8 + x.shape[1]]
        assert torch.equal(
            packed.kernel.run(apart, packed.experts, ids, weights, GATES["silu"]), expected
        )
        own = x.clone()
        packed.kernel.run(own, packed.experts, ids, weights, GATES["silu"], out=own)
        assert torch.equal(own, expected)
        none = packed.kernel.run(x[:0], packed.experts, ids[:0], weights[:0], GATES["silu"])
        assert none.shape == (0, x.shape[1])

    def test_nan_comes_out(self, packed: Packed) -> None:
        """Of the token it went into, and of no other."""
        x, ids, weights = packed.batch(16, "uniform", 5)
        x[3, 5] = torch.nan
        out = packed.kernel.run(x, packed.experts, ids, weights, GATES["swiglu_oai"])
        assert out[3].isnan().all()
        assert out[[i for i in range(16) if i != 3]].isfinite().all()

    def test_gelu(self, packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
        gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")
        monkeypatch.setitem(reference.GATES, "gelu_tanh", lambda gate, up: gelu(gate) * up)
        x, ids, weights = packed.batch(16, "uniform", 6)
        truth = packed.truth(x, ids, weights, "gelu_tanh")
        out = packed.kernel.run(x, packed.experts, ids, weights, Gate("gelu_tanh"))
        assert error(out, truth).whole < self.bound
