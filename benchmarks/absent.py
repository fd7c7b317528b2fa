"""A peer that cannot run: what is missing, for the table's reader."""

from __future__ import annotations


class AbsentError(Exception):
    """Why a kernel has no column: one line, with what would change it."""
