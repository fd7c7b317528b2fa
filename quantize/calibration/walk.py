"""Running a model layer by layer over calibration rows, its experts one at a time.

For each layer: run it up to its experts and take down what they are given; compute each expert over
all its tokens at once, showing it to a visitor; run the layer again with what they gave. So memory
holds a layer without its experts and one expert, whatever the model's size, and every tensor of the
checkpoint is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from quantize.calibration.routing import Routing
from quantize.calibration.store import Store
from quantize.calibration.stream import Routed, Stream
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.gates import Gate, Gates
from quantize.experts.group import ExpertGroup

TOKENS = 4096
"""In one run of a layer, about."""

Progress = Callable[[float], None]
"""Told which share of a layer's experts is done."""


class Weights:
    """One expert's weights, and how they are applied.

    Attributes:
        inputs: gate and up, or up alone: ``[intermediate, hidden]``, in the source's dtype.
        down: ``[hidden, intermediate]``.
    """

    def __init__(
        self,
        inputs: tuple[torch.Tensor, ...],
        down: torch.Tensor,
        biases: tuple[torch.Tensor, ...],
        gate: Gate,
    ) -> None:
        self.inputs = inputs
        self.down = down
        self._biases = biases
        self._gate = gate

    def between(self, x: torch.Tensor, inputs: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
        """What down is given for tokens ``x`` ``[n, hidden]``: ``[n, intermediate]``, in its dtype.

        Args:
            inputs: other weights than the expert's own.
        """
        biases = self._biases[:-1] or (None,) * len(self.inputs)
        pairs = zip(inputs or self.inputs, biases, strict=True)
        return self._gate.apply(*(_linear(x, weight, bias) for weight, bias in pairs))

    def slopes(self, x: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A loss's gradients by what gate and up make of tokens ``x``, before the gate is applied.

        Args:
            gradient: that by :meth:`out`'s result, ``[n, hidden]``.

        Returns:
            for each of :attr:`inputs`, ``[n, intermediate]``, in float32 or better.
        """
        biases = self._biases[:-1] or (None,) * len(self.inputs)
        with torch.no_grad():
            before = [_linear(x, *pair) for pair in zip(self.inputs, biases, strict=True)]
            before = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in before]
            by_between = gradient.to(before[0].dtype) @ self.down.to(before[0].dtype)
        with torch.enable_grad():
            leaves = [part.requires_grad_() for part in before]
            between = self._gate.apply(*leaves)
        return torch.autograd.grad(between, leaves, by_between)

    def out(self, between: torch.Tensor) -> torch.Tensor:
        """``[n, hidden]`` from :meth:`between`'s result."""
        return _linear(between, self.down, self._biases[-1] if self._biases else None)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    own = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, weight.to(x.dtype), own)


class Visitor(Protocol):
    """Who wants to know what experts are given."""

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        """A layer's experts come next."""

    def expert(self, number: int, weights: Weights, routing: Routing) -> Weights:
        """One expert; returns the weights that the model goes on with."""

    def end(self) -> None:
        """All experts of the layer have come."""


class Nobody:
    """A visitor who wants to know nothing."""

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        pass

    def expert(self, number: int, weights: Weights, routing: Routing) -> Weights:
        return weights

    def end(self) -> None:
        pass


class Walk:
    """One model over one set of rows.

    Args:
        rows: tokens, int64 ``[rows, length]``.
        store: where hidden states are kept from layer to layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        gates: Gates,
        stream: Stream,
        rows: torch.Tensor,
        store: Store,
    ) -> None:
        self._checkpoint = checkpoint
        self._gates = gates
        self._stream = stream
        self._store = store
        self._tokens = rows
        self._rows, self._count = len(rows), rows.numel()
        self._batches = rows.split(max(1, TOKENS // rows.shape[1]))

    @property
    def last(self) -> int:
        """The last layer that has experts."""
        return self._stream.last

    def layer(self, number: int, visitor: Visitor, progress: Progress = lambda _: None) -> None:
        """Run one layer, whose input is that of the model or in the store; store its output.

        Raises:
            QuantizeError: if its experts are routed in a way that is not known here.
        """
        with self._stream.at(number) as sites, torch.no_grad():
            answers: dict[Routed, torch.Tensor] = {}
            while (site := self._pass(number, sites, answers)) is not None:
                answers[site] = self._answer(number, site, visitor, progress)
            answers.clear()
            names = [answer_name(number, site.group) for site in sites]
        for name in ("x", "ids", "weights", *names):
            self._store.remove(name)

    def forget(self, number: int) -> None:
        """Remove what layer ``number`` was given."""
        self._store.forget(states_name(number))

    def _pass(
        self, number: int, sites: list[Routed], answers: dict[Routed, torch.Tensor]
    ) -> Routed | None:
        """All batches: up to the first experts without an answer, whose input is stored and who are
        returned; through the whole layer if all have one."""
        before = self._store.opened(states_name(number))
        target: list[torch.Tensor] = []
        waiting: Routed | None = None
        row = token = 0
        for batch in self._batches:
            end, last = row + len(batch), token + batch.numel()
            for site in sites:
                site.seen = None
                site.replay = answers[site][token:last] if site in answers else None
            # A layer may change in place what it is given.
            given = tuple(part[row:end].clone() for part in before)
            returned = self._stream.run(batch, given or None)
            if returned is not None:
                target = target or self._new(
                    {f"{states_name(number + 1)}.{i:03d}": part for i, part in enumerate(returned)},
                    self._rows,
                )
                first, parts = row, returned
            else:
                came = (site for site in sites if site.seen is not None and site.replay is None)
                waiting = next(came, None)
                if waiting is None:
                    raise QuantizeError(f"layer {number} of the model returns nothing")
                parts = flat(waiting)
                if len(parts[0]) != batch.numel():
                    raise QuantizeError(
                        f"{waiting.group.prefix}: its experts are given {len(parts[0])} of "
                        f"{batch.numel()} tokens; calibration knows experts that are given all"
                    )
                target = target or self._new(
                    dict(zip(("x", "ids", "weights"), parts, strict=True)), self._count
                )
                first = token
            for whole, part in zip(target, parts, strict=True):
                if part.is_floating_point() and not torch.isfinite(part).all():
                    raise QuantizeError(
                        f"layer {number} makes NaN or infinite numbers of the text in {part.dtype};"
                        " the source is damaged, or needs another precision (--device cpu)"
                    )
                whole[first : first + len(part)] = part
            row, token = end, last
        return waiting

    def _new(self, like: dict[str, torch.Tensor], rows: int) -> list[torch.Tensor]:
        """Tensors in the store with the shapes of ``like``, but so many ``rows``."""
        return [
            self._store.new(name, (rows, *part.shape[1:]), part.dtype)
            for name, part in like.items()
        ]

    def _answer(
        self, number: int, site: Routed, visitor: Visitor, progress: Progress
    ) -> torch.Tensor:
        """What the experts return for all tokens, ``[tokens, hidden]``."""
        group = site.group
        routing = self._routing(group)
        answer = self._store.new(answer_name(number, group), tuple(routing.x.shape), torch.float32)
        visitor.begin(number, group, routing)
        for expert in range(group.num_experts):
            weights = visitor.expert(expert, self._weights(group, expert), routing)
            for chunk in routing.of(expert):
                out = weights.out(weights.between(chunk.x)) * chunk.weights.unsqueeze(1)
                answer.index_add_(0, chunk.rows, out.float().cpu())
            progress((expert + 1) / group.num_experts)
        visitor.end()
        return answer

    def _routing(self, group: ExpertGroup, gradient: torch.Tensor | None = None) -> Routing:
        """What is in the store, after a run up to these experts."""
        x, ids, router = (self._store.open(name) for name in ("x", "ids", "weights"))
        if int(ids.max()) >= group.num_experts or int(ids.min()) < 0:
            raise QuantizeError(
                f"{group.prefix}: its router sends tokens to expert {int(ids.max())}, and there "
                f"are {group.num_experts}; calibration does not know such experts"
            )
        count, device = group.num_experts, self._stream.device
        return Routing(x, ids, router, count, device, gradient=gradient)

    def _weights(self, group: ExpertGroup, expert: int) -> Weights:
        gate = self._gates.of(group.prefix)

        def here(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self._stream.device)

        inputs = group.inputs(self._checkpoint, expert, gate.interleaved)
        biases = group.biases(self._checkpoint, expert, gate.interleaved)
        return Weights(
            tuple(map(here, inputs)),
            here(group.down(self._checkpoint, expert)),
            tuple(map(here, biases.values())),
            gate,
        )


def gradients_name(layer: int) -> str:
    """The files of the loss's gradients by what ``layer`` is given."""
    return f"gradients-{layer:05d}"


def states_name(layer: int) -> str:
    """The files of what ``layer`` is given: this, and numbers."""
    return f"states-{layer:05d}"


def answer_name(layer: int, group: ExpertGroup) -> str:
    """The file of what a layer's experts return."""
    return f"answer-{layer:05d}-{group.first}"


def flat(site: Routed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens ``[n, hidden]``, expert numbers int32 ``[n, k]``, weights float32 ``[n, k]``."""
    assert site.seen is not None
    x, ids, weights = site.seen
    if ids.is_floating_point() or ids.shape != weights.shape:
        raise QuantizeError(
            f"{site.group.prefix}: its experts are given {tuple(ids.shape)} {ids.dtype} and "
            f"{tuple(weights.shape)}; calibration knows expert numbers and as many weights"
        )
    k = ids.shape[-1]
    return x.flatten(0, -2), ids.reshape(-1, k).int(), weights.reshape(-1, k).float()
