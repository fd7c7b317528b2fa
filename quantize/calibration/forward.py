"""Running a model forward over calibration text: one layer at a time, and one expert at a time.

For each layer, this runs the layer up to its experts and stores the experts' inputs; it computes
each expert for all its tokens at once, after showing it to a visitor; then it runs the layer again
with what the experts returned. So memory holds one layer without its experts and one expert,
whatever the size of the model, and every tensor of the checkpoint is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial

import torch

from quantize.calibration.chain import check_chain
from quantize.calibration.expert_weights import ExpertWeights, read_expert
from quantize.calibration.layerwise import LayerwiseModel
from quantize.calibration.read_ahead import experts_in_order
from quantize.calibration.room import sums_for
from quantize.calibration.routing import Routing
from quantize.calibration.stand_ins import ReplayExperts
from quantize.calibration.store import Store, experts_output_name, routed_names, states_name
from quantize.calibration.visitor import Visitor
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.gates import Gates
from quantize.experts.group import ExpertGroup

TOKENS_PER_RUN = 4096
"""About so many tokens go through a layer in one run."""

ShareDone = Callable[[float, str], None]
"""Is told which share of a step is done, and which part of it was the last."""


class LayerwiseForward:
    """One model and one set of texts.

    Args:
        samples: tokens, int64 ``[num_samples, sequence_length]``.
        store: where hidden states are kept from layer to layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        gates: Gates,
        model: LayerwiseModel,
        samples: torch.Tensor,
        store: Store,
    ) -> None:
        self._checkpoint = checkpoint
        self._gates = gates
        self._model = model
        self._store = store
        self._samples = samples
        self._batches = samples.split(max(1, TOKENS_PER_RUN // samples.shape[1]))

    @property
    def last(self) -> int:
        """The number of the last layer that has experts."""
        return self._model.last

    def layer_forward(
        self, layer: int, visitor: Visitor, progress: ShareDone = lambda *_: None
    ) -> None:
        """Run one layer on all texts, and store its outputs.

        Its inputs must be in the store, unless it is the first.

        Args:
            visitor: is shown each of its experts.

        Raises:
            QuantizeError: if its experts are routed in a way that calibration does not know, or if
                the layer is given more than the output of the one before it.
        """
        if layer:
            states = tuple(part[:1] for part in self._store.open_all(states_name(layer)))
            check_chain(self._model, range(layer, layer + 1), self._samples[:1], states)
        with self._model.loaded(layer) as stand_ins, torch.no_grad():
            outputs: dict[ReplayExperts, torch.Tensor] = {}
            while (waiting := self._run_batches(layer, stand_ins, outputs)) is not None:
                outputs[waiting] = self._compute_experts(layer, waiting, visitor, progress)
            outputs.clear()
            groups = [stand_in.group for stand_in in stand_ins]
        for group in groups:
            for name in (*routed_names(layer, group), experts_output_name(layer, group)):
                self._store.remove(name)

    def remove_states(self, layer: int) -> None:
        """Remove a layer's inputs from the store."""
        self._store.remove_all(states_name(layer))

    def _run_batches(
        self,
        layer: int,
        stand_ins: list[ReplayExperts],
        outputs: dict[ReplayExperts, torch.Tensor],
    ) -> ReplayExperts | None:
        """Run all batches up to the layer's first experts whose outputs are not known yet, and
        store these experts' inputs; or through the whole layer, and store its outputs.

        Args:
            outputs: those that are known, ``[tokens, hidden]``.

        Returns:
            the experts that the runs stopped at; None if they went through.
        """
        inputs = self._store.open_all(states_name(layer))
        target: list[torch.Tensor] = []
        waiting: ReplayExperts | None = None
        sample = token = 0
        for batch in self._batches:
            end, last = sample + len(batch), token + batch.numel()
            for stand_in in stand_ins:
                stand_in.seen = None
                known = stand_in in outputs
                stand_in.replay = outputs[stand_in][token:last] if known else None
            # A layer may change its input in place.
            states = tuple(part[sample:end].clone() for part in inputs)
            returned = self._model.run(batch, states or None)
            if returned is not None:
                target = target or self._new(
                    {f"{states_name(layer + 1)}.{i:03d}": part for i, part in enumerate(returned)},
                    len(self._samples),
                )
                first, parts = sample, returned
            else:
                came = (each for each in stand_ins if each.seen is not None and each.replay is None)
                waiting = next(came, None)
                if waiting is None:
                    raise QuantizeError(f"layer {layer} of the model returns nothing")
                parts = waiting.routed()
                if len(parts[0]) != batch.numel():
                    raise QuantizeError(
                        f"{waiting.group.prefix}: its experts are given {len(parts[0])} of "
                        f"{batch.numel()} tokens; calibration knows experts that are given all"
                    )
                names = routed_names(layer, waiting.group)[:3]
                target = target or self._new(
                    dict(zip(names, parts, strict=True)), self._samples.numel()
                )
                first = token
            for whole, part in zip(target, parts, strict=True):
                if part.is_floating_point() and not torch.isfinite(part).all():
                    raise QuantizeError(
                        f"layer {layer} makes NaN or infinite numbers of the text in {part.dtype};"
                        " the source is damaged, or needs another precision (--device cpu)"
                    )
                whole[first : first + len(part)] = part
            sample, token = end, last
        return waiting

    def _new(self, like: dict[str, torch.Tensor], count: int) -> list[torch.Tensor]:
        """Make tensors in the store as those in ``like`` are, with ``count`` in the first
        dimension."""
        return [
            self._store.new(name, (count, *part.shape[1:]), part.dtype)
            for name, part in like.items()
        ]

    def _compute_experts(
        self, layer: int, stand_in: ReplayExperts, visitor: Visitor, progress: ShareDone
    ) -> torch.Tensor:
        """Compute the experts' outputs for all tokens, ``[tokens, hidden]``."""
        group = stand_in.group
        routing = self._routing(layer, group)
        shape = tuple(routing.x.shape)
        output = self._store.new(experts_output_name(layer, group), shape, torch.float32)
        sums = sums_for(output, self._model.device)
        visitor.begin(layer, group, routing)
        with self._experts_in_order(stand_in) as read:
            for expert, original in enumerate(read):
                weights = visitor.expert(expert, original, routing)
                for chunk in routing.of(expert):
                    own = weights.output(weights.intermediate(chunk.x)) * chunk.weights.unsqueeze(1)
                    sums.index_add_(0, chunk.tokens.to(sums.device), own.float().to(sums.device))
                done = expert + 1 - visitor.behind
                progress(done / group.num_experts, f"expert {done} of {group.num_experts}")
        visitor.end()
        if sums is not output:
            output.copy_(sums)
        return output

    def _routing(
        self, layer: int, group: ExpertGroup, gradient: torch.Tensor | None = None
    ) -> Routing:
        """Return the experts' inputs, which a run up to them has stored."""
        x, ids, router = map(self._store.open, routed_names(layer, group)[:3])
        if int(ids.max()) >= group.num_experts or int(ids.min()) < 0:
            raise QuantizeError(
                f"{group.prefix}: its router sends tokens to expert {int(ids.max())}, and there "
                f"are {group.num_experts}; calibration does not know such experts"
            )
        return Routing(x, ids, router, group.num_experts, self._model.device, gradient=gradient)

    def _experts_in_order(
        self, stand_in: ReplayExperts
    ) -> closing[Generator[ExpertWeights, None, None]]:
        """A context with each expert's weights in turn; also if something fails, no thread reads
        on behind it."""
        read = partial(self._expert_weights, stand_in)
        return closing(experts_in_order(read, stand_in.group.num_experts, self._model.device))

    def _expert_weights(self, stand_in: ReplayExperts, expert: int) -> ExpertWeights:
        group = stand_in.group
        gate = self._gates.of(group.prefix)
        norm = stand_in.original.post_expert_norm if gate.post_norm else None
        return read_expert(self._checkpoint, group, expert, gate, self._model.device, norm)
