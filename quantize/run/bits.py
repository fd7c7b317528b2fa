"""The format of each layer's experts, within a budget of bits a weight: ``--bits``.

What is chosen has the least sum of the layers' losses (``quantize.calibration.layer_loss``) of all
that fits. One layer has one format, because engines fuse its experts.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from quantize.errors import QuantizeError
from quantize.layouts.base import BASES

if TYPE_CHECKING:  # a command reads this without PyTorch
    from quantize.experts.group import ExpertGroup

NVFP4, BF16 = "nvfp4", "bf16"
"""The names of the formats that are not in ``BASES``."""

WEIGHTS = "nvfp4-weights"
"""NVFP4 whose inputs stay floats, where those of others do not: ``--weight-only``. It takes as many
bits, so a budget does not choose between the two."""

MEASURED = "measured"
"""The name of the folder of losses in a record's folder, and of states in ``--work-dir``."""

LEAST, MOST = 4 + 8 / 16, 16.0
"""Bits of a weight in NVFP4, its share of a block scale included, and in bfloat16."""

Losses = Mapping[str, Mapping[str, float]]
"""By the prefix of a layer's experts and the name of a format: what the layer loses in it, nats a
token. The formats are those that the layer may have."""


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        bits: that a weight may take, on average.
        taken: that it takes.
        formats: by the prefix of a layer's experts, the name of their format.
        losses: what it was chosen by.
    """

    bits: float
    taken: float
    formats: Mapping[str, str]
    losses: Losses

    @property
    def loss(self) -> float:
        """The sum of the layers' losses, nats a token."""
        return sum(self.losses[prefix][name] for prefix, name in self.formats.items())


def bits_of(name: str) -> float:
    """Bits of a weight in a format, scales of blocks included."""
    return {NVFP4: LEAST, BF16: MOST}.get(name) or BASES[name].bits


def check_bits(bits: float) -> None:
    """Refuse a budget that nothing fits, or that everything does.

    Raises:
        QuantizeError: if it is one.
    """
    if not LEAST <= bits < MOST:
        raise QuantizeError(
            f"--bits {bits:g}: experts take {LEAST:g} bits a weight in NVFP4, scales included, and "
            f"{MOST:g} unquantized; give a number from {LEAST:g} to less than {MOST:g}"
        )


def formats_of(groups: Sequence[ExpertGroup], unreadable: Container[str] = ()) -> list[str]:
    """The formats that all experts of a layer may have, in which engines read them.

    vLLM's methods for FP8 and MXFP8 leave biases out.

    Args:
        unreadable: those that vLLM's class for the model does not load
            (``quantize.run.readers.unreadable``).
    """
    fitting = [
        name
        for name, base in BASES.items()
        if name not in unreadable
        and all(base.fits(*shape) and not g.bias_names for g in groups for shape in g.shapes)
    ]
    return [NVFP4, *fitting, BF16]


def check_count(count: int, layers: int) -> None:
    """Refuse to keep the inputs of more layers than would leave any.

    Raises:
        QuantizeError: if it is as many as there are, or more.
    """
    if count >= layers:
        raise QuantizeError(
            f"--weight-only {count}: there are {layers} layers with experts in NVFP4; give a "
            "smaller number, or --activations bf16 for all of them"
        )


def most_by_inputs(losses: Losses, prefixes: Iterable[str], count: int) -> list[str]:
    """The layers that lose most by rounding inputs to NVFP4, in their order.

    Args:
        losses: of NVFP4 and of ``WEIGHTS``, at least.
        prefixes: of the layers to choose from.
        count: how many; all, if there are no more.
    """
    order = list(prefixes)
    gains = {prefix: losses[prefix][NVFP4] - losses[prefix][WEIGHTS] for prefix in order}
    chosen = sorted(order, key=lambda prefix: -gains[prefix])[:count]
    return [prefix for prefix in order if prefix in chosen]


def by_layer(groups: Iterable[ExpertGroup]) -> dict[str, list[ExpertGroup]]:
    """Groups of experts by their layer's prefix: a layer with experts of several sizes has one."""
    found: dict[str, list[ExpertGroup]] = {}
    for group in groups:
        found.setdefault(group.prefix, []).append(group)
    return found


class _State(NamedTuple):
    """Formats for the first layers: their size in bits, their loss, and the formats, last first."""

    size: float
    loss: float
    formats: tuple[str, tuple[object, ...]] | tuple[()]


def choose(weights: Mapping[str, int], losses: Losses, bits: float) -> Choice:
    """The formats with the least loss that fit into a budget.

    This is exact, by dynamic programming: of all formats for the first layers it keeps those for
    which no others are both smaller and better.

    At least one layer stays in NVFP4, since a checkpoint without is not one of this package's.

    Args:
        weights: how many weights each layer's experts have, by their prefix.
        bits: a weight may take, on average.

    Raises:
        QuantizeError: see :func:`check_bits`.
    """
    check_bits(bits)
    total = sum(weights.values())
    budget = bits * total * (1 + 1e-12)
    rest = LEAST * total
    # Without NVFP4 so far, and with.
    fronts: dict[bool, list[_State]] = {False: [_State(0, 0, ())], True: []}
    for prefix, count in weights.items():
        rest -= LEAST * count
        found: dict[bool, list[_State]] = {False: [], True: []}
        for name, loss in losses[prefix].items():
            size = bits_of(name) * count
            for has, states in fronts.items():
                found[has or name == NVFP4] += [
                    _State(state.size + size, state.loss + loss, (name, state.formats))
                    for state in states
                    if state.size + size + rest <= budget
                ]
        fronts = {has: _front(states) for has, states in found.items()}
    best = fronts[True][-1]
    names: list[str] = []
    left: tuple[object, ...] = best.formats
    while left:
        name, left = left  # type: ignore[assignment]
        names.append(name)
    formats = dict(zip(weights, reversed(names), strict=True))
    return Choice(bits, best.size / total, formats, losses)


def _front(states: list[_State]) -> list[_State]:
    """Those than which no other is smaller and at least as good, from small to good."""
    kept: list[_State] = []
    for state in sorted(states, key=lambda one: one[:2]):
        if not kept or state.loss < kept[-1].loss:
            kept.append(state)
    return kept
