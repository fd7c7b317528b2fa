"""The one exception that reaches a user: it says which file and tensor, and what to do."""

from __future__ import annotations


class QuantizeError(Exception):
    """Something about the input or the target that the user can act on."""
