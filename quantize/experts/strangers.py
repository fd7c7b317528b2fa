"""What lies beside an expert's weight under its name, and is nothing that is known.

An adapter that was never merged (``lora_A``), what a weight is multiplied by (``weight_g``), a norm
that an expert has besides its linears: whatever it is, the model may compute something else than
the weights alone give.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup, tensor_names_of

_ENDS = re.compile(r"[._]")
_ADAPTER = re.compile(r"(?:.*\.)?lora_\w+(?:\..*)?")


def check_no_strangers(checkpoint: Checkpoint, groups: Iterable[ExpertGroup]) -> None:
    """See that there is nothing beside the weights of ``groups``.

    Raises:
        QuantizeError: if there is; it names the first.
    """
    groups = list(groups)
    known = tensor_names_of(groups)
    stems = {name.removesuffix(".weight") for name in known}
    prefixes = {group.prefix for group in groups}
    experts = {
        f"{group.prefix}.{group.first + expert}"
        for group in groups
        if not group.fused
        for expert in range(group.num_experts)
    }
    for name in sorted(checkpoint.tensors.keys() - known):
        for end in (match.start() for match in _ENDS.finditer(name)):
            adapter = name[:end] in prefixes and _ADAPTER.fullmatch(name[end + 1 :])
            if name[:end] in stems or name[:end] in experts or adapter:
                raise QuantizeError(
                    f"{checkpoint.tensors[name].file.name}: {name} lies beside an expert's weight, "
                    "and what it does to it is not known; merge it into the weight (as an adapter "
                    "is merged), or remove it if the model does not use it"
                )
