"""Walking back: what a model's loss has for gradient by the output of each layer's experts.

The loss is what the model's own word for its next token is worth: a token is drawn from what it
predicts, at every position, and the gradient is that of its cross entropy. Their second moments are
the Fisher information (Martens, 2014, arXiv 1412.1193), so the curvature of the KL divergence from
the unquantized model: they say which errors change what the model says.

As on the way there (``quantize.calibration.walk``), memory holds a layer without its experts and
one expert. A layer with experts runs three times: up to them, without the gradients by what they
are given, and with these.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantize.calibration.routing import Routing
from quantize.calibration.stream import Returned, Routed
from quantize.calibration.walk import (
    Nobody,
    Progress,
    Visitor,
    Walk,
    Weights,
    answer_name,
    flat,
    gradients_name,
    states_name,
)
from quantize.errors import QuantizeError

SEED = 0
"""Of the tokens that are drawn."""

Outputs = list[tuple[torch.Tensor, torch.Tensor]]
"""Tensors of a run, each with the loss's gradient by it."""


class Backward(Walk):
    """A walk whose states are all in the store, from its end to its beginning."""

    def check(self) -> None:
        """Before a long way there.

        Raises:
            QuantizeError: if there is no way back; see :meth:`Stream.check_end`.
        """
        self._stream.check_end()

    def end(self, progress: Progress = lambda _: None) -> None:
        """Store the gradients by what the last layer with experts returns; see :meth:`check`."""
        after = self.last + 1
        with self._stream.end():
            states = self._store.opened(states_name(after))
            target = self._like(states, gradients_name(after))
            for row in range(self._rows):
                leaves = _leaves(part[row : row + 1] for part in states)
                with torch.enable_grad():
                    tokens = self._tokens[row : row + 1]
                    logits = self._stream.logits(tokens, _passed_on(leaves))
                self._differentiate(
                    "the model's end",
                    [(logits, _by_logits(logits.detach(), SEED + row))],
                    list(zip(leaves, (part[row : row + 1] for part in target), strict=True)),
                )
                progress((row + 1) / self._rows)

    def back(
        self,
        number: int,
        visitor: Visitor,
        further: bool = True,
        progress: Progress = lambda _: None,
    ) -> None:
        """From the gradients by what layer ``number`` returns to those by what it is given.

        Args:
            visitor: shown each expert, with the gradients by what all of them return.
            further: whether the latter are wanted.
        """
        with self._stream.at(number) as sites:
            known: dict[str, torch.Tensor] = {}
            if sites:
                known = self._experts(number, sites[0], visitor, further, progress)
            if further:
                states = self._store.opened(states_name(number))
                target = self._like(states, gradients_name(number))
                self._pass_back(number, sites, known, target)
        for name in (*known, "x", "ids", "weights", "by_answer"):
            self._store.remove(name)

    def forget_gradients(self, number: int) -> None:
        """Remove the gradients by what layer ``number`` is given."""
        self._store.forget(gradients_name(number))

    def _experts(
        self, number: int, site: Routed, visitor: Visitor, further: bool, progress: Progress
    ) -> dict[str, torch.Tensor]:
        """Show the visitor each expert; what they answer, and the gradients by their inputs."""
        group, store = site.group, self._store
        with torch.no_grad():
            self._pass(number, [site], {})
            answer = self._answer(number, site, Nobody(), lambda share: progress(share / 3))
        name = answer_name(number, group)
        by_answer = store.new("by_answer", tuple(answer.shape), torch.float32)
        self._pass_back(number, [site], {name: answer}, [], by_answer)
        routing = self._routing(group, by_answer)
        known = {name: answer}
        if further:
            router = store.open("weights")
            known["by_x"] = store.new("by_x", tuple(routing.x.shape), torch.float32)
            known["by_weights"] = store.new("by_weights", tuple(router.shape), torch.float32)
        visitor.begin(number, group, routing)
        for expert in range(group.num_experts):
            weights = self._weights(group, expert)
            visitor.expert(expert, weights, routing)
            if further:
                self._through(weights, routing, expert, known["by_x"], known["by_weights"])
            progress((1 + 2 * (expert + 1) / group.num_experts) / 3)
        visitor.end()
        return known

    def _through(
        self,
        weights: Weights,
        routing: Routing,
        expert: int,
        by_x: torch.Tensor,
        by_weights: torch.Tensor,
    ) -> None:
        """Add the gradients by one expert's inputs: tokens, and the router's weights of it."""
        for chunk in routing.of(expert):
            assert chunk.gradient is not None
            slopes = weights.slopes(chunk.x, chunk.gradient * chunk.weights.unsqueeze(1))
            with torch.no_grad():
                by_tokens = sum(
                    slope @ weight.to(slope.dtype)
                    for slope, weight in zip(slopes, weights.inputs, strict=True)
                )
                assert isinstance(by_tokens, torch.Tensor)
                by_x.index_add_(0, chunk.rows, by_tokens.float().cpu())
                out = weights.out(weights.between(chunk.x)).float()
                by_weights.view(-1)[chunk.pairs] = (out * chunk.gradient).sum(1).cpu()

    def _pass_back(
        self,
        number: int,
        sites: list[Routed],
        known: dict[str, torch.Tensor],
        target: list[torch.Tensor],
        by_answer: torch.Tensor | None = None,
    ) -> None:
        """All batches through one layer and back.

        Args:
            known: what the layer's experts answer; unless ``by_answer`` is wanted, also the
                gradients by their inputs.
            target: filled with the gradients by what the layer is given, unless ``by_answer`` is
                wanted.
            by_answer: filled with the gradients by what the experts answer.
        """
        given = self._store.opened(states_name(number))
        gradients = self._store.opened(gradients_name(number + 1))
        row = token = 0
        for batch in self._batches:
            rows, tokens = slice(row, row + len(batch)), slice(token, token + batch.numel())
            row, token = rows.stop, tokens.stop
            leaves = _leaves((part[rows] for part in given), by_answer is None)
            answers = []
            with torch.enable_grad():
                for site in sites:
                    answer = known[answer_name(number, site.group)][tokens]
                    leaf = answer.to(self._stream.device).requires_grad_()
                    answers.append(leaf)
                    site.replay = leaf.clone()  # some layers change it in place
                returned = self._stream.run(batch, _passed_on(leaves) or None)
            assert returned is not None
            outputs = list(zip(returned, (part[rows] for part in gradients), strict=True))
            if by_answer is not None:
                wanted = [(answers[0], by_answer[tokens])]
            else:
                for site in sites:
                    x, _, weights = flat(site)
                    outputs += [(x, known["by_x"][tokens]), (weights, known["by_weights"][tokens])]
                parts = (part[rows] for part in target)
                wanted = list(zip(leaves, parts, strict=True))
            self._differentiate(f"layer {number}", outputs, wanted)
            # Else a graph would live until the next one is there, and through all experts.
            del returned, outputs, wanted, answers, leaves
            for site in sites:
                site.seen = site.replay = None
            self._stream.forget()

    def _differentiate(
        self, where: str, outputs: Outputs, wanted: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Fill the second of each of ``wanted`` with the gradient by the first."""
        useful = [(out, by) for out, by in outputs if out.requires_grad]
        leaves = [leaf for leaf, _ in wanted if leaf.requires_grad]
        found: Iterator[torch.Tensor | None] = iter(())
        if useful and leaves:
            found = iter(
                torch.autograd.grad(
                    [out for out, _ in useful],
                    leaves,
                    [by.to(out.device, out.dtype) for out, by in useful],
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
                    f"{where}: the loss's gradient is NaN or infinite in {self._stream.dtype}; the "
                    "source is damaged, or needs another precision (--device cpu) or --rounding"
                )
            target.copy_(gradient)

    def _like(self, states: list[torch.Tensor], prefix: str) -> list[torch.Tensor]:
        """New tensors in the store, one for each of ``states``."""
        return [
            self._store.new(f"{prefix}.{i:03d}", tuple(part.shape), torch.float32)
            for i, part in enumerate(states)
        ]


def _leaves(parts: Iterator[torch.Tensor], wanted: bool = True) -> list[torch.Tensor]:
    """Of parts of the store, what gradients can be taken by, if ``wanted``; integers stay."""
    return [part.clone().requires_grad_(wanted and part.is_floating_point()) for part in parts]


def _passed_on(leaves: list[torch.Tensor]) -> Returned:
    """To a layer, which may change what it is given in place."""
    return tuple(leaf.clone() if leaf.requires_grad else leaf for leaf in leaves)


def _by_logits(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """The gradient of a drawn token's cross entropy by the logits ``[rows, length, vocabulary]``:
    the probabilities, less one at the token."""
    found = torch.softmax(logits.float(), -1)
    # Drawn on the host: the same on every device.
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(*found.shape[:-1], 1, generator=generator).to(found.device)
    upto = found.cumsum(-1)
    # The sum of all is not quite 1.
    token = (upto < drawn * upto[..., -1:]).sum(-1, keepdim=True).clamp_max(found.shape[-1] - 1)
    return found.scatter_add_(-1, token, torch.full_like(drawn, -1.0))
