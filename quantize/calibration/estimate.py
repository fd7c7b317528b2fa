"""How long calibration will take, from one expert that is really rounded; and what is too much."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from rich.filesize import decimal

from quantize.calibration.calibrate import goes_back, precision
from quantize.calibration.crew import Work
from quantize.calibration.expert_weights import read_expert
from quantize.calibration.host_memory import HostMemory, host_memory
from quantize.calibration.input_scales import RangeGatherer
from quantize.calibration.quantizer import Rounder
from quantize.calibration.room import side_by_side
from quantize.calibration.routing import Routing
from quantize.calibration.step_times import Steps
from quantize.calibration.visitor import Visitor
from quantize.checkpoint.reader import Checkpoint
from quantize.duration import duration
from quantize.errors import TooMuchError
from quantize.experts.group import ExpertGroup, tensor_names_of
from quantize.experts.names import layer_number
from quantize.experts.stated import stated
from quantize.nvfp4.rounding import METHODS

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

Look = Callable[[ExpertGroup], Visitor]
"""Makes what looks at the experts of a group, on the way back."""


class Seconds(NamedTuple):
    """What one expert takes, in seconds: to read, to compute its outputs, and to round (or, where
    that is not what is wanted, to look at its inputs or its losses)."""

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
        devices: how many round experts at once.
        steps: seconds of its steps (``quantize.calibration.progress``).
    """

    seconds: float
    expert: Seconds
    group: ExpertGroup
    tokens: int
    experts: int
    devices: int = 1
    steps: Steps = ()

    def __str__(self) -> str:
        where = "here" if self.devices == 1 else f"on {self.devices} devices"
        return (
            f"about {duration(self.seconds)} {where}: {duration(self.expert.total)} for one of "
            f"{self.experts} experts ({self.group.hidden} x {self.group.intermediate}, with "
            f"{self.tokens} tokens; measured)"
        )


