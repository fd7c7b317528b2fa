"""The routed experts of one layer: where their tensors are, and how one expert is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from quantize.errors import QuantizeError
from quantize.experts.gates import Gate


class Source(Protocol):
    """Where a group's tensors are read from; ``Checkpoint`` is one."""

    def load(self, name: str) -> torch.Tensor:
        """One whole tensor."""

    def load_expert(self, name: str, expert: int, experts: int | None = None) -> torch.Tensor:
        """``tensor[expert]``; of so many ``experts`` in the first dimension, if given."""


@dataclass(frozen=True)
class ExpertGroup:
    """The routed experts of one layer, or those of one size.

    Attributes:
        prefix: module path, such as ``model.layers.3.mlp.experts``.
        num_experts: how many.
        hidden: inputs of gate and up, outputs of down.
        intermediate: outputs of gate and of up, inputs of down.
        fused: whether the source stacks all experts in a few tensors.
        names: (gate, up, down) or, without a gate, (up, down): what the written weights are called.
        sources: all its tensors in the source. First the weights: fused: (gate_up, down), or one
            for each of ``names``; else one for each of ``names``, for one expert after another.
            Then ``bias_names``; then tensors of experts that the model never uses.
        transposed: fused tensors are stored ``[experts, in, out]``.
        bias_names: the biases, in the order of the weights; empty if there are none.
        interleaved: how the rows of a fused gate_up are ordered, where its name says so; None: as
            in the model's class.
        joined: a fused source has gate and up in one tensor.
        flat: fused tensors have two dimensions, ``[experts * intermediate, hidden]``.
        first: the number of its first expert in names.
    """

    prefix: str
    num_experts: int
    hidden: int
    intermediate: int
    fused: bool
    names: tuple[str, ...]
    sources: tuple[str, ...]
    transposed: bool = False
    bias_names: tuple[str, ...] = ()
    interleaved: bool | None = None
    joined: bool = False
    flat: bool = False
    first: int = 0

    @property
    def gated(self) -> bool:
        """Whether its experts have a gate."""
        return len(self.names) == 3

    @property
    def parameters(self) -> int:
        """Weights in all its experts, without biases."""
        return len(self.names) * self.num_experts * self.hidden * self.intermediate

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """``[out, in]`` of each of ``names``."""
        wide = (self.intermediate, self.hidden)
        return (*(wide for _ in self.names[:-1]), wide[::-1])

    def modules(self, expert: int) -> tuple[str, ...]:
        """Module paths of one expert's written weights, as ``names``."""
        return tuple(f"{self.prefix}.{self.first + expert}.{name}" for name in self.names)

    def weights_of(self, expert: int) -> tuple[str, ...]:
        """The source tensors of one expert's weights, down's last; fused: those of all experts."""
        return self._of(expert, self.sources)

    def sources_of(self, expert: int) -> tuple[str, ...]:
        """The source tensors of one expert, biases included; fused: those of all experts."""
        return self._of(expert, self.sources) + self._of(expert, self.bias_names)

    def inputs(
        self, source: Source, expert: int, interleaved: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """One expert's (gate, up), or (up,): ``[intermediate, hidden]``, in the source's dtype.

        ``interleaved`` says how the class orders a fused source's rows: gate, up, gate, up, ...
        """
        parts = [self._read(source, name, expert) for name in self.weights_of(expert)[:-1]]
        return self._split(parts[0], interleaved) if self.joined else tuple(parts)

    def down(self, source: Source, expert: int) -> torch.Tensor:
        """One expert's down, ``[hidden, intermediate]``, in the source's dtype."""
        tensor = self._read(source, self.weights_of(expert)[-1], expert)
        return tensor.T.contiguous() if self.flat else tensor

    def biases(
        self, source: Source, expert: int, interleaved: bool = False
    ) -> dict[str, torch.Tensor]:
        """One expert's biases by written module: ``[intermediate]``, down's ``[hidden]``.

        Empty if there are none; ``interleaved`` as for :meth:`inputs`.
        """
        names = self._of(expert, self.bias_names)
        if not names:
            return {}
        parts = [source.load_expert(n, expert) if self.fused else source.load(n) for n in names]
        if self.joined:
            parts = [*self._split(parts[0], interleaved), parts[1]]
        return dict(zip(self.modules(expert), parts, strict=True))

    def check_gate(self, gate: Gate) -> None:
        """Raise QuantizeError if ``gate`` cannot be that of these experts."""
        if gate.gated != self.gated:
            has, wants = ("no gate", "a gate") if gate.gated else ("a gate", "none")
            raise QuantizeError(
                f"{self.prefix}: its experts have {has}, but the model's activation, {gate}, "
                f"takes {wants}; tensors are missing, or the activation is another"
            )

    def _of(self, expert: int, names: tuple[str, ...]) -> tuple[str, ...]:
        count = len(self.names) - self.joined
        start = 0 if self.fused else count * expert
        return names[start : start + count]

    def _read(self, source: Source, name: str, expert: int) -> torch.Tensor:
        if not self.fused:
            return source.load(name)
        tensor = source.load_expert(name, expert, self.num_experts if self.flat else None)
        return tensor.T.contiguous() if self.transposed else tensor

    def _split(self, both: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if interleaved if self.interleaved is None else self.interleaved:
            return both[0::2].contiguous(), both[1::2].contiguous()
        gate, up = both.chunk(2)
        return gate.contiguous(), up.contiguous()


def source_names(groups: list[ExpertGroup]) -> set[str]:
    """The source tensors of all ``groups``: every other tensor stays as it is."""
    return {name for group in groups for name in group.sources}
