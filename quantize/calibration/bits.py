"""``--bits``: measuring what each layer loses in each format, and planning with what is chosen.

Both come before the run, whose plan must have every layer's format. What was measured lies in the
record's folder until the run is over, so that it is not measured again when the run is resumed.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from rich.filesize import decimal

from quantize.calibration.backward import LayerwiseBackward
from quantize.calibration.budget import needed
from quantize.calibration.calibrate import forward_backward, runnable_model
from quantize.calibration.estimate import check_memory
from quantize.calibration.layer_loss import LossGatherer, StoredLosses
from quantize.calibration.layerwise import LayerwiseModel
from quantize.calibration.progress import PROGRESS, CalibrationProgress, Progress
from quantize.calibration.proof import Say, prove
from quantize.calibration.store import Store
from quantize.checkpoint.json_files import read_json
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.experts.names import layer_number
from quantize.run.bits import (
    MEASURED,
    NVFP4,
    Choice,
    by_layer,
    check_bits,
    choose,
    formats_of,
)
from quantize.run.files import write_json
from quantize.run.lock import locked
from quantize.run.made import made
from quantize.run.options import Options
from quantize.run.plan import Plan
from quantize.run.plan import plan as plan_of
from quantize.run.target import CONFIG, FOLDER
from quantize.run.work_dir import WorkDir

_KEY = "of.json"
"""What the losses in a folder are of."""

_WITH_GRADIENTS = "two-sided"
"""A rounding whose passes are those of measuring."""


def within_bits(
    checkpoint: Checkpoint,
    plan: Plan,
    options: Options,
    samples: torch.Tensor,
    target: Path,
    device: torch.device,
    *,
    resume: bool = False,
    work_dir: Path | None = None,
    limited: bool = True,
    progress: Progress = lambda *_: None,
    say: Say = lambda _: None,
) -> Plan:
    """Plan with the formats that lose least within ``options.bits``.

    Args:
        plan: with all experts in NVFP4, and with the run's calibration.
        options: that it was made by.
        samples: tokens, int64 ``[num_samples, sequence_length]``.
        target: of the run.
        resume: a checkpoint that is there already may be what the run would make.
        work_dir: where hidden states are; by default in ``target``.
        limited: refuse what needs more memory than there is.
        say: is told what was chosen.

    Raises:
        QuantizeError: if no format fits (``quantize.run.bits.check_bits``), the model cannot be run
            forward and backward, weights or states are damaged, or another run is at work there.
    """
    assert options.bits is not None
    check_bits(options.bits)
    if resume and (finished := _finished(target, options.bits)) is not None:
        return _planned(checkpoint, plan, options, finished)
    layers = by_layer(plan.groups)
    kept = StoredLosses(target / FOLDER / MEASURED)
    key = {"of": plan.fingerprint(checkpoint)}
    with locked(target / FOLDER):
        if not (kept.folder / _KEY).exists() or read_json(kept.folder / _KEY) != key:
            shutil.rmtree(kept.folder, ignore_errors=True)
            kept.folder.mkdir(parents=True)
            write_json(kept.folder / _KEY, key)
        if undone := [group for group in plan.groups if not kept.is_done(group)]:
            own = WorkDir(work_dir, target) if work_dir else None
            if own is not None:
                own.make()
            folder = own.folder / MEASURED if own else kept.folder
            what = checkpoint, plan, samples, kept, undone, folder, device
            _measure(*what, limited, progress, say)
    losses: dict[str, dict[str, float]] = {prefix: defaultdict(float) for prefix in layers}
    for group in plan.groups:
        for name, loss in kept.of(group).items():
            losses[group.prefix][name] += loss
    weights = {prefix: sum(g.parameters for g in groups) for prefix, groups in layers.items()}
    choice = choose(weights, losses, options.bits)
    say(summary(choice))
    others = {prefix: name for prefix, name in choice.formats.items() if name != NVFP4}
    return replace(_planned(checkpoint, plan, options, others), choice=choice)


def summary(choice: Choice) -> str:
    """What was chosen, in a line."""
    layers: dict[str, list[str]] = defaultdict(list)
    for prefix, name in choice.formats.items():
        number = layer_number(prefix)
        layers[name].append(prefix if number is None else str(number))
    counts = [f"{len(layers.pop(NVFP4))} layers nvfp4"]
    counts += [f"{name} {', '.join(numbers)}" for name, numbers in sorted(layers.items())]
    all_nvfp4 = sum(losses[NVFP4] for losses in choice.losses.values())
    return (
        f"--bits {choice.bits:g}: {'; '.join(counts)}. {choice.taken:.3f} bits a weight. Loss by "
        f"rounding to nearest about {choice.loss:.3g} nats a token, {all_nvfp4:.3g} all in NVFP4"
    )


def _planned(checkpoint: Checkpoint, plan: Plan, options: Options, formats: dict[str, str]) -> Plan:
    chosen = plan_of(checkpoint, replace(options, formats=tuple(formats.items())), plan.gates)
    used = plan.options.calibration
    return replace(chosen, options=replace(chosen.options, calibration=used))


def _finished(target: Path, bits: float) -> dict[str, str] | None:
    """The formats of a finished checkpoint for as many bits; None if there is none."""
    file = target / CONFIG
    if not file.exists() or (target / FOLDER / "run.json").exists():
        return None
    said = made(read_json(file), str(file))
    return said.formats if said is not None and said.bits == bits else None


def _measure(
    checkpoint: Checkpoint,
    plan: Plan,
    samples: torch.Tensor,
    kept: StoredLosses,
    undone: list[ExpertGroup],
    folder: Path,
    device: torch.device,
    limited: bool,
    progress: Progress,
    say: Say,
) -> None:
    """Measure the losses of some groups; what an earlier run has left in ``folder`` is used."""
    used = plan.options.calibration
    assert used is not None
    options = replace(plan.options, calibration=replace(used, method=_WITH_GRADIENTS))
    plan = replace(plan, options=options)
    needs = needed(checkpoint, plan, device)
    say(f"Measuring layers' losses for --bits: {needs}")
    if limited:
        check_memory(needs.memory, device)
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if (free := shutil.disk_usage(folder).free + there) < needs.states:
        raise QuantizeError(
            f"{folder}: {decimal(free)} free, and measuring layers' losses needs "
            f"{decimal(needs.states)} for hidden states; give another disk with --work-dir"
        )
    model: LayerwiseModel = runnable_model(checkpoint, plan, device)
    if not (folder / PROGRESS).exists():
        prove(checkpoint, plan, samples, folder / "proof", device, say)
    store = Store(folder / "states")
    run = LayerwiseBackward(checkpoint, plan.gates, model, samples, store)
    layers = by_layer(plan.groups)
    visitor = LossGatherer(
        checkpoint,
        kept,
        {prefix: formats_of(groups) for prefix, groups in layers.items()},
        undone,
        plan.options.scales,
        used.input_scale_rule if plan.layout is not plan.layout.weights_only else None,
    )
    state = CalibrationProgress(plan, model, store, undone, progress)
    forward_backward(run, visitor, state)
    shutil.rmtree(store.folder)
    (folder / PROGRESS).unlink(missing_ok=True)
    if lacking := [group for group in undone if not kept.is_done(group)]:
        raise QuantizeError(
            f"{lacking[0].prefix}: text does not reach these experts in Transformers' model; leave "
            "them out with --exclude, or leave --bits out"
        )
    state.finish()
