"""The scales of the target's FP8 key-value cache: are they there, positive, and as reported?"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.layouts.layout import Layout
from quantize.run.kv_scales import KvScales
from quantize.run.report_files import REPORT_DATA
from quantize.verify.claims import Claims
from quantize.verify.stored import misfits, place_of


def kv_scales_of(attentions: list[str], layout: Layout, claims: Claims) -> list[KvScales]:
    """What the target must have for these attentions, if it says that it has any scales."""
    if claims.made is None or not claims.made.kv_scales:
        return []
    return [KvScales(attention, layout.name) for attention in attentions]


def kv_problems(target: Checkpoint, wanted: list[KvScales], claims: Claims) -> Iterator[str]:
    """What is wrong with the scales."""
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
        for number, out in enumerate(job.outputs):
            scale = float(target.load(out.name))
            where = f"{place_of(target, out.name)} is {scale:.6g}"
            if not 0 < scale < 1e6:
                yield f"{where}, no scale that keys and values can have; quantize again"
            elif said is not None and job.attention in said:
                truth = float(torch.tensor(said[job.attention][number], dtype=torch.float32))
                if scale != truth:
                    yield f"{where}, but the report says {truth:.6g}; quantize again"
