"""What a source says of its key-value cache, said again in the target's layout, with its scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quantize.checkpoint.kv_cache import FP8, FP8_HEAD, StoredCache, kv_cache_of
from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import DamagedWeightsError
from quantize.layouts import LAYOUTS
from quantize.run.kv_scales import outputs_of
from quantize.run.options import KV_AUTO, Options
from quantize.run.shards import ShardWriter
from quantize.run.weight_error import WeightError
from quantize.run.worker import Worker

LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")
"""Linears of attention that caches a latent instead of keys and values."""


@dataclass(frozen=True)
class CarryKvScales:
    """Writes the source's scales of one attention; see ``quantize.run.jobs.Job``.

    Attributes:
        outputs: of keys and of values, float32.
        tensor_names: the two tensors that they are in the source, in any dtype of floats.
    """

    attention: str
    outputs: tuple[TensorInfo, ...]
    tensor_names: tuple[str, ...]
    nbytes: int

    modules: tuple[str, ...] = ()
    memory: int = 0

    @property
    def written(self) -> int:
        return sum(out.nbytes for out in self.outputs)

    def will_need(self, checkpoint: Checkpoint) -> None:
        """Does nothing: scales are too small to be worth it."""

    def scales(self, checkpoint: Checkpoint) -> list[torch.Tensor]:
        """What is written, of the outputs' shapes.

        Raises:
            DamagedWeightsError: if a scale is not positive and finite.
        """
        found = []
        for name, out in zip(self.tensor_names, self.outputs, strict=True):
            scale = checkpoint.load(name).float().reshape(out.shape)
            if not bool((torch.isfinite(scale) & (scale > 0)).all()):
                files = checkpoint.files_of([name])
                raise DamagedWeightsError(
                    f"{', '.join(sorted(files))}: {name} is {scale.flatten().tolist()}, no scale "
                    "that keys and values can have; the source is damaged, or was never "
                    "calibrated: --kv-cache auto leaves the scales out",
                    files,
                )
            found.append(scale)
        return found

    def run(self, worker: Worker, writer: ShardWriter) -> list[WeightError]:
        for out, scale in zip(self.outputs, self.scales(worker.checkpoint), strict=True):
            writer.write(out.name, worker.to_host(scale))
        return []


def carried_of(checkpoint: Checkpoint, layout: str) -> dict[str, CarryKvScales]:
    """The jobs that carry a source's scales over, by the name of the first tensor they read.

    Raises:
        QuantizeError: see ``StoredCache.pairs``.
    """
    cache = _cache(checkpoint)
    return {
        key.name: CarryKvScales(
            attention,
            _outputs(checkpoint, cache, attention, layout),
            (key.name, value.name),
            sum(info.nbytes for info in {key.name: key, value.name: value}.values()),
        )
        for attention, (key, value) in cache.pairs().items()
    }


def written_of(target: Checkpoint, layout: str) -> list[CarryKvScales]:
    """What must have written the scales of a target, where no source tells."""
    cache = _cache(target)
    jobs = []
    for attention in cache.scales:
        outputs = _outputs(target, cache, attention, layout)
        jobs.append(CarryKvScales(attention, outputs, tuple(out.name for out in outputs), 0))
    return jobs


def _cache(checkpoint: Checkpoint) -> StoredCache:
    return kv_cache_of(checkpoint.folder, checkpoint.config, checkpoint.stored)


def _outputs(
    checkpoint: Checkpoint, cache: StoredCache, attention: str, layout: str
) -> tuple[TensorInfo, ...]:
    latent = any(
        f"{attention}.{name}.{end}" in checkpoint.tensors
        for name in LATENT
        for end in ("weight", "weight_packed")
    )
    any_scale = next(iter(cache.scales[attention].values()))
    shape = any_scale.shape if cache.kind == FP8_HEAD else None
    return outputs_of(attention, layout, shape, latent)


def with_kv_cache(checkpoint: Checkpoint, options: Options) -> tuple[Options, tuple[str, ...]]:
    """The options with the cache decided, and what the user should know of that.

    What the user says wins over what the source says.
    """
    cache = _cache(checkpoint)
    if cache.key is None:
        asked = None if options.kv_cache == KV_AUTO else options.kv_cache
        return replace(options, kv_cache=asked), ()
    count = len(cache.scales)
    scales = f"scales of {count} attention{'s' * (count != 1)}" if count else "no scales"
    source = f"The source's key-value cache: {cache.key} is {cache.said}, with {scales}."
    if options.kv_cache == KV_AUTO:
        return replace(options, kv_cache=None), (f"{source} --kv-cache auto: left out.",)
    if options.kv_cache is not None:
        if options.kv_scales:
            return options, (f"{source} --kv-cache fp8: scales are found anew.",)
        if cache.kind == FP8:
            return replace(options, kv_carried=count > 0), ()
        return options, (f"{source} --kv-cache fp8: said instead, and engines take scales of 1.",)
    if cache.kind not in LAYOUTS[options.layout].kv_caches:
        return options, (
            f"Warning: {source} --layout {options.layout} cannot say that, so it is left out, and "
            "engines keep keys and values as they like; --kv-cache fp8 asks for FP8.",
        )
    decided = replace(options, kv_cache=cache.kind, kv_carried=count > 0)
    return decided, (f"{source} Carried over.",)
