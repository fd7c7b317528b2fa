"""Has ``import quantize`` give this package's neighbour, whatever else has that name.

The name is a common one. A ``quantize.py`` or a folder ``quantize`` beside a user's script, or
where ``python -m`` is started, comes before installed packages in ``sys.path``. So once something
of this package is imported that needs the neighbour, a finder before all others answers for the
name. Until then, and so in programs that serve other models, the name is the user's. A program that
has imported another module of that name before is stopped with one sentence: it has one of the two.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

NAME = "quantize"
OURS = Path(__file__).resolve().parents[1] / NAME

PACKAGE = __name__.partition(".")[0]
LIGHT = frozenset({
    "config", "errors", "exchanged", "gpu_only", "metrics", "quirks", "registration", "settings",
    "shadowing", "versions",
})  # fmt: skip
"""Modules of this package that are imported whatever vLLM serves. They need no ``quantize``."""

logger = logging.getLogger("vllm.nvfp4_moe")


def claim() -> None:
    """Have the name mean ours from now on.

    Raises:
        ImportError: if it means something else already.
    """
    found = sys.modules.get(NAME)
    if found is not None:
        place = Path(found.__file__ or next(iter(found.__path__)))
        if OURS not in (place.resolve(), place.resolve().parent):
            raise ImportError(
                f"{place} is in the way: this program has imported it as 'quantize', which is "
                "the name of a package of vllm-nvfp4-moe. Rename it"
            )
    elif not _finder.claimed:
        other = importlib.machinery.PathFinder.find_spec(NAME)
        if other is not None and other.origin and Path(other.origin).resolve().parent != OURS:
            logger.warning(
                "%s cannot be imported from here on: 'quantize' is the name of a package of "
                "vllm-nvfp4-moe. Rename it if this program needs it",
                other.origin,
            )
    _finder.claimed = True


class _Finder(importlib.abc.MetaPathFinder):
    """Claims the name before a module of this package is imported that may need it."""

    claimed = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        if package == PACKAGE and rest and rest not in LIGHT:
            claim()
        if fullname != NAME or not self.claimed or not OURS.is_dir():
            return None
        return importlib.util.spec_from_file_location(
            NAME, OURS / "__init__.py", submodule_search_locations=[str(OURS)]
        )


_finder = _Finder()


def install() -> None:
    """Look at imports from now on."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
