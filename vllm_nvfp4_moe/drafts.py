"""Layers that draft tokens (multi-token prediction): which they are, by the names vLLM gives them,
and which of them are NVFP4.

vLLM builds them under the quantization config of the model that they draft for, and names their
modules otherwise than the checkpoint does. The checkpoint's lists of what is not quantized do not
reach them then; some lists leave them out altogether, since the quantizer never saw the layers
(vLLM's issues 43455 and 44087, ModelOpt's 750). So headers tell, not lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from quantize.experts.drafting import is_drafting

_VLLM = re.compile(r"(?:^|\.)(?:mtp_block|eh_proj|shared_head)(?:\.|$)")
"""Modules that vLLM's classes have in such layers, and in no others."""

_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.|$)")


_MINIMAX_M3 = "MiniMaxM3SparseForConditionalGeneration"


def name_in_files(prefix: str, architecture: str | None) -> str:
    """What the checkpoint calls the module that vLLM calls ``prefix``, where that could be taken
    for another: vLLM gives MiniMax-M3's drafting layers the names of the first layers of a model
    without pictures. All other names stay.

    Args:
        architecture: of the model that is drafted for.
    """
    if architecture != _MINIMAX_M3:
        return prefix
    kept = re.sub(
        r"^model\.layers\.(\d+)\.(?!eh_proj)", r"model.layers.\1.transformer_layer.", prefix
    )
    return re.sub(r"^model\.layers\.", "language_model.model.mtp.layers.", kept)


def is_draft(prefix: str, num_layers: int | None) -> bool:
    """Whether the module at ``prefix``, in vLLM's names or the checkpoint's, drafts tokens.

    Args:
        num_layers: the language model's ``num_hidden_layers``, if it says so.
    """
    stated = {"num_hidden_layers": num_layers}
    return _VLLM.search(prefix) is not None or is_drafting(prefix, stated)


def is_one_of(prefix: str, packed: Mapping[str, list[str]], modules: Iterable[str]) -> bool:
    """Whether one of ``modules`` in drafting layers, by the checkpoint's names, is what vLLM calls
    ``prefix``. Names above a module's parent are not compared: they differ.

    Args:
        packed: vLLM's names of fused linears, with those of their parts.
    """
    above, _, last = prefix.rpartition(".")
    asked = {_kind(f"{above}.{part}") for part in packed.get(last, [last])}
    return not asked.isdisjoint(map(_kind, modules))


def _kind(module: str) -> str:
    if _EXPERTS.search(module):
        return "experts"
    parent, last = ["", *module.split(".")][-2:]
    return last if parent.isdigit() or last == "head" else f"{parent}.{last}"
