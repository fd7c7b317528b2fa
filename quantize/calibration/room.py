"""What else fits on a GPU, by what is free on it: speed only; budgets do without."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantize.experts.group import ExpertGroup
from quantize.nvfp4.rounding.method import Method

_SHARE = 0.8
"""Of the free memory: allocators leave gaps."""


def free_memory(device: torch.device) -> int:
    """Return how many bytes could still be allocated on a GPU."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def has_room(device: torch.device, nbytes: int) -> bool:
    """Return whether ``device`` is a GPU on which ``nbytes`` are no more than a fourth of what is
    free."""
    return device.type == "cuda" and 4 * nbytes <= free_memory(device)


def sums_for(stored: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return where to add up what ``stored``, which is all zeros, is to hold: zeros on a GPU with
    room for them, since to add up an expert's share on the host takes longer than the expert;
    else ``stored`` itself."""
    if not has_room(device, stored.nbytes):
        return stored
    return torch.zeros(stored.shape, dtype=stored.dtype, device=device)


def side_by_side(group: ExpertGroup, method: Method, devices: Sequence[torch.device]) -> int:
    """Return how many of a group's experts are to be rounded together on each device: one, unless
    the method gains by more."""
    if method.together is None or any(device.type != "cuda" for device in devices):
        return 1
    free = _SHARE * min(map(free_memory, devices))
    return _share_out(
        group.num_experts, group.hidden, group.intermediate, method, free, len(devices)
    )


def _share_out(
    experts: int, hidden: int, inner: int, method: Method, free: float, devices: int = 1
) -> int:
    wide, long = max(hidden, 2 * inner), max(hidden, inner)
    weights = 2 * hidden * inner
    # The start of each, one after another, is GPTQ's.
    alone = weights * method.weight_bytes
    alone += long**2 * method.hessian_bytes + wide**2 * method.output_hessian_bytes
    # While an expert waits: its weights and second moments. While its chain runs: its state. The
    # first GPU reads the experts of all, and keeps their weights until they are rounded.
    read = 3 * hidden * inner * 4
    waits = devices * read + 4 * (2 * hidden**2 + (2 * inner) ** 2 + inner**2)
    chain = weights * method.together_bytes + 5 * (long**2 + wide**2)
    most = max(1, min(experts, int((free - alone) // (waits + chain))))
    # As many rounds, equally large, and something to do for each device in each of them.
    rounds = -(-experts // (most * devices))
    return -(-experts // (rounds * devices))
