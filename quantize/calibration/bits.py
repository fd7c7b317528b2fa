"""``--bits``: measuring what each layer loses in each format, and planning with what is chosen.

Both come before the run, whose plan must have every layer's format. What was measured lies in the
record's folder until the run is over, so that it is not measured again when the run is resumed.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from rich.filesize import decimal

from quantize.calibration.backward import LayerwiseBackward
from quantize.calibration.budget import needed
from quantize.calibration.calibrate import forward_backward, runnable_model
from quantize.calibration.estimate import Estimate, check, check_memory, estimate
from quantize.calibration.layer_loss import LossGatherer, StoredLosses
from quantize.calibration.progress import PROGRESS, CalibrationProgress, Progress
from quantize.calibration.proof import Say, prove
from quantize.calibration.store import Store
from quantize.checkpoint.json_files import read_json
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.experts.names import layer_number
from quantize.run.bits import (
    LEAST,
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
from quantize.run.space import free
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
    counting: bool = False,
    devices: int = 1,
    dry: bool = False,
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
        limited: refuse what takes too long, calibration included, or more memory than there is.
        counting, devices: of the calibration, see ``quantize.calibration.estimate.estimate``.
        dry: measure nothing, and write nothing: without losses that are measured already, the plan
            is the given one.
        say: is told what it will take, and what was chosen.

    Raises:
        TooMuchError: if it takes too much (``limited``).
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
    with nullcontext() if dry else locked(target / FOLDER):
        begun = (kept.folder / _KEY).exists() and read_json(kept.folder / _KEY) == key
        if not begun and not dry:
            shutil.rmtree(kept.folder, ignore_errors=True)
            kept.folder.mkdir(parents=True)
            write_json(kept.folder / _KEY, key)
        if undone := [group for group in plan.groups if not (begun and kept.is_done(group))]:
            own = WorkDir(work_dir, target) if work_dir else None
            folder = own.folder / MEASURED if own else kept.folder
            measuring = _Measuring(checkpoint, plan, kept, undone, folder, device)
            first = measuring.foresee(limited, say)
            then = estimate(checkpoint, plan, plan.groups, device, counting, devices)
            say(f"Measuring layers' losses for --bits: {first}; then calibration: {then}")
            if limited:
                check(then, first)
            if dry:
                say(_not_known(plan, options.bits))
                return plan
            if own is not None:
                own.make()
            measuring.run(samples, progress, say)
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


def _not_known(plan: Plan, bits: float) -> str:
    """What can be said without losses."""
    weights = sum(group.parameters for group in plan.groups)
    more = int(weights * (bits - LEAST) / 8)
    return (
        f"--bits {bits:g}: layers' formats are known once their losses are measured. With all "
        f"experts in NVFP4 the tensors are {decimal(plan.nbytes)}, and within the budget at most "
        f"{decimal(plan.nbytes + more)}"
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


class _Measuring:
    """Measuring the losses of some groups, ``undone``; what an earlier run has left in ``folder``
    is used.

    Raises:
        QuantizeError: if the model cannot be run forward and backward.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        kept: StoredLosses,
        undone: list[ExpertGroup],
        folder: Path,
        device: torch.device,
    ) -> None:
        used = plan.options.calibration
        assert used is not None
        options = replace(plan.options, calibration=replace(used, method=_WITH_GRADIENTS))
        self._plan = replace(plan, options=options)
        self._checkpoint = checkpoint
        self._kept = kept
        self._undone = undone
        self._folder = folder
        self._device = device
        self._inputs = (
            used.input_scale_rule if plan.layout is not plan.layout.weights_only else None
        )
        self._model = runnable_model(checkpoint, self._plan, device)

    def foresee(self, limited: bool, say: Say) -> Estimate:
        """Say what it needs, and refuse it if there is less; returns how long it takes."""
        plan, folder, device = self._plan, self._folder, self._device
        needs = needed(self._checkpoint, plan, device)
        say(f"Measuring layers' losses for --bits: {needs}")
        if limited:
            check_memory(needs.memory, device)
        there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if (left := free(folder) + there) < needs.states:
            raise QuantizeError(
                f"{folder}: {decimal(left)} free, and measuring layers' losses needs "
                f"{decimal(needs.states)} for hidden states; give another disk with --work-dir"
            )
        return estimate(
            self._checkpoint, plan, self._undone, device, look=lambda group: self._visitor([group])
        )

    def run(self, samples: torch.Tensor, progress: Progress, say: Say) -> None:
        """Measure them."""
        checkpoint, plan, folder, kept = self._checkpoint, self._plan, self._folder, self._kept
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PROGRESS).exists():
            prove(checkpoint, plan, samples, folder / "proof", self._device, say)
        store = Store(folder / "states")
        run = LayerwiseBackward(checkpoint, plan.gates, self._model, samples, store)
        state = CalibrationProgress(plan, self._model, store, self._undone, progress)
        forward_backward(run, self._visitor(self._undone), state)
        shutil.rmtree(store.folder)
        (folder / PROGRESS).unlink(missing_ok=True)
        if lacking := [group for group in self._undone if not kept.is_done(group)]:
            raise QuantizeError(
                f"{lacking[0].prefix}: text does not reach these experts in Transformers' model; "
                "leave them out with --exclude, or leave --bits out"
            )
        state.finish()

    def _visitor(self, groups: list[ExpertGroup]) -> LossGatherer:
        layers = by_layer(self._plan.groups)
        return LossGatherer(
            self._checkpoint,
            self._kept,
            {prefix: formats_of(of_layer) for prefix, of_layer in layers.items()},
            groups,
            self._plan.options.scales,
            self._inputs,
        )
