"""How long calibration will take, from one expert that is really rounded; and what is too much."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from rich.filesize import decimal

from quantize.calibration.calibrate import goes_back, precision
from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.input_scales import RangeGatherer
from quantize.calibration.quantizer import Quantizer, Rounder
from quantize.calibration.routing import Routing
from quantize.calibration.visitor import Visitor
from quantize.checkpoint.reader import Checkpoint
from quantize.duration import duration
from quantize.errors import TooMuchError
from quantize.experts.group import ExpertGroup, tensor_names_of
from quantize.experts.names import layer_number
from quantize.experts.stated import stated

if TYPE_CHECKING:
    from quantize.run.plan import Plan

LIMIT = 3 * 24 * 3600.0
"""Seconds: what takes longer is refused, unless a user insists."""

AGAIN = 20.0
"""Seconds: an expert that took less is done once more, because the first time includes what is
compiled and allocated once."""

FORWARD, BACKWARD = 1, 4
"""How many times the work of computing an expert's outputs: of doing so, and of taking the outputs
again on the way back, and then the gradients of inputs and weights."""

clock: Callable[[], float] = time.perf_counter


class Seconds(NamedTuple):
    """What one expert takes, in seconds: to read, to compute its outputs, and to round (or, where
    input scales are all that is wanted, to look at its inputs)."""

    read: float
    compute: float
    round: float

    @property
    def total(self) -> float:
        return sum(self)


class Estimate(NamedTuple):
    """What a calibration will take.

    Attributes:
        seconds: all of it.
        expert: one expert.
        group: that expert's.
        tokens: that it was given.
        experts: how many there are.
    """

    seconds: float
    expert: Seconds
    group: ExpertGroup
    tokens: int
    experts: int

    def __str__(self) -> str:
        return (
            f"about {duration(self.seconds)} here: {duration(self.expert.total)} for one of "
            f"{self.experts} experts ({self.group.hidden} x {self.group.intermediate}, with "
            f"{self.tokens} tokens; measured)"
        )


def estimate(
    checkpoint: Checkpoint,
    plan: Plan,
    groups: list[ExpertGroup],
    device: torch.device,
    counting: bool = False,
) -> Estimate:
    """Measure one expert of ``groups``, and say what calibrating all of them takes on ``device``.

    The expert's weights are the checkpoint's. Its inputs are random: as many as an expert gets on
    average. What a model does beside its experts is reckoned from its size, at the speed of the
    experts' products.

    Args:
        counting: tokens are counted first (``quantize.calibration.calibrate.count_tokens``).
    """
    settings = plan.options.calibration
    assert settings is not None
    group = max(groups, key=lambda one: one.hidden * one.intermediate)
    total = settings.num_samples * settings.sequence_length
    said = stated(checkpoint.text_config(), group.prefix).per_token
    chosen = next(iter(said.values()), (1,))[0]
    tokens = total if settings.every_expert else -(-total * chosen // group.num_experts)
    one = measure(checkpoint, plan, group, tokens, device)
    if one.total < AGAIN:
        again = measure(checkpoint, plan, group, tokens, device)
        one = min(one, again, key=lambda found: found.total)
    # Experts of other sizes take as long as they have weights.
    size = group.parameters / group.num_experts
    experts = sum(each.parameters for each in groups) / size
    back = goes_back(settings)
    passes = 1 + (counting and not back and settings.method is not None)
    reads, works = passes + 2 * back, passes * FORWARD + back * BACKWARD
    seconds = experts * (reads * one.read + works * one.compute + one.round)
    # The rest of a layer runs up to its experts, and then from its beginning to its end.
    pace = one.compute / (size * tokens)
    seconds += _beside(checkpoint, plan) * total * pace * 2 * works
    return Estimate(seconds, one, group, tokens, sum(each.num_experts for each in groups))


def measure(
    checkpoint: Checkpoint, plan: Plan, group: ExpertGroup, tokens: int, device: torch.device
) -> Seconds:
    """Return what the first expert of ``group`` takes with so many tokens."""
    settings = plan.options.calibration
    assert settings is not None
    dtype = precision(device)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, group.hidden, generator=random).to(dtype)
    gradient = torch.randn(tokens, group.hidden, generator=random) if goes_back(settings) else None
    ids = torch.zeros(tokens, 1, dtype=torch.int32)
    routing = Routing(x, ids, torch.ones(tokens, 1), group.num_experts, device, gradient)
    gate = plan.gates.of(group.prefix)
    started = clock()
    weights = ExpertWeights(
        tuple(w.to(device) for w in group.gate_up(checkpoint, 0, gate.interleaved)),
        group.down(checkpoint, 0).to(device),
        tuple(b.to(device) for b in group.biases(checkpoint, 0, gate.interleaved).values()),
        gate,
    )
    read = clock()
    output = torch.zeros(tokens, group.hidden)
    for chunk in routing.of(0):
        own = weights.output(weights.intermediate(chunk.x)) * chunk.weights.unsqueeze(1)
        output.index_add_(0, chunk.tokens, own.float().cpu())
    computed = clock()
    visitor: Visitor
    if settings.method is None:
        visitor = RangeGatherer(checkpoint, cast(Any, None), [group], settings.every_expert)
    else:
        rounder = Rounder(checkpoint, plan.layout, settings, plan.options.scales)
        visitor = Quantizer(cast(Any, _Nowhere()), [group], plan.layout, rounder)
    visitor.begin(layer_number(group.prefix) or 0, group, routing)
    visitor.expert(0, weights, routing)
    together = 1
    # A method that fills a GPU with several experts lets the first ones wait.
    while isinstance(visitor, Quantizer) and visitor.waiting:
        visitor.expert(together, weights, routing)
        together += 1
    return Seconds(read - started, computed - read, (clock() - computed) / together)


def check(estimated: Estimate) -> None:
    """Refuse what takes too long.

    Raises:
        TooMuchError: if it does.
    """
    if estimated.seconds > LIMIT:
        raise TooMuchError(
            f"calibration would take {estimated}. Take a GPU, a faster --rounding, or fewer "
            "--calibration-rows; or give --yes to do it nevertheless"
        )


def check_memory(nbytes: int, device: torch.device) -> None:
    """Refuse what needs more memory than there is.

    Args:
        nbytes: that it needs on ``device``.

    Raises:
        TooMuchError: if it does.
    """
    there = memory_of(device)
    if nbytes > there:
        raise TooMuchError(
            f"calibration needs about {decimal(nbytes)} of memory, and {device} has "
            f"{decimal(there)}. Take another --device, shorter texts (--calibration-length), or a "
            "--rounding that needs less; or give --yes to try it nevertheless"
        )


def memory_of(device: torch.device) -> int:
    """Return how many bytes of memory a device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _beside(checkpoint: Checkpoint, plan: Plan) -> int:
    """The number of weights in the layers that run, without their routed experts."""
    experts = tensor_names_of(plan.found)
    prefix = plan.found[0].prefix.partition("layers.")[0]
    last = max(layer_number(group.prefix) or 0 for group in plan.groups)
    return sum(
        math.prod(info.shape)
        for name, info in checkpoint.tensors.items()
        if name.startswith(prefix) and name not in experts
        and (number := layer_number(name)) is not None and number <= last
    )  # fmt: skip


class _Nowhere:
    """Takes what is staged, and keeps nothing (``quantize.run.staged.Staged``)."""

    def writer(self, *_: object) -> _Nowhere:
        return self

    def write(self, *_: object) -> None:
        pass

    def abort(self) -> None:
        pass
