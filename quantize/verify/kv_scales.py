"""The scales of the target's key-value cache: are they there, positive, as reported, as before?"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantize.checkpoint.kv_cache import kv_cache_of
from quantize.checkpoint.reader import Checkpoint
from quantize.layouts.layout import Layout
from quantize.run.kv_carried import CarryKvScales, carried_of, written_of
from quantize.run.kv_scales import KvScales, attentions
from quantize.run.report_files import REPORT_DATA
from quantize.verify.claims import CONFIG, Claims
from quantize.verify.stored import misfits, place_of

Job = KvScales | CarryKvScales


def kv_scales_of(
    source: Checkpoint | None, target: Checkpoint, layout: Layout, claims: Claims
) -> list[Job]:
    """What the target must have, if it says that it has any scales.

    Args:
        source: None if it is not at hand.

    Raises:
        QuantizeError: if the source has scales that cannot be carried over.
    """
    made = claims.made
    if made is not None and made.kv_carried:
        if source is None or claims.foreign:
            return [*written_of(target, layout.name)]
        return [*carried_of(source, layout.name).values()]
    if made is not None and made.kv_scales:
        names = attentions((source or target).tensors, (source or target).config)
        return [KvScales(attention, layout.name) for attention in names]
    return []


def kv_problems(
    target: Checkpoint, wanted: list[Job], claims: Claims, source: Checkpoint | None = None
) -> Iterator[str]:
    """What is wrong with the scales.

    Args:
        source: where those are from that are carried over; None: not at hand.
    """
    said = claims.run.kv_scales if claims.run else None
    if said is not None and said.keys() != {job.attention for job in wanted}:
        yield (
            f"{REPORT_DATA}: kv_scales are of other keys and values than the checkpoint's; "
            "quantize again"
        )
    for job in wanted:
        if wrong := list(misfits(target, job.outputs)):
            yield from wrong
            continue
        originals = None
        if source is not None and isinstance(job, CarryKvScales):
            originals = job.scales(source)
        reported = list(said[job.attention]) if said is not None and job.attention in said else None
        for number, out in enumerate(job.outputs):
            scale = target.load(out.name).flatten()
            shown = ", ".join(f"{x:.6g}" for x in scale.tolist()[:8])
            where = f"{place_of(target, out.name)} is {shown}"
            if not bool(((scale > 0) & (scale < 1e6)).all()):
                yield f"{where}, no scale that keys and values can have; quantize again"
                continue
            if originals is not None and not torch.equal(originals[number].flatten(), scale):
                truth = originals[number].flatten()
                yield f"{where}, but the source has {truth.tolist()[:8]}; quantize again"
            elif reported is not None:
                start = number * len(scale)
                truth = torch.tensor(reported[start : start + len(scale)], dtype=torch.float32)
                if not torch.equal(truth, scale):
                    yield f"{where}, but the report says {truth.tolist()[:8]}; quantize again"


def kv_notes(source: Checkpoint, claims: Claims) -> Iterator[str]:
    """What the user should know of a cache that the source describes and the target does not."""
    cache = kv_cache_of(source.folder, source.config, source.stored)
    if cache.key and claims.made is not None and claims.made.kv_cache is None:
        yield (
            f"the source asks engines to keep keys and values quantized ({cache.key} is "
            f"{cache.said}), and {CONFIG} of the target does not: --kv-cache auto, or a layout or "
            "a version that cannot say it"
        )