def estimate(
    checkpoint: Checkpoint,
    plan: Plan,
    groups: list[ExpertGroup],
    device: torch.device,
    counting: bool = False,
    devices: int = 1,
    look: Look | None = None,
) -> Estimate:
    """Measure one expert of ``groups``, and say what calibrating all of them takes on ``device``.

    The expert's weights are the checkpoint's. Its inputs are random: as many as an expert gets on
    average. What a model does beside its experts is reckoned from its size, at the speed of the
    experts' products.

    Args:
        counting: tokens are counted first (``quantize.calibration.calibrate.count_tokens``).
        devices: how many devices like ``device`` round experts (``quantize.calibration.crew``).
        look: experts are not rounded but looked at, by this.
    """
    settings = plan.options.calibration
    assert settings is not None
    group = max(groups, key=lambda one: one.hidden * one.intermediate)
    total = settings.num_samples * settings.sequence_length
    said = stated(checkpoint.text_config(), group.prefix).per_token
    chosen = next(iter(said.values()), (1,))[0]
    tokens = total if settings.every_expert else -(-total * chosen // group.num_experts)
    one = measure(checkpoint, plan, group, tokens, device, devices, look)
    if one.total < AGAIN:
        again = measure(checkpoint, plan, group, tokens, device, devices, look)
        one = min(one, again, key=lambda found: found.total)
    # Experts of other sizes take as long as they have weights.
    size = group.parameters / group.num_experts
    experts = sum(each.parameters for each in groups) / size
    back = goes_back(settings)
    passes = 1 + (counting and not back and settings.method is not None)
    reads, works = passes + 2 * back, passes * FORWARD + back * BACKWARD
    seconds = experts * (reads * one.read + works * one.compute)
    if devices > 1 and settings.method is not None:
        # While others round, the pass reads and computes what it would have anyway.
        alone = one.read + (BACKWARD - FORWARD if back else FORWARD) * one.compute
        share = _share(group, together(plan, group, device, devices), devices)
        rounding = max(0.0, one.round * share - alone)
    else:
        rounding = one.round
    seconds += experts * rounding
    # The rest of a layer runs up to its experts, and then from its beginning to its end.
    pace = one.compute / (size * tokens)
    beside = _beside(checkpoint, plan) * total * pace * 2
    seconds += beside * works
    count = sum(each.num_experts for each in groups)
    # A layer's experts, as many as those of the measured one's size.
    layers: dict[int, float] = defaultdict(float)
    for each in groups:
        layers[each.layer] += each.parameters / size
    steps = _steps(plan, layers, one, rounding, beside, back)
    return Estimate(seconds, one, group, tokens, count, devices if settings.method else 1, steps)


def _steps(
    plan: Plan, layers: dict[int, float], one: Seconds, rounding: float, beside: float, back: bool
) -> Steps:
    """Seconds of each step, in the order of ``quantize.calibration.calibrate``'s passes.

    Args:
        layers: how many experts are rounded in each.
        one: of one of them, in which ``rounding`` is what it adds to a pass.
        beside: what all layers take without their experts, in one pass forward.
    """
    numbers = [group.layer for group in (plan.found if back else plan.groups)]
    count = max(numbers) + 1
    own = beside / count
    ahead = one.read + FORWARD * one.compute
    if not back:
        return tuple((own + layers.get(n, 0) * (ahead + rounding),) for n in range(count))
    # A layer on the way back: a third of what it tells of is its experts' outputs, once more.
    behind = one.read + (BACKWARD - FORWARD) * one.compute + rounding
    first = min(group.layer for group in plan.groups)
    return (
        *((own + layers.get(n, 0) * ahead,) for n in range(count)),
        (own,),  # the model's end
        *(
            (
                own + layers.get(n, 0) * ahead,
                *[((BACKWARD - FORWARD) * own + layers.get(n, 0) * behind) / 2] * 2,
            )
            for n in reversed(range(first, count))
        ),
    )


def _share(group: ExpertGroup, size: int, devices: int) -> float:
    """The longest that a device is at work on a group, of what one would be on all of it."""
    batches = -(-group.num_experts // size)
    return -(-batches // devices) / batches


def together(plan: Plan, group: ExpertGroup, device: torch.device, devices: int) -> int:
    """How many experts are a batch."""
    settings = plan.options.calibration
    assert settings is not None
    if settings.method is None:
        return 1
    return side_by_side(group, METHODS[settings.method], [device] * devices)


def measure(
    checkpoint: Checkpoint,
    plan: Plan,
    group: ExpertGroup,
    tokens: int,
    device: torch.device,
    devices: int = 1,
    look: Look | None = None,
) -> Seconds:
    """Return what the first expert of ``group`` takes with so many tokens: beside as many like it
    as are rounded together, its share."""
    settings = plan.options.calibration
    assert settings is not None
    dtype = precision(device)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, group.hidden, generator=random).to(dtype)
    gradient = torch.randn(tokens, group.hidden, generator=random) if goes_back(settings) else None
    size = together(plan, group, device, devices) if look is None else 1
    ids = torch.arange(size, dtype=torch.int32).expand(tokens, size)  # each is given all of them
    routing = Routing(x, ids, torch.ones(tokens, size), group.num_experts, device, gradient)
    gate = plan.gates.of(group.prefix)
    started = clock()
    weights = read_expert(checkpoint, group, 0, gate, device)
    read = clock()
    output = torch.zeros(tokens, group.hidden)
    for chunk in routing.of(0):
        own = weights.output(weights.intermediate(chunk.x)) * chunk.weights.unsqueeze(1)
        output.index_add_(0, chunk.tokens, own.float().cpu())
    computed = clock()
    if look is None and settings.method is None:

        def look(one: ExpertGroup) -> Visitor:
            return RangeGatherer(checkpoint, cast(Any, None), [one], settings)

    if look is not None:
        visitor = look(group)
        visitor.begin(group.layer, group, routing)
        visitor.expert(0, weights, routing)
    else:
        rounder = Rounder(checkpoint, plan.layout, settings, plan.options.scales)
        rounder.round(Work(group, [(number, weights) for number in range(size)], routing))
    return Seconds(read - started, computed - read, (clock() - computed) / size)


def check(estimated: Estimate, first: Estimate | None = None) -> None:
    """Refuse what takes too long.

    Args:
        first: what comes before it: measuring layers' losses.

    Raises:
        TooMuchError: if it does, or both together do.
    """
    before = f"measuring layers' losses would take {first}; and then " if first else ""
    if estimated.seconds + (first.seconds if first else 0) > LIMIT:
        raise TooMuchError(
            f"{before}calibration would take {estimated}. Take a GPU, a faster --rounding, or "
            "fewer --calibration-rows; or give --yes to do it nevertheless"
        )


def check_memory(nbytes: int, device: torch.device) -> None:
    """Refuse what needs more memory than there is.

    Args:
        nbytes: that it needs on ``device``.

    Raises:
        TooMuchError: if it does.
    """
    there, why = memory_of(device)
    if nbytes > there:
        raise TooMuchError(
            f"calibration needs about {decimal(nbytes)} of memory, and {device} has "
            f"{decimal(there)}{f' ({why})' if why else ''}. Take another --device, shorter texts "
            "(--calibration-length), or a --rounding that needs less; or give --yes to try it "
            "nevertheless"
        )


def memory_of(device: torch.device) -> HostMemory:
    """Return how much memory a device has for this process."""
    if device.type == "cuda":
        return HostMemory(int(torch.cuda.get_device_properties(device).total_memory))
    return host_memory()


def _beside(checkpoint: Checkpoint, plan: Plan) -> int:
    """The number of weights in the layers that run, without their routed experts."""
    experts = tensor_names_of(plan.found)
    prefix = plan.found[0].prefix.partition("layers.")[0]
    last = max(group.layer for group in plan.groups)
    return sum(
        math.prod(info.shape)
        for name, info in checkpoint.tensors.items()
        if name.startswith(prefix) and name not in experts
        and (number := layer_number(name)) is not None and number <= last
    )  # fmt: skip
