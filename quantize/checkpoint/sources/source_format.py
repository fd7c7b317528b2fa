"""What a source format is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from quantize.checkpoint.sources.stored_weight import StoredWeight
from quantize.checkpoint.tensors import TensorInfo


class SourceFormat(Protocol):
    """One way in which published checkpoints are quantized.

    Attributes:
        name: its key in ``quantize.checkpoint.sources.FORMATS``.
        config_names: what configs call it, in lower case: as ``quant_method``, as ModelOpt's
            ``quant_algo``, as compressed-tensors' ``format`` or as Quark's ``dtype``.
    """

    name: str
    config_names: frozenset[str]

    def find(self, stored: Mapping[str, TensorInfo], config: dict[str, Any]) -> list[StoredWeight]:
        """All weights in this format.

        Args:
            stored: every tensor in the checkpoint's files, by name.
            config: its ``config.json``.

        Raises:
            QuantizeError: naming the tensor, if one has the wrong shape or dtype.
        """

    def complaint(self, info: TensorInfo) -> str | None:
        """What is wrong with a tensor that is no part of a weight which :meth:`find` has found.

        None if the tensor means something by itself, as far as this format knows.
        """
