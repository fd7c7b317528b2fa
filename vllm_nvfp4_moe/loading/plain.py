"""What is not quantized, beside the experts: refused if nothing was loaded into a parameter.

vLLM compares what a class has loaded with the model's parameters, but of models that are not
quantized alone (``quirks.UNCHECKED_PARAMETERS``). Of others, a class that passes over a name that
it does not know starts with what happens to lie in memory, and the text is noise.

A parameter counts as not loaded if the class does not report it, and its first number is still a
mark that was written before: classes report some that they leave as they were made, and load some
that they do not report. Quantized layers are left out. Experts among them have checks of their own
(``loading.checks``, ``loading.unloaded``), and vLLM fills in scales that a checkpoint lacks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from vllm_nvfp4_moe import quirks
from vllm_nvfp4_moe.errors import RefusedError

logger = logging.getLogger("vllm.nvfp4_moe.loading")

FROM_FILES = (
    "auto", "hf", "safetensors", "pt", "npcache", "mistral", "fastsafetensors", "instanttensor",
    "runai_streamer",
)  # fmt: skip
"""Values of ``--load-format`` with which the checkpoint's own tensors are loaded before weights are
processed. With others nothing is known: ``dummy``, ``sharded_state`` and what others register."""
_NAMED = 4
"""How many parameters an error names."""
_UNUSED = {"AXK1ForCausalLM": re.compile(r"(?P<layer>.*)\.post_mlp_layernorm\.weight")}
"""By class: parameters that it makes for layers without experts, too, and uses in those with
experts alone. vLLM refuses a checkpoint without them that is not quantized."""


def guard(model: torch.nn.Module, name: str, draft: bool) -> None:
    """Have ``model``, which vLLM has built and not loaded yet, look at what its first
    ``load_weights`` leaves out. Later calls, of reloads, may bring a part alone.

    Args:
        name: the checkpoint's folder, or its name on the hub.
        draft: it drafts tokens for another model, which makes the text. Then what lacks is said in
            a warning, and embeddings and heads may lack: vLLM takes the other model's.
    """
    stock: Any = model.load_weights

    def load_weights(*args: Any, **kwargs: Any) -> Any:
        del model.__dict__["load_weights"]
        marks = [_Mark(names, parameter) for names, parameter in _plain(model, draft)]
        try:
            loaded = stock(*args, **kwargs)
        finally:
            left = _left(model, marks)
        if loaded is not None:  # with None nothing is known; vLLM does not look then either
            left = [mark for mark in left if mark.names.isdisjoint(loaded)]
            _check(model, name, draft, [mark for mark in left if not _unused(model, mark.name)])
        return loaded

    model.__dict__["load_weights"] = load_weights


def _unused(model: torch.nn.Module, name: str) -> bool:
    """Whether the class makes that parameter in vain."""
    # Adapters for pooling derive classes with names of their own.
    names = (kind.__name__ for kind in type(model).__mro__)
    pattern = next((_UNUSED[name] for name in names if name in _UNUSED), None)
    match = pattern.fullmatch(name) if pattern else None
    if match is None:
        return False
    return not hasattr(model.get_submodule(f"{match['layer']}.mlp"), "experts")


def _check(model: torch.nn.Module, name: str, draft: bool, lacking: list[_Mark]) -> None:
    """Raise RefusedError if there are any; of a draft, warn."""
    if not lacking:
        return
    quirks.UNCHECKED_PARAMETERS.log()
    named = sorted(mark.name for mark in lacking)
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    effect = "hardly any draft would be right" if draft else "the text would be noise"
    problem = (
        f"{name}: nothing was loaded into {', '.join(named[:_NAMED])}{more}: the checkpoint lacks "
        f"them, or vLLM's {type(model).__name__} passes over the names that they have there, and "
        f"{effect}. Complete the download, give the tensors the names that vLLM's class reads, or "
        "try another --model-impl"
    )
    if draft:
        logger.warning("%s", problem)
    else:
        raise RefusedError(problem)


class _Mark:
    """The first number of a parameter, which is NaN until something is loaded.

    Attributes:
        names: all by which the model has the parameter: a tied head has its embedding's, too.
        name: the first of them.
    """

    def __init__(self, names: list[str], parameter: torch.nn.Parameter) -> None:
        self.names, self.name = set(names), names[0]
        head = _head(parameter)
        self._made = head.clone()
        head.fill_(torch.nan)

    def take_back(self, parameter: torch.nn.Parameter) -> bool:
        """Whether it is still there, in what is now called so; then there is again what was made
        with the model."""
        head = _head(parameter)
        left = bool(head.isnan())
        if left:
            head.copy_(self._made)
        return left


def _left(model: torch.nn.Module, marks: Iterable[_Mark]) -> list[_Mark]:
    """Those of ``marks`` that are still there. None is after this."""
    now = dict(model.named_parameters(remove_duplicate=False))
    return [
        mark
        for mark in marks
        if mark.name in now and _can_be_marked(now[mark.name]) and mark.take_back(now[mark.name])
    ]


def _plain(model: torch.nn.Module, draft: bool) -> Iterator[tuple[list[str], torch.nn.Parameter]]:
    """The parameters that some layer has that is not quantized, each with all its names."""
    found: dict[int, tuple[list[str], torch.nn.Parameter]] = {}
    plain = set()
    for path, module in model.named_modules(remove_duplicate=False):
        is_plain = _is_plain(module, draft)
        for last, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), ([], parameter))[0].append(f"{path}.{last}".lstrip("."))
            if is_plain:
                plain.add(id(parameter))
    for key in plain:
        if _can_be_marked(found[key][1]):
            yield found[key]


def _is_plain(module: torch.nn.Module, draft: bool) -> bool:
    """Whether it is no quantized layer, nor an attention whose cache is quantized, nor, of a
    draft, one that it may have of the other model."""
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        UnquantizedEmbeddingMethod,
        VocabParallelEmbedding,
    )

    if getattr(module, "_shared_memory", None) is not None:
        return False  # of several ranks, of which one alone writes (DeepSeek-V4.1's Engram tables)
    method = getattr(module, "quant_method", None)
    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
    if draft and isinstance(module, VocabParallelEmbedding):
        return False
    return method is None or isinstance(method, plain)


def _can_be_marked(parameter: torch.nn.Parameter) -> bool:
    return parameter.is_floating_point() and not parameter.is_meta and parameter.numel() > 0


def _head(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Its first number, as a view without dimensions."""
    return parameter.data[(0,) * parameter.ndim]
