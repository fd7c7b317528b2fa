"""Opening a checkpoint, wherever it is, without downloading its weights."""

from __future__ import annotations

from pathlib import Path

from quantize.checkpoint.coming import Shown, not_shown
from quantize.checkpoint.headers import find_files
from quantize.checkpoint.hub import HubModel, asking
from quantize.checkpoint.hub_weights import HubWeights
from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.streamed import Streamed
from quantize.checkpoint.weights import Weights
from quantize.errors import QuantizeError


def opened(
    found: Path | HubModel,
    *,
    code: bool = False,
    whole: bool = False,
    stream: bool = False,
) -> Checkpoint:
    """The checkpoint ``found``, for whatever its headers tell.

    Of a model on the hub whose weights are not in the cache, its config and the headers of its
    weights are read, and ``weights.here`` is False; see :func:`bring`.

    Args:
        found: what ``look_up`` has found.
        code: its Python modules are read too.
        whole: so is all else that belongs to it beside the weights.
        stream: its weights will be ``Streamed``, whatever the cache has.

    Raises:
        QuantizeError: see ``Checkpoint``; also if the hub fails.
    """
    if isinstance(found, Path):
        if stream:
            raise QuantizeError(f"--stream: {found} is on this machine; leave --stream out")
        return Checkpoint(found)
    with asking(found.name):
        folder = found.companions() if whole else found.described(code)
    names = [file.name for file in find_files(folder, found.candidates, found.title)]
    if stream:
        return Checkpoint(folder, weights=Streamed(found, names))
    if not found.missing(names):
        return Checkpoint(folder)
    return Checkpoint(folder, weights=HubWeights(found, names))


def to_bring(checkpoint: Checkpoint) -> int:
    """How many bytes :func:`bring` would download."""
    weights = checkpoint.weights
    if not isinstance(weights, HubWeights) or isinstance(weights, Streamed):
        return 0
    return sum(weights.model.files[name].size for name in weights.model.missing(weights.names))


def bring(checkpoint: Checkpoint, shown: Shown = not_shown) -> None:
    """Download the weights of a checkpoint that :func:`opened` has, unless they are here.

    Args:
        shown: shows how much has come.

    Raises:
        QuantizeError: if that fails.
    """
    weights = checkpoint.weights
    if isinstance(weights, HubWeights) and not isinstance(weights, Streamed):
        weights.model.bring(sorted(weights.names), shown)
        checkpoint.weights = Weights()
