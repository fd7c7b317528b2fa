"""``--bits`` and ``--weight-only N``: measuring what each layer loses in each format, and planning
with what is chosen.

Both come before the run, whose plan must have every layer's format. What was measured lies in the
record's folder until the run is over, so that it is not measured again when the run is resumed.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from quantize.calibration.backward import LayerwiseBackward
from quantize.calibration.budget import needed
from quantize.calibration.calibrate import forward_backward, runnable_model
from quantize.calibration.estimate import Estimate, check, check_memory, estimate
from quantize.calibration.layer_loss import LossGatherer, StoredLosses
from quantize.calibration.progress import PROGRESS, CalibrationProgress, Progress
from quantize.calibration.proof import Say, prove
from quantize.calibration.step_times import by_time
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
    WEIGHTS,
    Choice,
    Losses,
    by_layer,
    check_bits,
    check_count,
    choose,
    formats_of,
    most_by_inputs,
)
from quantize.run.files import write_json
from quantize.run.lock import locked
from quantize.run.made import made
from quantize.run.options import Options
from quantize.run.plan import Plan
from quantize.run.plan import plan as plan_of
from quantize.run.readers import unreadable
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
    weight_only: int | None = None,
    resume: bool = False,
    work_dir: Path | None = None,
    limited: bool = True,
    counting: bool = False,
    devices: int = 1,
    dry: bool = False,
    progress: Progress = lambda *_: None,
    say: Say = lambda _: None,
) -> Plan:
    """Plan with the formats that lose least within ``options.bits``, and then with experts'
    inputs in floats where rounding them loses most.

    Args:
        plan: with all experts in NVFP4, and with the run's calibration.
        options: that it was made by.
        weight_only: of how many layers; None: of none.
        samples: tokens, int64 ``[num_samples, sequence_length]``.
        target: of the run.
        resume: a checkpoint that is there already may be what the run would make.
        work_dir: where hidden states are; by default in ``target``.
        limited: refuse what takes too long, calibration included, or more memory than there is.
        counting, devices: of the calibration, see ``quantize.calibration.estimate.estimate``.
        dry: measure nothing, and write nothing: without losses that are measured already, the plan
            is the given one.
        say: is told what it will take, what was chosen, and what could not be.

    Raises:
        TooMuchError: if it takes too much (``limited``).
        QuantizeError: if no format fits (``quantize.run.bits.check_bits``), the model cannot be run
            forward and backward, weights or states are damaged, or another run is at work there.
    """
    if options.bits is not None:
        check_bits(options.bits)
    if weight_only is not None and not plan.options.activations:
        raise QuantizeError(
            "--weight-only: no activations are quantized here, so those of all experts stay as "
            "they are; leave it out"
        )
    layers = by_layer(plan.groups)
    if weight_only is not None:
        check_count(weight_only, len(layers))
    left_out = unreadable(checkpoint.config, options.layout) if options.bits is not None else {}
    before = plan_before(checkpoint, plan, options, target, weight_only) if resume else None
    if before is not None:
        for name in sorted(left_out.keys() & {name for _, name in before.options.formats}):
            say(
                f"--bits: there are experts in {name} already, and vLLM's class for the model "
                f"{left_out[name]}. vLLM with this package serves them; without, quantize again"
            )
        return before
    for name, why in left_out.items():
        say(f"--bits: no experts in {name}: vLLM's class for the model {why}")
    kept = StoredLosses(target / FOLDER / MEASURED)
    names = _names(layers, options.bits, weight_only, left_out)
    option = "--bits" if options.bits is not None else "--weight-only"
    key = {"of": plan.fingerprint(checkpoint), "formats": names}
    begun = _has_all(kept.folder / _KEY, key)
    undone = [group for group in plan.groups if not (begun and kept.is_done(group))]
    if undone and not checkpoint.weights.here:  # a dry run of a model on the hub
        say(_not_known(plan, options.bits))
        return plan
    if undone:
        own = WorkDir(work_dir, target) if work_dir else None
        folder = own.folder / MEASURED if own else kept.folder
        measuring = _Measuring(checkpoint, plan, kept, undone, folder, device, names, option)
        first = measuring.foresee(limited, say)
        then = estimate(checkpoint, plan, plan.groups, device, counting, devices)
        say(f"Measuring layers' losses for {option}: {first}; then calibration: {then}")
        if limited:
            check(then, first)
        if dry:
            say(_not_known(plan, options.bits))
            return plan
        with locked(target / FOLDER):
            if not begun:
                shutil.rmtree(kept.folder, ignore_errors=True)
                kept.folder.mkdir(parents=True)
                write_json(kept.folder / _KEY, key)
            if own is not None:
                own.make()
            measuring.run(samples, by_time(progress, first.steps), say)
    losses: dict[str, dict[str, float]] = {prefix: defaultdict(float) for prefix in layers}
    for group in plan.groups:
        for name, loss in kept.of(group).items():
            if name in names[group.prefix]:
                losses[group.prefix][name] += loss
    weights = {prefix: sum(g.parameters for g in groups) for prefix, groups in layers.items()}
    choice, others = None, {}
    if options.bits is not None:
        formats = {prefix: {n: of[n] for n in of if n != WEIGHTS} for prefix, of in losses.items()}
        choice = choose(weights, formats, options.bits)
        say(summary(choice))
        others = {prefix: name for prefix, name in choice.formats.items() if name != NVFP4}
    floats: list[str] = []
    if weight_only is not None:
        nvfp4 = [prefix for prefix in layers if prefix not in others]
        most = most_by_inputs(losses, nvfp4, weight_only)
        say(_of_inputs(losses, nvfp4, most))
        floats = list(map(escape, most))
    return replace(_planned(checkpoint, plan, options, others, floats), choice=choice)


def plan_before(
    checkpoint: Checkpoint, plan: Plan, options: Options, target: Path, weight_only: int | None
) -> Plan | None:
    """What :func:`within_bits` gives a run that may resume, where there is a finished checkpoint
    for as many bits, and with as many layers whose inputs stay floats, in ``target``: that takes no
    weights. None if there is none."""
    file = target / CONFIG
    if not file.exists() or (target / FOLDER / "run.json").exists():
        return None
    said = made(read_json(file), str(file))
    floats = said.weight_only[len(options.weight_only) :] if said is not None else []
    if said is None or said.bits != options.bits or len(floats) != (weight_only or 0):
        return None
    return _planned(checkpoint, plan, options, said.formats, floats)


def _has_all(file: Path, key: Mapping[str, Any]) -> bool:
    """Whether what was measured, by its key in ``file``, is of the same, in these formats at least:
    an earlier version may have measured one that is left out now."""
    if not file.exists():
        return False
    there = read_json(file)
    formats = there.get("formats") or {}
    return there.get("of") == key["of"] and all(
        set(names) <= set(formats.get(prefix, ())) for prefix, names in key["formats"].items()
    )


def _names(
    layers: Mapping[str, list[ExpertGroup]],
    bits: float | None,
    weight_only: int | None,
    left_out: Container[str],
) -> dict[str, list[str]]:
    """The formats that each layer's losses are measured in."""
    inputs = [WEIGHTS] if weight_only is not None else []
    return {
        prefix: (formats_of(groups, left_out) if bits is not None else [NVFP4]) + inputs
        for prefix, groups in layers.items()
    }


