"""Experts that compute nothing and have no weights of their own."""

from __future__ import annotations

from typing import Any

from quantize.errors import QuantizeError


def zero_experts(config: dict[str, Any]) -> int:
    """The number of experts that compute nothing, ``zero_expert_num`` of the config.

    Raises:
        QuantizeError: if it is not a non-negative integer.
    """
    number = config.get("zero_expert_num") or 0
    if not isinstance(number, int) or number < 0:
        raise QuantizeError(
            f"config.json: zero_expert_num is {number!r}, expected how many experts have no "
            "weights; correct it"
        )
    return number
