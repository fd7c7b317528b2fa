"""What a MiniMax-M3 takes on each GPU, by arithmetic: weights, and what is left for the KV cache.

    python -m benchmarks.m3_memory

Sizes are those of the published config, which vLLM's and Transformers' config classes have as
defaults; the number of parameters comes out as published, 427,040,140,160. How vLLM 0.32 splits
them was read in its ``models/minimax_m3``. Nothing here was measured; vLLM prints what it found,
as "Available KV cache memory".
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
NVFP4_BYTES = 9 / 16
"""Of a weight: 4 bits, and an 8-bit scale for 16 of them."""

UTILIZATION = 0.92
"""vLLM 0.32's default ``--gpu-memory-utilization``."""

OTHER_GIB = 8.0
"""Assumed, a GPU: activations of a full batch, CUDA graphs, NCCL's buffers, kernels' workspaces."""


@dataclass(frozen=True)
class MiniMaxM3:
    """The published sizes."""

    layers: int = 60
    dense_layers: int = 3
    experts: int = 128
    hidden: int = 6144
    intermediate: int = 3072
    dense_intermediate: int = 12288
    heads: int = 64
    kv_heads: int = 4
    head: int = 128
    index_heads: int = 4
    vocabulary: int = 200064
    vision: int = 865_567_232
    """Parameters of vision tower and projector."""

    @property
    def sparse_layers(self) -> int:
        """With routed experts, and with an indexer in attention."""
        return self.layers - self.dense_layers

    @property
    def routed(self) -> int:
        """Parameters of routed experts, which become NVFP4."""
        return self.sparse_layers * self.experts * 3 * self.hidden * self.intermediate

    @property
    def split(self) -> int:
        """Other parameters that tensor parallelism divides evenly."""
        attention = self.layers * 2 * self.heads * self.head * self.hidden
        shared = self.sparse_layers * 3 * self.hidden * self.intermediate
        dense = self.dense_layers * 3 * self.hidden * self.dense_intermediate
        return attention + shared + dense + 2 * self.vocabulary * self.hidden

    @property
    def by_kv_head(self) -> int:
        """Divided by at most as many ranks as there are key/value heads, then repeated."""
        keys_values = self.layers * 2 * self.kv_heads * self.head * self.hidden
        return keys_values + self.sparse_layers * self.index_heads * self.head * self.hidden

    @property
    def router(self) -> int:
        """On every rank, in float32, with the correction biases."""
        return self.sparse_layers * self.experts * (self.hidden + 1)

    @property
    def whole(self) -> int:
        """On every rank: index keys and norms, and to be safe the vision tower."""
        norms = (2 * self.layers + 1) * self.hidden + 2 * self.head * self.layers
        index = self.sparse_layers * (self.head * self.hidden + 2 * self.head)
        return norms + index + self.vision

    @property
    def parameters(self) -> int:
        return self.routed + self.split + self.by_kv_head + self.router + self.whole

    def checkpoint_bytes(self, nvfp4: bool) -> float:
        """On disk: all in bf16 but the router, and if ``nvfp4`` the routed experts."""
        rest = self.parameters - self.routed - self.router
        return self.routed * (NVFP4_BYTES if nvfp4 else 2) + rest * 2 + self.router * 4

    def weight_bytes(self, tensor: int, pipeline: int = 1, nvfp4: bool = True) -> float:
        """Of one GPU of ``tensor`` x ``pipeline``; experts are split alike with expert parallelism.

        Layers are taken as alike, and embeddings as divided by all: about right for two stages.
        """
        routed = self.routed * (NVFP4_BYTES if nvfp4 else 2) / tensor
        rest = self.split / tensor + self.by_kv_head / min(tensor, self.kv_heads)
        repeated = (self.whole - self.vision) * 2 + self.router * 4
        return (routed + rest * 2 + repeated) / pipeline + self.vision * 2

    def kv_bytes(
        self, tensor: int, pipeline: int = 1, cache: float = 2, index_cache: float = 2
    ) -> float:
        """Of one token on one GPU: keys and values, and the index key of the sparse layers.

        Args:
            cache: bytes of a value: 2, or 1 with ``--kv-cache-dtype fp8``.
            index_cache: likewise of the indexer's.
        """
        heads = max(1, self.kv_heads / tensor)
        keys_values = self.layers * 2 * heads * self.head * cache
        return (keys_values + self.sparse_layers * self.head * index_cache) / pipeline


@dataclass(frozen=True)
class Setup:
    """Equal GPUs, and how the model is spread over them."""

    name: str
    gib: float
    tensor: int
    pipeline: int = 1


B200, H200 = 178.3, 139.8
"""GiB that CUDA reports; B200's from a public report (pytorch/ao pull request 4002)."""

SETUPS = (
    Setup("4 x B200, TP 4", B200, 4),
    Setup("2 nodes of 2 x B200, TP 2, PP 2", B200, 2, 2),
    Setup("8 x H200, TP 8", H200, 8),
    Setup("2 nodes of 4 x H200, TP 4, PP 2", H200, 4, 2),
    Setup("4 x H200, TP 4", H200, 4),
)


def table(model: MiniMaxM3 = MiniMaxM3()) -> str:
    """Markdown, one row a setup, per GPU."""
    lines = [
        "| GiB, per GPU | memory | usable | weights | left for KV | a token, bf16 KV | tokens "
        "| a token, fp8 KV | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for setup in SETUPS:
        weights = model.weight_bytes(setup.tensor, setup.pipeline) / GIB
        usable = UTILIZATION * setup.gib
        left = usable - weights - OTHER_GIB
        cells = [setup.name, f"{setup.gib:.1f}", f"{usable:.1f}", f"{weights:.1f}", f"{left:.1f}"]
        for cache in (2, 1):
            of = model.kv_bytes(setup.tensor, setup.pipeline, cache)
            cells += [f"{of / 1024:.1f} KiB", f"{left * GIB / of / 1e6:.1f} M"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    model = MiniMaxM3()
    print(f"{model.parameters:,} parameters, {model.routed:,} of them in routed experts")
    for name, nvfp4 in (("bf16", False), ("NVFP4", True)):
        print(f"{name}: {model.checkpoint_bytes(nvfp4) / 1e9:.1f} GB on disk")
    print(table(model))


if __name__ == "__main__":
    main()
