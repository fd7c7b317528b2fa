"""A registry: a mapping of names to objects, each of which is imported when it is looked up.

With it the command line can list every layout, scale rule and rounding without importing PyTorch or
the library of a layout. To add one, write a file for it and add one line to its registry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TypeVar, cast

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """A read-only mapping in the order given.

    Args:
        places: by name, where the object is: ``"package.module:attribute"``.
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
