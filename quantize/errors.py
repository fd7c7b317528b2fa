"""The one exception that reaches a user: it says which file and tensor, and what to do."""

from __future__ import annotations


class QuantizeError(Exception):
    """Something about the input or the target that the user can act on."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
