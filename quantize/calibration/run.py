"""Calibrating a plan's experts: walk through the model, stage what the quantizer makes of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantize.calibration.backward import Backward
from quantize.calibration.quantizer import Quantizer, staged_outputs
from quantize.calibration.store import Store
from quantize.calibration.stream import Stream
from quantize.calibration.walk import Nobody, Walk, gradients_name, states_name
from quantize.checkpoint.json_files import read_json
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.nvfp4.rounding import METHODS
from quantize.run.files import sync, write_json
from quantize.run.staged import Staged

if TYPE_CHECKING:
    from quantize.run.plan import Plan

Progress = Callable[[float, int], None]
"""Told how many layers are done, parts included, and how many there are."""


def calibrate(
    checkpoint: Checkpoint,
    plan: Plan,
    rows: torch.Tensor,
    folder: Path,
    device: torch.device,
    progress: Progress = lambda _, __: None,
) -> None:
    """Quantize all experts of ``plan`` with calibration, into ``folder``.

    A run that was interrupted goes on with the layer it was at.

    Args:
        rows: tokens, int64 ``[rows, length]``.

    Raises:
        QuantizeError: if the model cannot be run (see ``quantize.calibration.stream``), a weight is
            NaN or infinite, or the disk is full.
    """
    settings = plan.options.calibration
    assert settings is not None
    undone = missing(plan, folder)
    if not undone:
        shutil.rmtree(folder / "states", ignore_errors=True)
        return
    dtype = precision(device)
    stream = Stream(checkpoint, plan.found, device, dtype, plan.options.trust_remote_code)
    store = Store(folder / "states")
    quantizer = Quantizer(Staged(folder), undone, plan.layout, settings, plan.options.scales)
    journey = Journey(plan, stream, store, dtype, undone, progress)
    if METHODS[settings.method].needs_output:
        there_and_back(Backward(checkpoint, plan.gates, stream, rows, store), quantizer, journey)
    else:
        there(Walk(checkpoint, plan.gates, stream, rows, store), quantizer, journey)
    if undone := missing(plan, folder):
        raise QuantizeError(
            f"{undone[0].prefix}: text does not reach these experts in Transformers' model; leave "
            "them out with --exclude, or leave --calibrate out"
        )
    shutil.rmtree(store.folder)
    progress(journey.stops, journey.stops)


class Journey:
    """How far a run is, in a file, so that another can go on with it.

    Attributes:
        first, last: the layers that have experts to be quantized, from and to.
        undone: those of them that are not staged yet.
        stops: how many layers are run, those run back counted again, and the model's end.
        at: how many of them are done.
    """

    def __init__(
        self,
        plan: Plan,
        stream: Stream,
        store: Store,
        dtype: torch.dtype,
        undone: list[ExpertGroup],
        progress: Progress,
    ) -> None:
        self._file = store.folder.parent / "next.json"
        self._stream, self._store, self._dtype = stream, store, dtype
        self._progress = progress
        layers = [stream.layer_of(group) for group in plan.groups]
        self.first, self.last = min(layers), max(layers)
        self.undone = [stream.layer_of(group) for group in undone]
        self.stops = self.at = 0

    def begin(self, stops: int, needed: Callable[[int], list[str]], limit: int) -> None:
        """Go on where an earlier run stopped, if what it left is whole.

        Args:
            needed: of the store's tensors, the beginnings of those that the rest of the run needs,
                by the number of stops that are done.
            limit: of stops that may be skipped: after them there is something to be done.

        Raises:
            QuantizeError: if that run computed in another precision.
        """
        self.stops = stops
        if self._file.exists():
            found = read_json(self._file)
            if found.get("dtype") != str(self._dtype):
                raise QuantizeError(
                    f"{self._file}: the run was begun in {found.get('dtype')} and this device "
                    f"computes in {self._dtype}; go on where it was begun (--device), or start "
                    "again with --overwrite"
                )
            at, forms = found.get("at", 0), found.get("forms")
            # Where something is damaged, all layers are run again; what is staged stays.
            if at <= limit and found.get("stops") == stops and forms is not None:
                names = [self._store.names(prefix) for prefix in needed(at)]
                if all(names) and all(
                    self._store.is_whole(name) for part in names for name in part
                ):
                    self.at = at
                    self._stream.forms = {int(layer): form for layer, form in forms.items()}
        self._store.keep(needed(self.at) if self.at else [])

    def told(self, share: float) -> None:
        """Of the stop that is being made."""
        self._progress(self.at + share, self.stops)

    def arrive(self, written: str) -> None:
        """One more stop is done, and has written the tensors that begin with ``written``."""
        for name in self._store.names(written):
            sync(self._store.folder / name)
        self.at += 1
        forms = {str(layer): form for layer, form in self._stream.forms.items()}
        write_json(
            self._file,
            {"at": self.at, "stops": self.stops, "forms": forms, "dtype": str(self._dtype)},
        )


def there(walk: Walk, quantizer: Quantizer, journey: Journey) -> None:
    """Through the model once; experts are quantized as they come."""
    # A stop is done, and the next begins, with what the next layer is given.
    journey.begin(journey.last + 1, lambda at: [states_name(at)], min(journey.undone))
    for layer in range(journey.at, journey.last + 1):
        journey.told(0)
        walk.layer(layer, quantizer, journey.told)
        journey.arrive(states_name(layer + 1))
        walk.forget(layer)


def there_and_back(walk: Backward, quantizer: Quantizer, journey: Journey) -> None:
    """Through the model without quantizing, then back from its end: experts are quantized as they
    come then, since what matters at their output is known only from there."""
    walk.check()
    ahead = walk.last + 1

    def needed(at: int) -> list[str]:
        # The first layer is given the text.
        if at <= ahead:
            layers = {*range(journey.first, at), at} - {0}
            return [states_name(layer) for layer in sorted(layers)]
        layer = ahead - (at - ahead - 1)  # the gradients by what it is given are known
        states = [states_name(n) for n in range(max(1, journey.first), layer)]
        return [*states, gradients_name(layer)]

    stops = ahead + 1 + (ahead - journey.first)
    # A layer is left once the one before it is.
    limit = ahead + 1 + (walk.last - max(journey.undone))
    journey.begin(stops, needed, limit)
    for layer in range(journey.at, ahead):
        journey.told(0)
        walk.layer(layer, Nobody(), journey.told)
        journey.arrive(states_name(layer + 1))
        if layer < journey.first:
            walk.forget(layer)
    if journey.at == ahead:
        journey.told(0)
        walk.end(journey.told)
        journey.arrive(gradients_name(ahead))
    for layer in reversed(range(journey.first, ahead - (journey.at - ahead - 1))):
        journey.told(0)
        walk.back(layer, quantizer, layer > journey.first, journey.told)
        journey.arrive(gradients_name(layer))
        walk.forget(layer + 1)
        walk.forget_gradients(layer + 1)


def precision(device: torch.device) -> torch.dtype:
    """What a model is run in."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def missing(plan: Plan, folder: Path) -> list[ExpertGroup]:
    """The groups that are still to be staged."""
    staged = Staged(folder)
    return [
        group
        for group in plan.groups
        if not staged.is_done(group, list(staged_outputs(group, plan.layout)))
    ]


def staged_bytes(plan: Plan) -> int:
    """What is in the folder in the end."""
    return sum(out.nbytes for group in plan.groups for out in staged_outputs(group, plan.layout))
