"""Calibrating a plan's experts: passes through the model, and staging what they quantize."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING

import torch

from quantize.calibration.backward import LayerwiseBackward
from quantize.calibration.crew import Crew, Round
from quantize.calibration.forward import LayerwiseForward
from quantize.calibration.input_scales import RangeGatherer
from quantize.calibration.kv_watch import watching
from quantize.calibration.layerwise import LayerwiseModel
from quantize.calibration.model_end import ModelEnd
from quantize.calibration.progress import PROGRESS, CalibrationProgress, Progress
from quantize.calibration.proof import Say, prove
from quantize.calibration.quantizer import Quantizer, Rounder
from quantize.calibration.store import Store, gradients_name, states_name
from quantize.calibration.token_counts import TokenCounts
from quantize.calibration.visitor import NullVisitor, Visitor
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.nvfp4.input_scales import INPUT_RULES
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.rounding.kernels.launch import full_float32
from quantize.run.kv_scales import KvRanges
from quantize.run.options import Calibration
from quantize.run.ranges import Ranges
from quantize.run.staged import Staged

if TYPE_CHECKING:
    from quantize.run.plan import Plan

Gather = Callable[[Round], AbstractContextManager[Crew | None]]
"""Makes a crew of what rounds experts on one device; None if that device is to do it alone."""


def calibrate(
    checkpoint: Checkpoint,
    plan: Plan,
    samples: torch.Tensor,
    staged: Staged,
    device: torch.device,
    progress: Progress = lambda *_: None,
    say: Say = lambda _: None,
    gather: Gather = lambda _: nullcontext(),
) -> None:
    """Quantize all experts of ``plan`` with calibration, into its shards; or find their input
    scales alone, if that is what ``plan`` says.

    If an earlier run was interrupted, this goes on with the layer that it was at.

    Args:
        samples: tokens, int64 ``[num_samples, sequence_length]``.
        staged: of the plan; its folder is for everything but the experts.
        device: runs the model, and rounds experts unless there is a crew.
        say: is told which experts get too little text, unless :func:`count_tokens` has.
        gather: makes the crew that rounds experts.

    Raises:
        QuantizeError: if the model cannot be run (see ``quantize.calibration.layerwise``), a weight
            is NaN or infinite, or the disk is full.
    """
    settings = plan.options.calibration
    assert settings is not None
    undone = unstaged(plan, staged)
    if not undone:
        shutil.rmtree(staged.folder / "states", ignore_errors=True)
        return
    model = LayerwiseModel(
        checkpoint, plan.found, device, precision(device), plan.options.trust_remote_code
    )
    store = Store(staged.folder / "states")
    state = CalibrationProgress(plan, model, store, undone, progress)
    visitor: Visitor
    counts = None if settings.every_expert else TokenCounts(undone, say)
    caches = plan.caches
    with ExitStack() as stack:
        if settings.method is None:
            ranges = Ranges(staged.folder)
            visitor = RangeGatherer(checkpoint, ranges, undone, settings)
        else:
            # Rounding's products are in full float32, and kernels' context that sees to it is the
            # process's: members of a crew would leave each other's.
            stack.enter_context(full_float32())
            rounder = Rounder(checkpoint, plan.layout, settings, plan.options.scales)
            crew = stack.enter_context(gather(rounder.round))
            rule = INPUT_RULES[settings.input_scale_rule]
            visitor = Quantizer(staged, undone, plan.layout_of, rule, rounder, crew)
        if caches:
            stack.enter_context(watching(model, caches, KvRanges(staged.folder)))
        if goes_back(settings):
            run = LayerwiseBackward(checkpoint, plan.gates, model, samples, store)
            forward_backward(run, visitor, state, counts)
        else:
            forward = LayerwiseForward(checkpoint, plan.gates, model, samples, store)
            if settings.method is None and counts is not None:
                forward_pass(forward, counts.before(visitor), state)
                counts.sum_up()
            else:
                forward_pass(forward, visitor, state)
    if undone := unstaged(plan, staged):
        raise QuantizeError(
            f"{undone[0].prefix}: text does not reach these experts in Transformers' model; leave "
            "them out with --exclude, or leave --calibrate out"
        )
    shutil.rmtree(store.folder)
    state.finish()


def count_tokens(
    checkpoint: Checkpoint,
    plan: Plan,
    samples: torch.Tensor,
    staged: Staged,
    device: torch.device,
    say: Say = lambda _: None,
    progress: Progress = lambda *_: None,
) -> None:
    """Say which experts get too little text, if :func:`calibrate` would find out only while it
    rounds.

    A layer's routing is known once the layers before it have run. So this runs the model forward
    over all of the text, a layer at a time, as calibration does, and rounds nothing.

    Args:
        samples, staged: see :func:`calibrate`.
    """
    settings = plan.options.calibration
    assert settings is not None
    if settings.method is None or settings.every_expert or goes_back(settings):
        return
    undone = unstaged(plan, staged)
    if not undone or (staged.folder / PROGRESS).exists():  # an earlier run has counted
        return
    model = LayerwiseModel(
        checkpoint, plan.found, device, precision(device), plan.options.trust_remote_code
    )
    counts = TokenCounts(undone, say)
    last = max(model.layer_of(group) for group in undone)
    shutil.rmtree(staged.folder / "counting", ignore_errors=True)
    try:
        store = Store(staged.folder / "counting")
        run = LayerwiseForward(checkpoint, plan.gates, model, samples, store)
        for layer in range(last + 1):

            def report(share: float, part: str, layer: int = layer) -> None:
                progress(layer + share, last + 1, f"layer {layer}, {part}")

            progress(layer, last + 1, f"layer {layer}")
            run.layer_forward(layer, counts, report)
            run.remove_states(layer)
    finally:
        shutil.rmtree(staged.folder / "counting", ignore_errors=True)
    progress(last + 1, last + 1, "done")
    counts.sum_up()


def prove_walk(
    checkpoint: Checkpoint,
    plan: Plan,
    samples: torch.Tensor,
    staged: Staged,
    device: torch.device,
    say: Say = lambda _: None,
) -> None:
    """See that :func:`calibrate` will compute what Transformers' model does, unless that is known.

    Args:
        samples, staged: see :func:`calibrate`.
        say: see ``quantize.calibration.proof.Say``.

    Raises:
        QuantizeError: if it does not; see ``quantize.calibration.proof``.
    """
    # An earlier run that came further has proved it.
    if unstaged(plan, staged) and not (staged.folder / PROGRESS).exists():
        prove(checkpoint, plan, samples, staged.folder / "proof", device, say)


def runnable_model(checkpoint: Checkpoint, plan: Plan, device: torch.device) -> LayerwiseModel:
    """The model that a calibration runs. A run builds it before it changes anything.

    Raises:
        QuantizeError: if calibration does not know it, or weights are NVFP4 already.
    """
    plan.check_can_calibrate()
    model = LayerwiseModel(
        checkpoint, plan.found, device, precision(device), plan.options.trust_remote_code
    )
    if plan.options.calibration and goes_back(plan.options.calibration):
        ModelEnd(model).check()
    return model


def forward_pass(run: LayerwiseForward, visitor: Visitor, state: CalibrationProgress) -> None:
    """Go through the model once, and show ``visitor`` the experts on the way."""
    # Between two steps, the next layer's inputs are all that is needed.
    state.resume(state.last + 1, lambda done: [states_name(done)], min(state.undone))
    for layer in range(state.done, state.last + 1):
        state.start_step(f"layer {layer}")
        run.layer_forward(layer, visitor, state.report)
        state.finish_step(states_name(layer + 1))
        run.remove_states(layer)


def forward_backward(
    run: LayerwiseBackward,
    visitor: Visitor,
    state: CalibrationProgress,
    counts: TokenCounts | None = None,
) -> None:
    """Go through the model without the visitor, then back from its end, and show it experts on the
    way back: only from the end is it known what matters at their outputs.

    Args:
        counts: is shown experts on the way forward.
    """
    run.check()
    forward_steps = run.last + 1

    def needed(done: int) -> list[str]:
        # The first layer's input is the text.
        if done <= forward_steps:
            layers = {*range(state.first, done), done} - {0}
            return [states_name(layer) for layer in sorted(layers)]
        layer = forward_steps - (done - forward_steps - 1)  # its input's gradients are known
        states = [states_name(n) for n in range(max(1, state.first), layer)]
        return [*states, gradients_name(layer)]

    steps = forward_steps + 1 + (forward_steps - state.first)
    # A layer is left once the one before it is.
    limit = forward_steps + 1 + (run.last - max(state.undone))
    state.resume(steps, needed, limit)
    for layer in range(state.done, forward_steps):
        state.start_step(f"layer {layer} forward")
        run.layer_forward(layer, counts or NullVisitor(), state.report)
        state.finish_step(states_name(layer + 1))
        if layer < state.first:
            run.remove_states(layer)
    if state.done == forward_steps:
        if counts is not None:
            counts.sum_up()
        state.start_step("the model's end")
        run.end_backward(state.report)
        state.finish_step(gradients_name(forward_steps))
    for layer in reversed(range(state.first, forward_steps - (state.done - forward_steps - 1))):
        state.start_step(f"layer {layer} backward")
        run.layer_backward(layer, visitor, layer > state.first, state.report)
        state.finish_step(gradients_name(layer))
        run.remove_states(layer + 1)
        run.remove_gradients(layer + 1)


def goes_back(settings: Calibration) -> bool:
    """Whether the model runs backward too."""
    return settings.method is not None and METHODS[settings.method].needs_output_hessian


def precision(device: torch.device) -> torch.dtype:
    """Return the dtype that a model computes in."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def unstaged(plan: Plan, staged: Staged) -> list[ExpertGroup]:
    """Return the groups of experts that are still to be calibrated."""
    settings = plan.options.calibration
    if settings is not None and settings.method is None:
        ranges = Ranges(staged.folder)
        return [group for group in plan.groups if not ranges.is_done(group)]
    return [group for group in plan.groups if not staged.is_done(group)]
