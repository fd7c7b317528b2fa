"""A machine on which C++ kernels cannot run, or a user who does not want them."""

from pathlib import Path

import pytest

from quantize.native import environment, processor

LACKS = ("AVX2", "a compiler", "the wish")


def take_away(what: str, empty: Path, patch: pytest.MonkeyPatch) -> None:
    """One of ``LACKS``.

    Args:
        empty: a folder.
    """
    if what == "AVX2":
        patch.setattr(processor, "flags", frozenset)
    elif what == "a compiler":
        patch.setenv("PATH", str(empty))
        patch.delenv("CXX", raising=False)
        patch.setenv(environment.CACHE, str(empty))
        patch.setattr("tempfile.tempdir", str(empty))
    else:
        patch.setenv(environment.CPP, "0")
