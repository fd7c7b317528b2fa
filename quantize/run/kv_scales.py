"""The scales of an FP8 key-value cache: which attention has them, what was found, the job.

Engines store ``key / k_scale`` and ``value / v_scale`` in E4M3. vLLM 0.32 reads the scales under
ModelOpt's names, ``self_attn.k_proj.k_scale`` and ``v_proj.v_scale``, and compressed-tensors',
``self_attn.k_scale`` and ``v_scale`` (``QuantizationConfig.get_cache_scale_mapper``). Latent
attention keeps something else than keys and values; it has no ``k_proj``, and so nothing is found
for it here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.experts.drafting import is_drafting
from quantize.experts.names import layer_number, natural_order
from quantize.experts.parts import other_part
from quantize.run.files import write_json
from quantize.run.shards import ShardWriter
from quantize.run.weight_error import WeightError
from quantize.run.worker import Worker

KEY, VALUE = "k_proj", "v_proj"
_BELOW_LINEARS = ("self_attn", "mixer")
"""What attention must be called for ModelOpt's names of scales to be read."""


def attentions(names: Iterable[str], config: dict[str, Any]) -> list[str]:
    """Module paths of the decoder's attention with keys and values of its own, from the names of a
    checkpoint's tensors and its ``config.json``."""
    every = set(names)
    return [
        attention
        for name in sorted(every, key=natural_order)
        if name.endswith(f".{VALUE}.weight")
        and layer_number(name) is not None
        and not is_drafting(name, config)
        and not other_part(name, config)
        and f"{(attention := name.removesuffix(f'.{VALUE}.weight'))}.{KEY}.weight" in every
    ]


class KvRanges:
    """The largest keys and values that a pass over text has found, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, attention: str, key: float, value: float) -> None:
        """Keep the largest magnitudes of one attention's keys and values."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._file(attention), {"attention": attention, "largest": [key, value]})

    def scales(self, attention: str) -> tuple[float, float]:
        """``k_scale`` and ``v_scale``: twice the largest over 448, for the same reason as an input
        scale's ``HEADROOM``; 1.0 where nothing was found."""
        try:
            found = json.loads(self._file(attention).read_text(encoding="utf-8"))["largest"]
            key, value = (2 * float(largest) / 448 for largest in found)
        except (OSError, ValueError, TypeError, LookupError):
            return 1.0, 1.0
        return tuple(x if math.isfinite(x) and x > 0 else 1.0 for x in (key, value))  # type: ignore[return-value]

    def _file(self, attention: str) -> Path:
        return self.folder / f"{hashlib.sha256(attention.encode()).hexdigest()[:24]}.kv.json"


def outputs_of(
    attention: str, layout: str, shape: tuple[int, ...] | None = None, latent: bool = False
) -> tuple[TensorInfo, ...]:
    """The tensors of an attention's scales, under names that vLLM reads, float32.

    Args:
        attention: its module path.
        layout: a key of ``quantize.layouts.LAYOUTS``.
        shape: of each; None: one number, as the layout has it.
        latent: its cache holds a latent: only ModelOpt has names for that.
    """
    modelopt = layout == "modelopt"
    below = attention.rpartition(".")[2] in _BELOW_LINEARS
    keys, values = (f"{KEY}.", f"{VALUE}.") if below and (modelopt or latent) else ("", "")
    dims = (() if modelopt else (1,)) if shape is None else shape
    names = (f"{attention}.{keys}k_scale", f"{attention}.{values}v_scale")
    return tuple(TensorInfo(name, "F32", dims) for name in names)


@dataclass(frozen=True)
class KvScales:
    """Writes the scales of one attention; see ``quantize.run.jobs.Job``.

    Attributes:
        attention: its module path.
        layout: a key of ``quantize.layouts.LAYOUTS``.
        scales: of keys and of values.
    """

    attention: str
    layout: str
    scales: tuple[float, float] = (1.0, 1.0)

    tensor_names: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    nbytes: int = 0
    memory: int = 0

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return outputs_of(self.attention, self.layout)

    @property
    def written(self) -> int:
        return 8

    def will_need(self, checkpoint: Checkpoint) -> None:
        """Does nothing: the job reads no tensor of the source."""

    def run(self, worker: Worker, writer: ShardWriter) -> list[WeightError]:
        for out, scale in zip(self.outputs, self.scales, strict=True):
            writer.write(out.name, worker.to_host(torch.tensor(scale, dtype=torch.float32)))
        return []
