"""Running a model backward over calibration text: the loss's gradients at each layer's experts.

The loss is the cross entropy of tokens that the model itself predicts: one token is drawn from its
prediction at every position. The second moments of this loss's gradients are the Fisher information
(Martens, 2014, arXiv 1412.1193), which is the curvature of the KL divergence from the unquantized
model. So they say which errors change the model's predictions.

As in the forward pass (``quantize.calibration.forward``), memory holds one layer without its
experts and one expert. A layer with experts runs three times: up to its experts; then backward to
their outputs; and, once the gradients with respect to the experts' inputs are known, backward to
the layer's own inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.forward import LayerwiseForward, ShareDone
from quantize.calibration.layerwise import LayerwiseModel, States
from quantize.calibration.model_end import ModelEnd
from quantize.calibration.room import sums_for
from quantize.calibration.routing import Routing
from quantize.calibration.stand_ins import ReplayExperts
from quantize.calibration.store import (
    Store,
    experts_output_name,
    gradients_name,
    routed_names,
    states_name,
)
from quantize.calibration.visitor import NullVisitor, Visitor
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.gates import Gates

SEED = 0
"""The seed for drawing tokens: sample ``n`` uses ``SEED + n``."""

Pairs = list[tuple[torch.Tensor, torch.Tensor]]
"""Tensors of a run, each with the loss's gradient with respect to it."""


