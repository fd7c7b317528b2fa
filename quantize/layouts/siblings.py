"""Linears that engines fuse with others, and that a checkpoint does not have.

Gemma 4's full attention takes keys for values (``attention_k_eq_v``), and has no ``v_proj`` then.
vLLM builds one linear of query, key and value all the same, looks for each in the lists of a
quantization config, and refuses those that have some of the three. So lists name the third, too.
"""

from __future__ import annotations

from collections.abc import Iterable


def absent_siblings(modules: Iterable[str], others: Iterable[str]) -> set[str]:
    """Module paths of values that a list needs beside query and key, which are among ``modules``.

    Args:
        modules: module paths of one list.
        others: those of the checkpoint's other weights.
    """
    names = set(modules)
    parents = {name.removesuffix(".q_proj") for name in names if name.endswith(".q_proj")}
    values = {f"{parent}.v_proj" for parent in parents if f"{parent}.k_proj" in names}
    return values - names.union(others)
