"""What each Hopper kernel's source, run on a CPU, is held to."""

from __future__ import annotations

import functools

import pytest
import torch

from quantize.experts.gates import Gate
from tests.gpu import reference
from tests.gpu.layer import Shape, error
from tests.gpu.packed import GATES, Packed
from tests.plugin.emulation import Emulated
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape

SHAPES = [
    Shape("nano", 8, 384, 128, 2),
    # Neither a multiple of a tile; row tiles no multiple of two or four.
    Shape("pad-both", 8, 400, 48, 2),
    Shape("odd", 8, 512, 320, 2),
    # Row tiles in blocks of three; fewer columns than the second product reads.
    Shape("slice", 8, 512, 192, 2),
    # Of its columns there are more than the pipelines hold.
    Shape("deep", 3, 3264, 64, 2),
]

COUNTS = {
    8: (8, 5, 1, 9, 0, 16, 3),
    64: (64, 56, 41, 33, 32, 24, 9, 1, 65, 130, 0, 17),
    128: (128, 97, 96, 80, 64, 48, 33, 16, 129, 1, 0, 257, 112, 120, 56, 30, 20),
    192: (192, 161, 176, 160, 130, 128, 112, 96, 193, 70, 64, 48, 17, 0, 1, 385),
    256: (256, 225, 224, 208, 192, 165, 160, 144, 257, 113, 90, 70, 64, 48, 17, 1, 0, 112),
}
"""By the most tokens of a tile, how many tokens choose each expert: tiles of all sizes, and several
of one expert."""