class ExpertGradients(NamedTuple):
    """A layer's experts as the rest of the layer sees them.

    Attributes:
        output: what they return, float32 ``[tokens, hidden]``.
        x, weights: the loss's gradients with respect to their inputs, float32 ``[tokens, hidden]``,
            and to the router's weights, float32 ``[tokens, k]``; None where they are not wanted.
    """

    output: torch.Tensor
    x: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class LayerwiseBackward(LayerwiseForward):
    """A forward pass, and the backward pass over the states that it has left in the store.

    Args:
        samples, store: see :class:`LayerwiseForward`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        gates: Gates,
        model: LayerwiseModel,
        samples: torch.Tensor,
        store: Store,
    ) -> None:
        super().__init__(checkpoint, gates, model, samples, store)
        self._end = ModelEnd(model)

    def check(self) -> None:
        """See that a backward pass is possible, before a long forward pass.

        Raises:
            QuantizeError: if it is not; see :meth:`ModelEnd.check`.
        """
        self._end.check()

    def end_backward(self, progress: ShareDone = lambda *_: None) -> None:
        """Store the gradients with respect to the outputs of the last layer with experts."""
        after = self.last + 1
        with self._end.loaded():
            states = self._store.open_all(states_name(after))
            target = self._new_gradients(states, gradients_name(after))
            for sample in range(len(self._samples)):
                this = slice(sample, sample + 1)
                leaves = _leaves(part[this] for part in states)
                with torch.enable_grad():
                    logits = self._end.logits(self._samples[this], _copies(leaves))
                self._differentiate(
                    "the model's end",
                    [(logits, _logits_gradient(logits.detach(), SEED + sample))],
                    list(zip(leaves, (part[this] for part in target), strict=True)),
                )
                done, texts = sample + 1, len(self._samples)
                progress(done / texts, f"text {done} of {texts}")

    def layer_backward(
        self,
        layer: int,
        visitor: Visitor,
        input_gradients: bool = True,
        progress: ShareDone = lambda *_: None,
    ) -> None:
        """Go back through one layer, from the gradients with respect to its outputs.

        Args:
            visitor: is shown each of its experts, with the gradients with respect to their sum.
            input_gradients: store the gradients with respect to its inputs.
        """
        with self._model.loaded(layer) as stand_ins:
            experts: ExpertGradients | None = None
            stand_in = next(iter(stand_ins), None)  # there is no other, see check
            if stand_in is not None:
                experts = self._experts_backward(
                    layer, stand_in, visitor, input_gradients, progress
                )
            if input_gradients:
                states = self._store.open_all(states_name(layer))
                target = self._new_gradients(states, gradients_name(layer))
                self._run_backward(layer, stand_in, experts, target)
            groups = [stand_in.group for stand_in in stand_ins]
        for group in groups:
            for name in (*routed_names(layer, group), experts_output_name(layer, group)):
                self._store.remove(name)
        for name in ("grad_x", "grad_weights"):
            self._store.remove(name)

    def remove_gradients(self, layer: int) -> None:
        """Remove the gradients with respect to a layer's inputs from the store."""
        self._store.remove_all(gradients_name(layer))

    def _experts_backward(
        self,
        layer: int,
        stand_in: ReplayExperts,
        visitor: Visitor,
        input_gradients: bool,
        progress: ShareDone,
    ) -> ExpertGradients:
        """Show the visitor each expert; return their output, and the gradients at their inputs."""
        group, store = stand_in.group, self._store
        with torch.no_grad():
            self._run_batches(layer, [stand_in], {})
            output = self._compute_experts(
                layer, stand_in, NullVisitor(), lambda share, part: progress(share / 3, part)
            )
        *_, router_name, gradient_name = routed_names(layer, group)
        grad_output = store.new(gradient_name, tuple(output.shape), torch.float32)
        found = ExpertGradients(output)
        self._run_backward(layer, stand_in, found, [], grad_output)
        routing = self._routing(layer, group, grad_output)
        if input_gradients:
            router = store.open(router_name)
            found = ExpertGradients(
                output,
                store.new("grad_x", tuple(routing.x.shape), torch.float32),
                store.new("grad_weights", tuple(router.shape), torch.float32),
            )
        sums = None if found.x is None else sums_for(found.x, self._model.device)
        visitor.begin(layer, group, routing)
        with self._experts_in_order(stand_in) as read:
            for expert, weights in enumerate(read):
                visitor.expert(expert, weights, routing)
                if sums is not None:
                    _add_input_gradients(weights, routing, expert, found, sums)
                done, experts = expert + 1 - visitor.behind, group.num_experts
                progress((1 + 2 * done / experts) / 3, f"expert {done} of {experts}")
        visitor.end()
        if found.x is not None and sums is not None and sums is not found.x:
            found.x.copy_(sums)
        return found

    def _run_backward(
        self,
        layer: int,
        stand_in: ReplayExperts | None,
        experts: ExpertGradients | None,
        target: list[torch.Tensor],
        grad_output: torch.Tensor | None = None,
    ) -> None:
        """Run all batches through one layer and back: to its experts' outputs, or to its inputs.

        Args:
            stand_in, experts: the layer's; None if it has none.
            target: is filled with the gradients with respect to the layer's inputs, unless
                ``grad_output`` is given.
            grad_output: is filled with the gradients with respect to the experts' output.
        """
        inputs = self._store.open_all(states_name(layer))
        gradients = self._store.open_all(gradients_name(layer + 1))
        sample = token = 0
        for batch in self._batches:
            samples = slice(sample, sample + len(batch))
            tokens = slice(token, token + batch.numel())
            sample, token = samples.stop, tokens.stop
            leaves = _leaves((part[samples] for part in inputs), grad_output is None)
            output = None
            with torch.enable_grad():
                if stand_in is not None and experts is not None:
                    output = experts.output[tokens].to(self._model.device).requires_grad_()
                    stand_in.replay = output.clone()  # some layers change it in place
                returned = self._model.run(batch, _copies(leaves) or None)
            assert returned is not None
            pairs = list(zip(returned, (part[samples] for part in gradients), strict=True))
            if grad_output is not None:
                assert output is not None
                wanted = [(output, grad_output[tokens])]
            else:
                if stand_in is not None and experts is not None:
                    assert experts.x is not None and experts.weights is not None
                    x, _, weights = stand_in.routed()
                    pairs += [(x, experts.x[tokens]), (weights, experts.weights[tokens])]
                parts = (part[samples] for part in target)
                wanted = list(zip(leaves, parts, strict=True))
            self._differentiate(f"layer {layer}", pairs, wanted)
            # Else a graph would live until the next one is there, and through all experts.
            del returned, pairs, wanted, output, leaves
            if stand_in is not None:
                stand_in.seen = stand_in.replay = None
            self._model.release()

    def _differentiate(self, where: str, pairs: Pairs, wanted: Pairs) -> None:
        """Fill the second of each pair in ``wanted`` with the gradient with respect to the first.

        Raises:
            QuantizeError: if a gradient is NaN or infinite.
        """
        useful = [(out, gradient) for out, gradient in pairs if out.requires_grad]
        leaves = [leaf for leaf, _ in wanted if leaf.requires_grad]
        found: Iterator[torch.Tensor | None] = iter(())
        if useful and leaves:
            found = iter(
                torch.autograd.grad(
                    [out for out, _ in useful],
                    leaves,
                    [gradient.to(out.device, out.dtype) for out, gradient in useful],
                    allow_unused=True,
                )
            )
        for leaf, target in wanted:
            gradient = next(found, None) if leaf.requires_grad else None
            if gradient is None:
                target.zero_()
                continue
            if not torch.isfinite(gradient).all():
                raise QuantizeError(
                    f"{where}: the loss's gradient is NaN or infinite in {self._model.dtype}; the "
                    "source is damaged, or needs another precision (--device cpu) or --rounding"
                )
            target.copy_(gradient)

    def _new_gradients(self, states: list[torch.Tensor], prefix: str) -> list[torch.Tensor]:
        """Make a tensor in the store for the gradient with respect to each of ``states``."""
        return [
            self._store.new(f"{prefix}.{i:03d}", tuple(part.shape), torch.float32)
            for i, part in enumerate(states)
        ]


