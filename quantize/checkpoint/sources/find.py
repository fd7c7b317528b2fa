"""Finding the weights of a checkpoint that are stored in one of ``FORMATS``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quantize.checkpoint.sources import FORMATS
from quantize.checkpoint.sources.stored_weight import StoredWeight
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError


def find_stored_weights(
    stored: Mapping[str, TensorInfo], config: dict[str, Any]
) -> dict[str, StoredWeight]:
    """All weights of a checkpoint that are stored in one of ``FORMATS``, by name.

    Args:
        stored: every tensor in the checkpoint's files, by name.
        config: the contents of its ``config.json``.

    Raises:
        QuantizeError: if a tensor has the wrong shape or dtype, if codes lack their scale or a
            scale its codes, or if a weight is stored twice; the message names the tensor.
    """
    found = [weight for fmt in FORMATS.values() for weight in fmt.find(stored, config)]
    _check_complete(stored, found)
    return {weight.name: weight for weight in found}


def _check_complete(stored: Mapping[str, TensorInfo], weights: Iterable[StoredWeight]) -> None:
    """Raise QuantizeError if a tensor belongs to two weights, or to none though it must.

    Codes and scales mean nothing alone, so they must belong to a weight.
    """
    parts: set[str] = set()
    for weight in weights:
        twice = weight.name in stored and weight.name not in weight.parts
        if twice or not parts.isdisjoint(weight.parts):
            raise QuantizeError(
                f"{' and '.join(weight.parts)} are {weight.name}, of which there is another"
            )
        parts.update(weight.parts)
    formats = list(FORMATS.values())
    for name, info in stored.items():
        if name in parts:
            continue
        for fmt in formats:
            if complaint := fmt.complaint(info):
                raise QuantizeError(f"{info.file.name}: {name} {complaint}")
