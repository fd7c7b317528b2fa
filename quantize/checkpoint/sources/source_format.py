"""The interface of a source format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from quantize.checkpoint.sources.stored_weight import StoredWeight
from quantize.checkpoint.tensors import TensorInfo


class SourceFormat(Protocol):
    """One quantized format in which checkpoints are published.

    Attributes:
        name: its key in ``quantize.checkpoint.sources.FORMATS``.
        config_names: the names that configs have for it, in lower case. They occur as
            ``quant_method``, as ModelOpt's ``quant_algo``, as compressed-tensors' ``format`` or as
            Quark's ``dtype``.
    """

    name: str
    config_names: frozenset[str]

    def find(self, stored: Mapping[str, TensorInfo], config: dict[str, Any]) -> list[StoredWeight]:
        """All weights in this format.

        Args:
            stored: every tensor in the checkpoint's files, by name.
            config: the contents of its ``config.json``.

        Raises:
            QuantizeError: if a tensor has the wrong shape or dtype; the message names it.
        """

    def complaint(self, info: TensorInfo) -> str | None:
        """The complaint about a tensor that belongs to no weight in any format; None if it is fine.

        Codes without a scale, for example, cannot be read. The complaint completes a sentence that
        begins with the tensor's name.
        """
