"""GPT-OSS's experts on their way into vLLM's own class for the model.

That class reads the original's MXFP4, plain floats, and Quark's layout. It has no name for what
NVFP4 layouts store, a matrix of an expert apart from the others, and passes over it without a
word; plain floats it copies around the parameters' loaders. So tensors whose parameters are ours
are taken here (``quirks.GPT_OSS``), under the names that the class's own mapping gives them:

* one expert's, as this package and llm-compressor's "linearized" experts have them;
* stacks ``[experts, in, out]``, in which gate and up alternate: plain floats as Transformers has
  them, and ModelOpt's codes and block scales, with one global scale for all experts.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from vllm_nvfp4_moe import quirks
from vllm_nvfp4_moe.loading.loaders import WeightLoader

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

logger = init_logger("vllm.nvfp4_moe.gpt_oss")

TYPE = "gpt_oss"
"""The ``model_type`` whose checkpoints stack gate and up in alternate columns. Here they are taken
apart."""

_ONE = re.compile(
    r"(?P<experts>.*\.experts)\.(?P<expert>\d+)\."
    r"(?:(?P<matrix>gate_proj|up_proj|down_proj)\.|(?P<mapped>w2)_)(?P<suffix>\w+)"
)
"""Of one expert. ``down_proj.weight`` and some others come as ``w2_weight``."""
_ALL = re.compile(
    r"(?P<experts>.*\.experts)\.(?:routed_experts\.)?(?P<stack>w13|w2|gate_up_proj|down_proj)_"
    r"(?P<suffix>\w+)"
)
"""Of all experts. ``gate_up_proj`` comes as ``w13_weight``, ``gate_up_proj_weight_scale`` as it
is."""
_SHARDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "w2": "w2"}
_STACKED = {"w13": ("w1", "w3"), "gate_up_proj": ("w1", "w3"), "w2": ("w2",), "down_proj": ("w2",)}


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
    one, every = _ONE.fullmatch(name), _ALL.fullmatch(name)
    if one:
        shards: tuple[str, ...] = (_SHARDS[one["matrix"] or one["mapped"]],)
    elif every:
        shards = _STACKED[every["stack"]]
    else:
        return None
    found = one or every
    assert found is not None
    prefix = "w2" if shards == ("w2",) else "w13"
    target = f"{found['experts']}.routed_experts.{prefix}_{found['suffix']}"
    own = loader_of(parameters.get(target))
    if own is None:
        return None
    if one:
        parts: Any = [(shards[0], int(one["expert"]), tensor)]
    else:
        parts = _parts(shards, tensor, own.loads.experts)
    parameter: Any = parameters[target]
    for shard, expert, part in parts:
        parameter.weight_loader(
            parameter, part, weight_name=target, shard_id=shard, expert_id=expert
        )
    return target


def loader_of(parameter: Any) -> WeightLoader | None:
    """Our loader of ``parameter``, beneath what vLLM's reloading wraps it in; None if it has
    another."""
    own = inspect.unwrap(getattr(parameter, "weight_loader", lambda: None))
    return own if isinstance(own, WeightLoader) else None


def _parts(
    shards: tuple[str, ...], tensor: torch.Tensor, experts: int
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """(matrix, expert, its tensor) of a stack ``[experts, in, out]``, of biases ``[experts, out]``,
    and of a number that is all experts'."""
    for expert, whole in enumerate(tensor.expand(experts) if tensor.ndim == 0 else tensor):
        for place, shard in enumerate(shards):
            part = whole if whole.ndim == 0 else whole[..., place :: len(shards)]
            yield shard, expert, part.T if part.ndim == 2 else part


def doubt(model: str) -> None:
    """Say what cannot be seen of ``model``, a GPT-OSS that another tool has written in
    compressed-tensors' layout."""
    logger.warning_once(
        "%s: its experts' gate_proj and up_proj are taken for gate and up. Versions of "
        "llm-compressor before September 2026 (pull request 3100) split GPT-OSS's stacks in halves "
        "instead, in which gate and up alternate: of those the text would be wrong, without any "
        "other sign. Quantize the original again with: nvfp4-moe quantize SOURCE TARGET",
        model,
    )
