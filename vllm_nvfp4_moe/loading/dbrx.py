"""DBRX's experts on their way into vLLM's own class for the model (``quirks.DBRX``).

That class has no names for one expert's tensors, and looks for the original's flat stacks'
parameters by a name that they no longer have. So tensors whose parameters are ours are taken here:

* one expert's, as this package writes them;
* plain floats of all experts, ``mlp.w1``, ``mlp.v1`` and ``mlp.w2``, each ``[experts *
  intermediate, hidden]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from vllm_nvfp4_moe import quirks
from vllm_nvfp4_moe.loading import gpt_oss

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

_FLAT = re.compile(r"(?P<experts>.*\.experts)\.mlp\.(?P<matrix>w1|v1|w2)")
_SHARDS = {"w1": "w1", "v1": "w3", "w2": "w2"}


def load_by_parameter(layer: RoutedExperts) -> None:
    """If ``layer`` belongs to vLLM's own class for DBRX, have that class give our parameters what
    is stored for them (``quirks.DBRX``)."""
    if type(layer).__name__ != "DbrxExperts":
        return
    from vllm.model_executor.models.dbrx import DbrxModel

    stock: Any = DbrxModel.load_weights
    if stock.__module__ == __name__:
        return

    def load_weights(
        self: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> set[str]:
        parameters = dict(self.named_parameters())
        taken: set[str] = set()

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                parameter = take(name, tensor, parameters)
                if parameter is None:
                    yield name, tensor
                else:
                    quirks.DBRX.log()
                    taken.add(parameter)

        loaded: set[str] = stock(self, others())
        return loaded | taken

    DbrxModel.load_weights = load_weights


def take(name: str, tensor: torch.Tensor, parameters: dict[str, torch.nn.Parameter]) -> str | None:
    """As ``gpt_oss.take``, which takes one expert's; flat stacks, too."""
    flat = _FLAT.fullmatch(name)
    if not flat:
        return gpt_oss.take(name, tensor, parameters)
    shard = _SHARDS[flat["matrix"]]
    prefix = "w2" if shard == "w2" else "w13"
    target = f"{flat['experts']}.routed_experts.{prefix}_weight"
    own = gpt_oss.loader_of(parameters.get(target))
    if own is None:
        return None
    if len(tensor) % own.loads.experts:
        own.loads.refuse(
            f"{name}: its {len(tensor)} rows cannot be shared out among {own.loads.experts} "
            "experts; the checkpoint is damaged, or its config is another model's"
        )
    stack = tensor.unflatten(0, (own.loads.experts, -1))
    parameter: Any = parameters[target]
    parameter.weight_loader(
        parameter, stack.mT if shard == "w2" else stack,
        weight_name=target, shard_id=shard, expert_id=0,
    )  # fmt: skip
    return target
