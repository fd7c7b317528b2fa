"""The names of output heads, which stay as they are, also where no tensor tells that there is one.

A head whose weights are the embedding's (``tie_word_embeddings``) has no tensor in the checkpoint.
But engines build a linear for it, as quantized as the layout says linears are, and then find no
tensors for it, or cannot tie it. So every list of what is not quantized names the head.
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


def heads(tensors: Iterable[str], quantized: Iterable[str]) -> set[str]:
    """Module paths of heads that a model may have, whether or not they have tensors.

    Args:
        tensors: names of the source's tensors.
        quantized: module paths of what is quantized. vLLM's ModelOpt configs look for each entry
            of the list within a path, so an entry that is part of such a path is left out.
    """
    above = {""}
    for name in tensors:
        if found := EMBEDDING.fullmatch(name):
            parts = found["above"].split(".")
            above.update(".".join(parts[:count]) for count in range(len(parts) + 1))
    taken = {re.sub(r"\d+", "0", module) for module in quantized}
    names = {*_HEADS, *(f"{prefix}.{_HEADS[0]}".lstrip(".") for prefix in above)}
    return {name for name in names if not any(name in module for module in taken)}
