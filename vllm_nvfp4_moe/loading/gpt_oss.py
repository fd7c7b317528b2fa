"""GPT-OSS's experts on their way into vLLM's own class for the model.

That class reads the original's MXFP4, plain floats, and Quark's layout. It has no name for what
NVFP4 layouts store, a matrix of an expert apart from the others, and passes over it without a
word; plain floats it copies around the parameters' loaders. So tensors whose parameters are ours
are taken here (``quirks.GPT_OSS``), under the names that the class's own mapping gives them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from vllm_nvfp4_moe import quirks
from vllm_nvfp4_moe.loading.loaders import WeightLoader

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

TYPE = "gpt_oss"
"""The ``model_type`` whose checkpoints stack gate and up in alternate columns. Here they are taken
apart."""

_SHARDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "w2": "w2"}
_ONE = re.compile(
    r"(?P<experts>.*\.experts)\.(?P<expert>\d+)\."
    r"(?:(?P<matrix>gate_proj|up_proj|down_proj)\.|(?P<mapped>w2)_)(?P<suffix>\w+)"
)
"""Of one expert. ``down_proj.weight`` and some others come as ``w2_weight``."""
_ALL = re.compile(
    r"(?P<experts>.*\.experts)\.(?:routed_experts\.)?(?P<prefix>w13|w2)_(?P<suffix>\w+)"
)
"""Of all experts: ``gate_up_proj``, ``down_proj_bias`` and so on, by the class's mapping."""


def load_by_parameter(layer: RoutedExperts) -> None:
    """If ``layer`` belongs to vLLM's own class for GPT-OSS, have that class give our parameters
    what is stored for them (``quirks.GPT_OSS``)."""
    if type(layer).__name__ != "GptOssRoutedExperts":
        return
    from vllm.model_executor.models.gpt_oss import GptOssModel

    stock: Any = GptOssModel._try_load_streamed_expert
    if stock.__module__ == __name__:
        return

    # vLLM calls this with each tensor, before it looks at names of its own.
    def _try_load_streamed_expert(
        cls: type,
        name: str,
        loaded_weight: torch.Tensor,
        params_dict: dict[str, torch.nn.Parameter],
        loaded_params: set[str],
    ) -> bool:
        parameter = take(name, loaded_weight, params_dict)
        if parameter is None:
            taken: bool = stock.__func__(cls, name, loaded_weight, params_dict, loaded_params)
            return taken
        quirks.GPT_OSS.log()
        loaded_params.add(parameter)
        return True

    GptOssModel._try_load_streamed_expert = classmethod(_try_load_streamed_expert)


def take(name: str, tensor: torch.Tensor, parameters: dict[str, torch.nn.Parameter]) -> str | None:
    """Load ``tensor`` if it is for a parameter of ours.

    Args:
        name: after the mapping of names by vLLM's class.
        parameters: the model's, by name.

    Returns:
        The parameter's name; None if the tensor is not ours.
    """
    if found := _ONE.fullmatch(name):
        shard = _SHARDS[found["matrix"] or found["mapped"]]
        target = f"{found['experts']}.routed_experts.{_prefix(shard)}_{found['suffix']}"
        parts: Any = [(shard, int(found["expert"]), tensor)]
    elif found := _ALL.fullmatch(name):
        target = f"{found['experts']}.routed_experts.{found['prefix']}_{found['suffix']}"
        parts = _parts(found["prefix"], found["suffix"], tensor)
    else:
        return None
    parameter: Any = parameters.get(target)
    loader = getattr(parameter, "weight_loader", None)
    if loader is None or not isinstance(inspect.unwrap(loader), WeightLoader):
        return None
    for shard, expert, part in parts:
        loader(parameter, part, weight_name=target, shard_id=shard, expert_id=expert)
    return target


def _prefix(shard: str) -> str:
    return "w2" if shard == "w2" else "w13"


def _parts(
    prefix: str, suffix: str, stack: torch.Tensor
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """(matrix, expert, tensor) of a stack ``[experts, in, out]``, or of biases ``[experts, out]``.
    Columns of gate and up alternate."""
    for expert, whole in enumerate(stack):
        matrices = [whole] if prefix == "w2" else [whole[..., 0::2], whole[..., 1::2]]
        for shard, matrix in zip(
            ("w2",) if prefix == "w2" else ("w1", "w3"), matrices, strict=True
        ):
            yield shard, expert, matrix if suffix == "bias" else matrix.T