def _of_inputs(losses: Losses, nvfp4: list[str], floats: list[str]) -> str:
    """What was chosen for ``--weight-only``, in a line."""
    gains = {prefix: losses[prefix][NVFP4] - losses[prefix][WEIGHTS] for prefix in nvfp4}
    numbers = [layer_number(prefix) for prefix in floats]
    names = [p if n is None else str(n) for p, n in zip(floats, numbers, strict=True)]
    return (
        f"--weight-only {len(floats)}: inputs stay bf16 in layers {', '.join(names)}. Loss by "
        f"4-bit inputs about {sum(gains[p] for p in floats):.3g} nats a token there, "
        f"{sum(gains.values()):.3g} in all layers"
    )


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


def _not_known(plan: Plan, bits: float | None) -> str:
    """What can be said without losses."""
    if bits is None:
        return "--weight-only: which layers' inputs stay bf16 is known once losses are measured"
    weights = sum(group.parameters for group in plan.groups)
    more = int(weights * (bits - LEAST) / 8)
    return (
        f"--bits {bits:g}: layers' formats are known once their losses are measured. With all "
        f"experts in NVFP4 the tensors are {decimal(plan.nbytes)}, and within the budget at most "
        f"{decimal(plan.nbytes + more)}"
    )


def _planned(
    checkpoint: Checkpoint,
    plan: Plan,
    options: Options,
    formats: dict[str, str],
    floats: list[str],
) -> Plan:
    patterns = (*options.weight_only, *floats)
    decided = replace(options, formats=tuple(formats.items()), weight_only=patterns)
    chosen = plan_of(checkpoint, decided, plan.gates)
    used = plan.options.calibration
    return replace(chosen, options=replace(chosen.options, calibration=used))


class _Measuring:
    """Measuring the losses of some groups, ``undone``; what an earlier run has left in ``folder``
    is used.

    Args:
        names: the formats to measure, by a layer's prefix.
        option: what it is for.

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
        names: dict[str, list[str]],
        option: str,
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
        self._names = names
        self._option = option
        self._inputs = (
            used.input_scale_rule if plan.layout is not plan.layout.weights_only else None
        )
        self._model = runnable_model(checkpoint, self._plan, device)

    def foresee(self, limited: bool, say: Say) -> Estimate:
        """Say what it needs, and refuse it if there is less; returns how long it takes."""
        plan, folder, device = self._plan, self._folder, self._device
        needs = needed(self._checkpoint, plan, device)
        say(f"Measuring layers' losses for {self._option}: {needs}")
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
                f"leave them out with --exclude, or leave {self._option} out"
            )
        state.finish()

    def _visitor(self, groups: list[ExpertGroup]) -> LossGatherer:
        return LossGatherer(
            self._checkpoint,
            self._kept,
            self._names,
            groups,
            self._plan.options.scales,
            self._inputs,
        )