class Cases:
    """A subclass says how large errors may be: against the kernel's own reference, of a batch and
    of a token, and against exact experts. Its module has the fixtures ``emulated``, ``packed`` (of
    each of ``SHAPES``), ``small`` (of the second) and ``tile_shape``."""

    bound: float
    token_bound: float
    cost: float

    @pytest.mark.parametrize(
        ("tokens", "routing", "gate", "processors"),
        [
            (1, "uniform", "swiglu_oai", 132),
            (5, "uniform", "silu", 7),
            (40, "skewed", "swiglu_oai", 3),
            (300, "uniform", "silu", 5),
        ],
    )
    def test_as_the_reference(
        self,
        emulated: Emulated,
        packed: Packed,
        tile_shape: TileShape,
        tokens: int,
        routing: str,
        gate: str,
        processors: int,
    ) -> None:
        x, ids, weights = packed.batch(
            min(tokens, 60) if tile_shape.max_tokens == 8 else tokens, routing
        )
        out = emulated.twice(
            x,
            packed.experts,
            ids,
            weights,
            GATES[gate],
            tile_shape=tile_shape,
            processors=processors,
        )
        assert error(out, packed.truth(x, ids, weights, gate)).whole < self.bound
        assert error(out, packed.exact(x, ids, weights, gate)).whole < self.cost

    @pytest.mark.parametrize("processors", [1, 4])
    def test_every_size_of_tile_at_once(
        self, emulated: Emulated, small: Packed, tile_shape: TileShape, processors: int
    ) -> None:
        counts = COUNTS[tile_shape.max_tokens]
        packed = small.like(Shape("one choice", len(counts), 256, 128, 1))
        ids = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].unsqueeze(1)
        x, _, weights = packed.batch(len(ids))
        out = emulated.twice(
            x,
            packed.experts,
            ids,
            weights,
            GATES["silu"],
            tile_shape=tile_shape,
            processors=processors,
        )
        assert error(out, packed.truth(x, ids, weights)).token < self.token_bound

    def test_one_hot_expert(self, emulated: Emulated, small: Packed, tile_shape: TileShape) -> None:
        x, ids, weights = small.batch(150)
        ids = torch.tensor([7, 5], dtype=torch.int32).repeat(150, 1)
        out = emulated.twice(x, small.experts, ids, weights, GATES["silu"], tile_shape=tile_shape)
        assert error(out, small.truth(x, ids, weights)).whole < self.bound

    def test_choices_of_nobody(
        self, emulated: Emulated, small: Packed, tile_shape: TileShape
    ) -> None:
        """An expert of -1, with and without a map, adds nothing; nor does a token with no other."""
        x, ids, weights = small.batch(20)
        ids[::3, 1] = -1
        ids[4] = -1
        silent = weights.masked_fill(ids < 0, 0)
        expected = small.truth(x, ids.clamp(min=0), silent)
        for local in (None, torch.arange(8, dtype=torch.int32)):
            out = emulated.run(
                x, small.experts, ids, weights, GATES["silu"], local=local, tile_shape=tile_shape
            )
            assert error(out, expected + 1e-30).whole < self.bound
            assert not out[4].count_nonzero()

    def test_half_of_the_experts_elsewhere(
        self, emulated: Emulated, small: Packed, tile_shape: TileShape
    ) -> None:
        """Two ranks' outputs add up to one's; a rank without a token gives zeros."""
        x, ids, weights = small.batch(33)
        total = torch.zeros(x.shape)
        for rank in range(2):
            mine = torch.arange(rank, 8, 2)
            local = torch.full((8,), -1, dtype=torch.int32)
            local[mine] = torch.arange(4, dtype=torch.int32)
            experts = small.kernel.pack(*(t[mine] for t in small.w13), *(t[mine] for t in small.w2))
            rest = ids, weights, GATES["silu"]
            total += emulated.twice(x, experts, *rest, local=local, tile_shape=tile_shape)
            nowhere = torch.full_like(local, -1)
            assert not emulated.run(
                x, experts, *rest, local=nowhere, tile_shape=tile_shape
            ).count_nonzero()
        assert error(total, small.truth(x, ids, weights)).whole < self.bound

    def test_what_the_choice_of_a_tile_shape_is_told(
        self, emulated: Emulated, small: Packed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a rank that has half of the experts, half of the pairs; its experts' number, and how
        many row tiles gate and up of 48 columns are."""
        told = []
        choose = small.kernel.choose_tile_shape
        monkeypatch.setattr(
            small.kernel, "choose_tile_shape", lambda *args: told.append(args) or choose(*args)
        )
        x, ids, weights = small.batch(20)
        rest = ids, weights, GATES["silu"]
        emulated.run(x, small.experts, *rest, processors=5)
        local = torch.arange(16, dtype=torch.int32).where(torch.arange(16) < 8, -1)
        emulated.run(x, small.experts, *rest, local=local, processors=5)
        assert told == [(40, 8, 2), (20, 8, 2)]

    def test_nan_comes_out(
        self, emulated: Emulated, small: Packed, tile_shape: TileShape, bad: float = torch.nan
    ) -> None:
        """Of the token it went into, and of no other."""
        x, ids, weights = small.batch(16)
        rest = ids, weights, GATES["swiglu_oai"]
        expected = emulated.run(x, small.experts, *rest, tile_shape=tile_shape)
        x[5, 3] = bad
        out = emulated.run(x, small.experts, *rest, tile_shape=tile_shape)
        assert out[5].isnan().all()
        others = torch.arange(16) != 5
        assert torch.equal(out[others], expected[others])

    def test_rows_apart_and_in_place(self, emulated: Emulated, small: Packed) -> None:
        """x may be a slice of wider rows, and the output may lie where x does."""
        x, ids, weights = small.batch(16)
        rest = ids, weights, GATES["silu"]
        expected = emulated.run(x, small.experts, *rest)
        wide = torch.full((16, x.shape[1] + 64), torch.nan, dtype=x.dtype)
        apart = wide[:, 8 : 8 + x.shape[1]]
        apart.copy_(x)
        assert torch.equal(emulated.run(apart, small.experts, *rest), expected)
        emulated.run(x, small.experts, *rest, out=x)
        assert torch.equal(x, expected)

    def test_gelu(self, emulated: Emulated, small: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
        gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")
        monkeypatch.setitem(reference.GATES, "gelu_tanh", lambda gate, up: gelu(gate) * up)
        x, ids, weights = small.batch(16)
        out = emulated.run(x, small.experts, ids, weights, Gate("gelu_tanh"))
        assert error(out, small.truth(x, ids, weights, "gelu_tanh")).whole < self.bound