def _add_input_gradients(
    weights: ExpertWeights,
    routing: Routing,
    expert: int,
    found: ExpertGradients,
    sums: torch.Tensor,
) -> None:
    """Add to ``sums`` the gradients with respect to one expert's inputs, and set those with respect
    to the router's weights of it in ``found``."""
    assert found.weights is not None
    for chunk in routing.of(expert):
        assert chunk.gradient is not None
        gradient = chunk.gradient * chunk.weights.unsqueeze(1)
        gradients = weights.gate_up_gradients(chunk.x, weights.product_gradient(chunk.x, gradient))
        with torch.no_grad():
            grad_x = sum(
                gradient @ weight.to(gradient.dtype)
                for gradient, weight in zip(gradients, weights.gate_up, strict=True)
            )
            assert isinstance(grad_x, torch.Tensor)
            sums.index_add_(0, chunk.tokens.to(sums.device), grad_x.float().to(sums.device))
            own = weights.output(weights.intermediate(chunk.x)).float()
            found.weights.view(-1)[chunk.pairs] = (own * chunk.gradient).sum(1).cpu()


def _leaves(parts: Iterator[torch.Tensor], wanted: bool = True) -> list[torch.Tensor]:
    """Copy parts of the store; gradients can be taken with respect to the copies, if ``wanted``
    and they are no integers."""
    return [part.clone().requires_grad_(wanted and part.is_floating_point()) for part in parts]


def _copies(leaves: list[torch.Tensor]) -> States:
    """Copy leaves for a layer, which may change its input in place."""
    return tuple(leaf.clone() if leaf.requires_grad else leaf for leaf in leaves)


def _logits_gradient(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw a token from each prediction, and return the gradient of its cross entropy.

    Args:
        logits: ``[texts, sequence_length, vocabulary]``.

    Returns:
        the gradient with respect to ``logits``, in float32: the probabilities, less one at the
        token that was drawn.
    """
    found = torch.softmax(logits.float(), -1)
    # Drawn on the host: the same on every device.
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(*found.shape[:-1], 1, generator=generator).to(found.device)
    upto = found.cumsum(-1)
    # The sum of all is not quite 1.
    token = (upto < drawn * upto[..., -1:]).sum(-1, keepdim=True).clamp_max(found.shape[-1] - 1)
    return found.scatter_add_(-1, token, torch.full_like(drawn, -1.0))
