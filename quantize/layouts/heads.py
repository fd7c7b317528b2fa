"""The names of output heads, which stay as they are, also where no tensor tells that there is one.

A head whose weights are the embedding's (``tie_word_embeddings``) has no tensor in the checkpoint.
But engines build a linear for it, as quantized as the layout says linears are, and then find no
tensors for it, or cannot tie it. So every list of what is not quantized names the head. The same
holds for the heads of layers that draft tokens (multi-token prediction), which may be the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_HEADS = ("lm_head", "output", "embed_out", "output_layer")
"""Names of heads in models of language: most, InternLM2, GPT-NeoX, ChatGLM."""

EMBEDDING = re.compile(
    r"(?P<above>.*?)\.?(?:embed_tokens|tok_embeddings|embeddings?|word_embeddings|wte|embed_in)"
    r"\.weight"
)
"""Embeddings of tokens. The head is beside the module that holds them, or above."""

_DRAFTING = re.compile(r"(?P<layer>.*?)\.(?:eh_proj|enorm|hnorm|shared_head\.\w+)\.weight")
"""What is in a layer that drafts tokens, and in no other (DeepSeek-V3, GLM-4.5, Step-3.7)."""

_DRAFTING_HEADS = ("shared_head.head", "head")
"""As vLLM's DeepSeek and its GLM call the head of such a layer, wherever its tensor is."""


def heads(tensors: Iterable[str], quantized: Iterable[str]) -> set[str]:
    """Module paths of heads that a model may have, whether or not they have tensors.

    Args:
        tensors: names of the source's tensors.
        quantized: module paths of what is quantized. vLLM's ModelOpt configs look for each entry
            of the list within a path, so an entry that is part of such a path is left out.
    """
    above, drafting = {""}, set[str]()
    for name in tensors:
        if found := EMBEDDING.fullmatch(name):
            parts = found["above"].split(".")
            above.update(".".join(parts[:count]) for count in range(len(parts) + 1))
        if found := _DRAFTING.fullmatch(name):
            drafting.update(f"{found['layer']}.{head}" for head in _DRAFTING_HEADS)
    taken = {re.sub(r"\d+", "0", module) for module in quantized}
    names = {*_HEADS, *drafting, *(f"{prefix}.{_HEADS[0]}".lstrip(".") for prefix in above)}
    return {name for name in names if not any(name in module for module in taken)}
