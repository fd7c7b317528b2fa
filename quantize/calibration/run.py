"""Calibrating a plan's experts: walk through the model, stage what the quantizer makes of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantize.calibration.quantizer import Quantizer, staged_outputs
from quantize.calibration.staged import Staged
from quantize.calibration.store import Store
from quantize.calibration.stream import Stream
from quantize.calibration.walk import Walk, states_name
from quantize.checkpoint import Checkpoint, read_json
from quantize.errors import QuantizeError
from quantize.experts import ExpertGroup
from quantize.shards import sync, write_json

if TYPE_CHECKING:
    from quantize.plan import Plan

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
    staged = Staged(folder)
    undone = missing(plan, folder)
    if not undone:
        return
    dtype = precision(device)
    stream = Stream(checkpoint, plan.found, device, dtype, plan.options.trust_remote_code)
    store = Store(folder / "states")
    walk = Walk(checkpoint, plan.gates, stream, rows, store)
    quantizer = Quantizer(staged, undone, plan.layout, settings, plan.options.scales)
    last = max(stream.layer_of(group) for group in plan.groups)
    next_ = folder / "next.json"
    first = 0
    if next_.exists():
        found = read_json(next_)
        if found.get("dtype") != str(dtype):
            raise QuantizeError(
                f"{next_}: the run was begun in {found.get('dtype')} and this device computes in "
                f"{dtype}; go on where it was begun (--device), or start again with --overwrite"
            )
        states = store.names(states_name(found["layer"]))
        # Where something is damaged, all layers are run again; what is staged stays.
        reached = found["layer"] <= min(map(stream.layer_of, undone))
        if reached and states and all(map(store.is_whole, states)):
            first, stream.form = found["layer"], found["form"]
    store.keep(states_name(first))
    for layer in range(first, last + 1):
        progress(layer, last + 1)
        walk.layer(layer, quantizer, lambda share, n=layer: progress(n + share, last + 1))  # type: ignore[misc]
        for name in store.names(states_name(layer + 1)):
            sync(store.folder / name)
        write_json(next_, {"layer": layer + 1, "form": stream.form, "dtype": str(dtype)})
        walk.forget(layer)
    if undone := missing(plan, folder):
        raise QuantizeError(
            f"{undone[0].prefix}: text does not reach these experts in Transformers' model; leave "
            "them out with --exclude, or leave --calibrate out"
        )
    shutil.rmtree(store.folder)
    progress(last + 1, last + 1)


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
