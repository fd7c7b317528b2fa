"""The one exception that reaches a user. Its message names file and tensor and says what to do."""

from __future__ import annotations

from collections.abc import Iterable


class QuantizeError(Exception):
    """Something is wrong with the input or the target, and the user can correct it."""


class TooMuchError(QuantizeError):
    """What is asked for takes more time or memory than is likely to be meant."""


class DamagedWeightsError(QuantizeError):
    """Weights of the source are damaged.

    Attributes:
        files: the names of the files that hold them. A user may repair these and go on.
    """

    def __init__(self, message: str, files: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.files = sorted(files)


def first_line(error: BaseException) -> str:
    """The first line of another library's error; the name of its class if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
