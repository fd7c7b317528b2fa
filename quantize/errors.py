"""The one exception that reaches a user. Its message names file and tensor and says what to do."""

from __future__ import annotations


class QuantizeError(Exception):
    """Something is wrong with the input or the target, and the user can correct it."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error; the name of its class if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
