"""A group of routed experts: the names of their tensors, and reading one expert's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from quantize.errors import QuantizeError
from quantize.experts.gates import Gate
from quantize.experts.names import layer_number


class TensorReader(Protocol):
    """An object that a group's tensors are read from, such as a ``Checkpoint``."""

    def load(self, name: str) -> torch.Tensor:
        """Read one whole tensor."""

    def load_expert(self, name: str, expert: int, experts: int | None = None) -> torch.Tensor:
        """Read ``tensor[expert]``.

        ``experts`` is the number of experts, if the tensor holds them one after another along its
        first dimension.
        """


@dataclass(frozen=True)
class ExpertGroup:
    """The routed experts of one layer, or those of one size if a layer has several sizes.

    Attributes:
        prefix: the experts' module path, such as ``model.layers.3.mlp.experts``.
        num_experts: number of experts.
        hidden: number of inputs of gate and up, and of outputs of down.
        intermediate: number of outputs of gate and of up, and of inputs of down.
        fused: whether the source stacks all experts in a few tensors.
        projections: what the written weights are called: (gate, up, down), or (up, down) without a
            gate.
        tensor_names: the names of all source tensors of this group. First come the weights. If
            fused, they are (gate_up, down) or one tensor for each of ``projections``. Otherwise
            there is one tensor for each of ``projections``, for one expert after another. Then come
            ``bias_names``, and then the tensors of experts that the model never uses.
        transposed: whether fused tensors are stored as ``[experts, in, out]``.
        bias_names: the names of the biases, in the order of the weights; empty if there are none.
        interleaved: whether the rows of a fused gate_up_proj alternate between gate and up, if its
            name tells; None if only the model's class tells.
        joined: whether a fused source has gate and up in one tensor.
        flat: whether fused tensors have two dimensions, ``[experts * intermediate, hidden]``.
        first: the number that the group's first expert has in names of tensors.
    """

    prefix: str
    num_experts: int
    hidden: int
    intermediate: int
    fused: bool
    projections: tuple[str, ...]
    tensor_names: tuple[str, ...]
    transposed: bool = False
    bias_names: tuple[str, ...] = ()
    interleaved: bool | None = None
    joined: bool = False
    flat: bool = False
    first: int = 0

    @property
    def layer(self) -> int:
        """The number of the decoder layer that holds them; 0 if its path has none."""
        return layer_number(self.prefix) or 0

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate."""
        return len(self.projections) == 3

    @property
    def parameters(self) -> int:
        """Number of weights of all experts, without biases."""
        return len(self.projections) * self.num_experts * self.hidden * self.intermediate

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The shape ``[out, in]`` of each of ``projections``."""
        wide = (self.intermediate, self.hidden)
        return (*(wide for _ in self.projections[:-1]), wide[::-1])

    def modules(self, expert: int) -> tuple[str, ...]:
        """Module paths of one expert's written weights, in the order of ``projections``."""
        return tuple(f"{self.prefix}.{self.first + expert}.{name}" for name in self.projections)

    def weights_of(self, expert: int) -> tuple[str, ...]:
        """Names of the source tensors that hold one expert's weights; that of down is last.

        Fused tensors hold all experts.
        """
        return self._of(expert, self.tensor_names)

    def tensors_of(self, expert: int) -> tuple[str, ...]:
        """Names of the source tensors that hold one expert's weights and biases.

        Fused tensors hold all experts.
        """
        return self._of(expert, self.tensor_names) + self._of(expert, self.bias_names)

    def gate_up(
        self, source: TensorReader, expert: int, interleaved: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Read one expert's (gate, up), or (up,) without a gate.

        Each is ``[intermediate, hidden]`` and has the source's dtype.

        Args:
            interleaved: whether the model's class alternates the rows of a fused gate_up_proj:
                gate, up, gate, up, ... The group's own ``interleaved`` wins, unless it is None.
        """
        parts = [self._read(source, name, expert) for name in self.weights_of(expert)[:-1]]
        return self.split(parts[0], interleaved) if self.joined else tuple(parts)

    def down(self, source: TensorReader, expert: int) -> torch.Tensor:
        """Read one expert's down: ``[hidden, intermediate]``, in the source's dtype."""
        tensor = self._read(source, self.weights_of(expert)[-1], expert)
        return tensor.T.contiguous() if self.flat else tensor

    def biases(
        self, source: TensorReader, expert: int, interleaved: bool = False
    ) -> dict[str, torch.Tensor]:
        """Read one expert's biases, by the module path of the written weight.

        Those of gate and up are ``[intermediate]``, that of down is ``[hidden]``. The result is
        empty if there are no biases. ``interleaved`` is as for :meth:`gate_up`.
        """
        names = self._of(expert, self.bias_names)
        if not names:
            return {}
        parts = [source.load_expert(n, expert) if self.fused else source.load(n) for n in names]
        if self.joined:
            parts = [*self.split(parts[0], interleaved), parts[1]]
        return dict(zip(self.modules(expert), parts, strict=True))

    def check_gate(self, gate: Gate) -> None:
        """Raise QuantizeError if ``gate`` cannot be the gate of these experts.

        Both must have a gate, or neither.
        """
        if gate.gated != self.gated:
            has, wants = ("no gate", "a gate") if gate.gated else ("a gate", "none")
            raise QuantizeError(
                f"{self.prefix}: its experts have {has}, but the model's activation, {gate}, "
                f"takes {wants}; tensors are missing, or the activation is another"
            )

    def _of(self, expert: int, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of ``projections`` (of weights or of biases) that hold this expert."""
        count = len(self.projections) - self.joined
        start = 0 if self.fused else count * expert
        return names[start : start + count]

    def _read(self, source: TensorReader, name: str, expert: int) -> torch.Tensor:
        if not self.fused:
            return source.load(name)
        tensor = source.load_expert(name, expert, self.num_experts if self.flat else None)
        return tensor.T.contiguous() if self.transposed else tensor

    def split(self, both: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up from one tensor that holds both along its first dimension.

        ``interleaved`` is as for :meth:`gate_up`.
        """
        if interleaved if self.interleaved is None else self.interleaved:
            return both[0::2].contiguous(), both[1::2].contiguous()
        gate, up = both.chunk(2)
        return gate.contiguous(), up.contiguous()


def tensor_names_of(groups: list[ExpertGroup]) -> set[str]:
    """Names of all source tensors of the ``groups``."""
    return {name for group in groups for name in group.tensor_names}
