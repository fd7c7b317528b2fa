"""The weights of one expert, what they compute, and the gradients through them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch

from quantize.experts.gates import Gate
from quantize.experts.group import ExpertGroup, TensorReader

Norm = Callable[[torch.Tensor], torch.Tensor]


class ExpertWeights:
    """One expert's weights, and how the model applies them.

    Attributes:
        gate_up: gate's and up's weights, or up's alone where there is no gate: each
            ``[intermediate, hidden]``, in the source's dtype.
        down: ``[hidden, intermediate]``, in the source's dtype.
        post_norm: what the model does to the product of down; None: nothing.
    """

    def __init__(
        self,
        gate_up: tuple[torch.Tensor, ...],
        down: torch.Tensor,
        biases: tuple[torch.Tensor, ...],
        gate: Gate,
        post_norm: Norm | None = None,
    ) -> None:
        self.gate_up = gate_up
        self.down = down
        self._biases = biases
        self._gate = gate
        self.post_norm = post_norm

    def on(self, device: torch.device) -> ExpertWeights:
        """Return the same weights on ``device``."""
        if self.down.device == device:
            return self
        norm = self.post_norm
        if isinstance(norm, torch.nn.Module):
            norm = deepcopy(norm).to(device)
        return ExpertWeights(
            tuple(weight.to(device) for weight in self.gate_up),
            self.down.to(device),
            tuple(bias.to(device) for bias in self._biases),
            self._gate,
            norm,
        )

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Say that ``stream`` uses weights that another has copied (``Tensor.record_stream``)."""
        for weight in (*self.gate_up, self.down, *self._biases):
            weight.record_stream(stream)

    def replaced(self, gate_up: tuple[torch.Tensor, ...], down: torch.Tensor) -> ExpertWeights:
        """The same expert with other weights."""
        return ExpertWeights(gate_up, down, self._biases, self._gate, self.post_norm)

    def intermediate(self, x: torch.Tensor, gate_up: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
        """Return down's inputs for tokens ``x`` ``[n, hidden]``: ``[n, intermediate]``, in ``x``'s
        dtype.

        Args:
            gate_up: weights to use in place of the expert's own.
        """
        biases = self._biases[:-1] or (None,) * len(self.gate_up)
        pairs = zip(gate_up or self.gate_up, biases, strict=True)
        return self._gate.apply(*(_linear(x, weight, bias) for weight, bias in pairs))

    def output(self, intermediate: torch.Tensor) -> torch.Tensor:
        """Return the expert's output ``[n, hidden]`` for the result of :meth:`intermediate`."""
        product = self._product(intermediate)
        return product if self.post_norm is None else self.post_norm(product)

    def product_gradient(self, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return the loss's gradient with respect to the product of down, ``[n, hidden]``.

        Args:
            x: tokens, ``[n, hidden]``.
            gradient: the loss's gradient with respect to :meth:`output`'s result, ``[n, hidden]``.
        """
        if self.post_norm is None:
            return gradient
        with torch.no_grad():
            product = self._product(self.intermediate(x))
        with torch.enable_grad():
            own = self.post_norm(product.requires_grad_())
        return torch.autograd.grad(own, product, gradient.to(own.dtype))[0].to(gradient.dtype)

    def gate_up_gradients(
        self, x: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return the loss's gradients with respect to the products of gate and of up with ``x``.

        Args:
            x: tokens, ``[n, hidden]``.
            gradient: the loss's gradient with respect to the product of down, ``[n, hidden]``.

        Returns:
            for each of :attr:`gate_up`, ``[n, intermediate]``, in float32 or better.
        """
        biases = self._biases[:-1] or (None,) * len(self.gate_up)
        with torch.no_grad():
            products = [_linear(x, *pair) for pair in zip(self.gate_up, biases, strict=True)]
            products = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in products]
            dtype = products[0].dtype
            intermediate_gradient = gradient.to(dtype) @ self.down.to(dtype)
        with torch.enable_grad():
            leaves = [product.requires_grad_() for product in products]
            intermediate = self._gate.apply(*leaves)
        return torch.autograd.grad(intermediate, leaves, intermediate_gradient)

    def _product(self, intermediate: torch.Tensor) -> torch.Tensor:
        return _linear(intermediate, self.down, self._biases[-1] if self._biases else None)


def read_expert(
    source: TensorReader, group: ExpertGroup, expert: int, gate: Gate, device: torch.device,
    norm: Norm | None = None,
) -> ExpertWeights:  # fmt: skip
    """Read one expert of a group.

    Args:
        norm: on ``device``, if it has weights.
    """
    gate_up = group.gate_up(source, expert, gate.interleaved)
    biases = group.biases(source, expert, gate.interleaved)
    return ExpertWeights(
        tuple(weight.to(device) for weight in gate_up),
        group.down(source, expert).to(device),
        tuple(bias.to(device) for bias in biases.values()),
        gate,
        norm,
    )


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    own = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, weight.to(x.dtype), own)
