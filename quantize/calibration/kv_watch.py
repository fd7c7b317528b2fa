"""Watching keys and values while a model runs: their largest magnitudes give an FP8 cache's scales.

Transformers' attention classes hand queries, keys and values, after norms and rotation, to a
function that ``ALL_ATTENTION_FUNCTIONS`` has by name. So it is there that they are what a cache
holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from quantize.calibration.layerwise import LayerwiseModel
from quantize.errors import QuantizeError
from quantize.run.kv_scales import KEY, KvRanges


@contextmanager
def watching(model: LayerwiseModel, attentions: list[str], ranges: KvRanges) -> Iterator[None]:
    """Within the context, ``ranges`` learn what the model's attention is given.

    Args:
        attentions: their module paths in the checkpoint.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    paths: dict[int, str] = {}
    for attention in attentions:
        path = model.loader.parameter_of(f"{attention}.{KEY}.weight").rpartition(f".{KEY}.")[0]
        try:
            paths[id(model.model.get_submodule(path))] = attention
        except AttributeError:
            continue  # a layer that Transformers' model does not have
    largest: dict[str, tuple[float, float]] = {}
    name = "sdpa"
    plain = ALL_ATTENTION_FUNCTIONS[name]

    def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        attention = paths.get(id(module))
        if attention is not None:
            found = tuple(_largest(x, attention) for x in (key, value))
            before = largest.get(attention, (0.0, 0.0))
            now = max(found[0], before[0]), max(found[1], before[1])
            if now != before:
                largest[attention] = now
                ranges.write(attention, *now)
        return plain(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = plain


def _largest(x: torch.Tensor, attention: str) -> float:
    found = float(x.detach().abs().amax())
    if found != found or found == float("inf"):
        raise QuantizeError(
            f"{attention}: its keys or values are NaN or infinite; the source is damaged"
        )
    return found
