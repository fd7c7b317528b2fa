"""A registry: things by name, each imported when it is first asked for.

So the command line can list every layout, scale rule and rounding without importing PyTorch or a
layout's library, and adding one is a file of its own and one line in its registry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TypeVar, cast

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Read-only, in the order given.

    Args:
        places: by name, where the thing is: ``"package.module:attribute"``.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> T:
        module, _, attribute = self._places[name].partition(":")
        return cast("T", getattr(import_module(module), attribute))

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
