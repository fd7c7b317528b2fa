"""Bounds on the numbers of a config: nothing is built from a config that cannot be true.

Finding the gate builds every layer of the model that ``config.json`` describes, without memory for
its weights. That takes time, and some lists in memory, for each layer. So a config must not ask
for more layers than its checkpoint could hold, at any depth and in any part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError

_LAYERS = re.compile(
    r"(?:num|n|number)_(?:\w+_)?(?:layers?|blocks?|stages?)|(?:encoder_|decoder_)?layers|depths?"
)
"""Keys whose value, or each entry of whose value, says how many layers are built."""

_MORE_LAYERS = re.compile(r"\w+_(?:layers|blocks|depths?)")
"""Keys that may say so too, or something else: an index, a scale, whether to do something."""

_COUNT = re.compile(
    r"(?:num|n|number)_(?:\w+_)?(?:experts|heads|groups)|(?:\w+_)?num_experts|zero_expert_num"
)
"""Keys whose value is how many experts, heads or the like there are."""

_SIZE = re.compile(
    r"(?:\w+_)?(?:vocab_size|hidden_size|intermediate_size|hidden_dim|head_dim|embed_dim|ffn_dim"
    r"|latent_size|lora_rank)|d_model|d_ff|n_embd|n_inner"
)
"""Keys whose value, or each entry of whose value, is a dimension of weights."""

_MAX_COUNT = 1000
"""How many of a thing a config may always state."""

_MAX_SIZE = 2**20
"""A dimension that a config may always state."""

_NUMBER = re.compile(r"(?<![^.])[0-9]{1,9}(?![^.])")
_CORRECT = "correct it, or download the checkpoint again"


def check_counts(file: Path, config: dict[str, Any], tensors: Iterable[TensorInfo]) -> None:
    """Raise QuantizeError if ``config`` states a count or a size that cannot be true.

    Each is a whole number. The tensors of layer N have N in their names. Experts and heads are
    numbers in names too, or they are within a dimension of a tensor. And a dimension is at most as
    large as the largest tensor. Zero is allowed, and so is -1, with which some configs say "none".

    Args:
        file: the file that ``config`` was read from, for the message.
        tensors: the tensors in the checkpoint's files.
    """
    layers = count = _MAX_COUNT
    size = _MAX_SIZE
    for tensor in tensors:
        layers = max(layers, *(int(n) + 1 for n in _NUMBER.findall(tensor.name)), 0)
        count = max(count, *tensor.shape, 0)
        size = max(size, tensor.nbytes)
    limits = ((_LAYERS, layers), (_COUNT, max(layers, count)), (_SIZE, size))
    for path, key, value in _numbers(config):
        of_key = [limit for pattern, limit in limits if pattern.fullmatch(key)]
        if of_key and (isinstance(value, bool | float) or value < -1):
            raise QuantizeError(
                f"{file}: {path} is {value!r}, expected a whole number that is not negative; "
                f"{_CORRECT}"
            )
        if _MORE_LAYERS.fullmatch(key) and not isinstance(value, bool):
            of_key.append(layers)
        if any(value > limit for limit in of_key):
            shown = f"{value}" if value < 10**40 else "above 10^40"
            raise QuantizeError(
                f"{file}: {path} is {shown}, but no tensor of the checkpoint has a number that "
                f"high in its name, or is that large; {_CORRECT}"
            )


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every number in ``config`` at any depth: its path, its key, and the number.

    The numbers of a list have the list's key.
    """
    waiting: list[tuple[str, str, Any]] = [("", "", config)]
    while waiting:
        path, key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{path}.{k}".lstrip("."), str(k), v) for k, v in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}[{i}]", key, v) for i, v in enumerate(value)]
        elif isinstance(value, int | float):
            yield path, key, value
